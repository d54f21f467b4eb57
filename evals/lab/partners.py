"""Models of equal budget with random weights: how long a model takes does not hang on what it has learned.

The weights are random and every answer has a forced length, so these models measure time and memory, never quality.
"""

from collections.abc import Sequence
from pathlib import Path

from nmm_serve.config import NMMConfig
from nmm_serve.errors import ConfigError
from nmm_serve.evals.lab.contenders import TEXT_TOKENS, Contender
from nmm_serve.matching import MATCH_BY, partner
from nmm_serve.presets import preset

VOCAB = 1024
"""Tokens of the tokenizer, as in training by default."""
CONTEXT = 1024
PATCH = 14
SYLLABLES = ("ba", "co", "di", "fu", "ge", "ha", "ki", "lo", "mu", "ne", "pa", "ro", "si", "tu", "ve", "zo")


def shapes(
    preset_name: str, matches: Sequence[str], *, moe: bool, image_size: int, prompt_tokens: int = TEXT_TOKENS
) -> list[tuple[str, str | None, NMMConfig]]:
    """Name, yardstick and config: the early model, a late one for each of `matches`, the MoE if asked for.

    FLOPs are matched for one image of `image_size` and `prompt_tokens` tokens of text.

    Raises ConfigError for a preset that is not an early model, or no partner within 5%.
    """
    spec = preset(preset_name)
    if spec.vision_hidden_size is not None:
        raise ConfigError(f"preset {preset_name!r} is a late-fusion model; partners are built for early ones")
    early = NMMConfig(
        vocab_size=VOCAB,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        patch_size=PATCH,
        image_size=image_size,
        max_position_embeddings=CONTEXT,
    )
    found: list[tuple[str, str | None, NMMConfig]] = [("early", None, early)]
    for match in matches:
        if match not in MATCH_BY:
            raise ConfigError(f"match is {match!r}; expected some of {', '.join(MATCH_BY)}")
        found.append((f"late/{match}", match, partner(early, "late", match, text_tokens=prompt_tokens)))
    if moe:
        found.append(("moe", "active", partner(early, "moe")))
    return found


def build(
    preset_name: str, matches: Sequence[str], folder: Path, *, moe: bool = False, image_size: int = 224, seed: int = 0
) -> list[Contender]:
    """Write the models of `shapes` as checkpoints into `folder`, all with one tokenizer."""
    import torch

    from nmm_serve.checkpoint import save_checkpoint
    from nmm_serve.image_processor import NMMImageProcessor
    from nmm_serve.models import NMMForConditionalGeneration
    from nmm_serve.processor import NMMProcessor
    from nmm_serve.tokenizer import token_ids, train_tokenizer

    planned = shapes(preset_name, matches, moe=moe, image_size=image_size)
    words = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]
    tokenizer = train_tokenizer([" ".join(words[i : i + 64]) for i in range(0, len(words), 64)] * 2, VOCAB)
    contenders = []
    for name, match, config in planned:
        path = folder / f"{preset_name}-{name.replace('/', '-')}"
        fields = {key: value for key, value in config.to_dict().items() if key in NMMConfig.__dataclass_fields__}
        torch.manual_seed(seed)
        model = NMMForConditionalGeneration(NMMConfig(**(fields | token_ids(tokenizer))))
        images = NMMImageProcessor(patch_size=PATCH, image_size=image_size)
        processor = NMMProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
        save_checkpoint(path, model, processor, {"tokens": 0, "random_weights": True})
        contenders.append(Contender(name, match, path, random_weights=True))
    return contenders
