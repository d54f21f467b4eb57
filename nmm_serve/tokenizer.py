"""Make a tokenizer: train a small one on a corpus, or give an existing one our special tokens."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nmm_serve.chat import BOS, CHAT_TEMPLATE, EOS, IMAGE, IMAGE_END, IMAGE_START, PAD, SPECIAL_TOKENS
from nmm_serve.errors import ConfigError, first_line


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every string has a code, and no text is ever unknown.

    `vocab_size` counts the 256 bytes and the special tokens, which come first.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size {vocab_size} is below {smallest}: 256 bytes and {len(SPECIAL_TOKENS)} specials")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """A tokenizer directory of anyone's; our special tokens are added where they are missing.

    Raises ConfigError for a directory without a tokenizer, and for one that has no fast form.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"tokenizer directory {path} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a damaged or missing file makes the library raise
        raise ConfigError(
            f"tokenizer {path} cannot be read: {first_line(error)}; expected a directory with tokenizer.json and "
            "tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer {path} has no tokenizer.json; convert it to a fast tokenizer first")
    return tokenizer if tokenizer.chat_template == CHAT_TEMPLATE else add_special_tokens(tokenizer)


def add_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Give a tokenizer those of our special tokens that it lacks, and our chat format."""
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    return _finish(tokenizer)


def _finish(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})
    bos_id = tokenizer.convert_tokens_to_ids(BOS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The ids that the model's config carries."""
    names = {
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "image_start_token_id": IMAGE_START,
        "image_token_id": IMAGE,
        "image_end_token_id": IMAGE_END,
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
