"""Take over a language model's tokenizer: its own special tokens get our names, the missing ones are added."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nmm_serve.chat import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS
from nmm_serve.errors import ConfigError, first_line
from nmm_serve.tokenizer import add_special_tokens


def adopt_tokenizer(path: str | Path) -> tuple[PreTrainedTokenizerFast, dict[int, int | None]]:
    """The tokenizer of a language model, in our chat format.

    Its begin, end and padding tokens are renamed and keep their ids, so that the model goes on knowing them. A model
    without a begin token, or with one token for both ends, separates documents with its end token: the `<|bos|>` that
    is added then starts as a copy of that.

    Returns:
        The tokenizer, and its new tokens: each with the old one whose embedding it copies, or None.

    Raises ConfigError for a directory without a fast tokenizer, or one without an end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a damaged or missing file makes the library raise
        raise ConfigError(f"{path} has no tokenizer that can be read: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{path} has no tokenizer.json; convert its tokenizer to a fast one first")
    if tokenizer.chat_template == CHAT_TEMPLATE:
        return tokenizer, {}
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer in {path} names no eos_token, so that no answer would ever end; give it one")
    names = {tokenizer.eos_token: EOS}
    for token, ours in ((tokenizer.bos_token, BOS), (tokenizer.pad_token, PAD)):
        if token is not None and token != tokenizer.unk_token:
            names.setdefault(token, ours)
    renamed = PreTrainedTokenizerFast(tokenizer_object=_rename(tokenizer.backend_tokenizer, names))
    added = [token for token in SPECIAL_TOKENS if token not in renamed.get_vocab()]
    adopted = add_special_tokens(renamed)
    eos = adopted.convert_tokens_to_ids(EOS)
    return adopted, {adopted.convert_tokens_to_ids(token): eos if token == BOS else None for token in added}


def _rename(tokenizer: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """Tokens under new names and their old ids, in both places where a tokenizer file holds them."""
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"].get("vocab")
    if isinstance(vocabulary, dict):
        state["model"]["vocab"] = {names.get(token, token): id for token, id in vocabulary.items()}
    elif isinstance(vocabulary, list):  # unigram: pieces with scores
        state["model"]["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
        token["special"] = token["special"] or token["content"] in names.values()
    state["post_processor"] = None  # it would put the tokens of the old names around every text
    return Tokenizer.from_str(json.dumps(state))
