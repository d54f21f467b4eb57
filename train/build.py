"""From a training configuration to a model and its processor."""

import dataclasses
import logging
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError

from nmm_serve.checkpoint import load_model, load_processor
from nmm_serve.config import NMMConfig
from nmm_serve.errors import ConfigError, DataError, NMMError
from nmm_serve.image_processor import NMMImageProcessor
from nmm_serve.matching import partner
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.presets import preset
from nmm_serve.processor import NMMProcessor
from nmm_serve.tokenizer import load_tokenizer, token_ids, train_tokenizer
from nmm_serve.train.config import ModelConfig, TrainConfig
from nmm_serve.train.data.mixture import Mixture
from nmm_serve.train.data.sources import Visit
from nmm_serve.train.start.build import build_started, round_up

logger = logging.getLogger(__name__)


def model_config(config: TrainConfig, processor: NMMProcessor) -> NMMConfig:
    """The model that the preset, family and matching name."""
    if config.start.decoder is not None or config.start.encoder is not None:
        raise ConfigError("start gives this model a shape of its own, which no preset has: a sweep cannot size it")
    spec, shape = config.model, preset(config.model.preset)
    common = {
        "vocab_size": round_up(len(processor.tokenizer)),
        "num_hidden_layers": shape.num_hidden_layers,
        "max_position_embeddings": config.context_length,
        "patch_size": spec.patch_size,
        "image_size": spec.image_size,
        "native_resolution": spec.native_resolution,
        "tie_word_embeddings": spec.tie_word_embeddings,
        **token_ids(processor.tokenizer),
    }
    try:
        built = NMMConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            vision_config=None
            if shape.vision_hidden_size is None
            else {"hidden_size": shape.vision_hidden_size, "num_hidden_layers": shape.num_hidden_layers},
            **common,
        )
        if shape.vision_hidden_size is None:
            built = partner(built, spec.family, spec.match)
        elif not spec.family.startswith("late"):
            raise ConfigError(f"preset {spec.preset!r} is a late-fusion model; set model.family=late")
        if spec.family.endswith("moe"):
            if spec.num_experts < 1:
                dense = "late" if spec.family.startswith("late") else "early"
                raise ConfigError(
                    f"model.family {spec.family} needs model.num_experts, 8 in the paper, not {spec.num_experts}; "
                    f"for a model without experts set model.family={dense}"
                )
            values = built.to_dict() | {
                "num_experts": spec.num_experts,
                "num_experts_per_tok": spec.num_experts_per_tok,
                "router": spec.router,
                "router_z_loss_coef": spec.router_z_loss_coef,
            }
            built = NMMConfig(**{k: v for k, v in values.items() if k in NMMConfig.__dataclass_fields__})
        built.pool_image = spec.pool_image  # after `partner`, which starts from an early model
    except (ValueError, StrictDataclassError) as error:
        raise ConfigError(f"model: {str(error.__cause__ or error).splitlines()[-1].strip()}") from error
    return built


def _corpus(config: TrainConfig, mixture: Mixture) -> Iterator[str]:
    """The words of the first documents of each source; images are not opened. A bad document is left out: whether there
    are too many is for the loader to say. Raises DataError for a source with no other ones."""
    for entry in mixture.sources:
        visit = Visit(f"{config.seed}/{entry.source.name}", 0, config.objective)
        count = min(len(entry.source), config.tokenizer.documents)
        bad: NMMError | OSError | None = None
        left_out = 0
        for index in range(count):
            try:
                document = entry.source.document(index, visit)
            except (NMMError, OSError) as error:
                bad, left_out = error, left_out + 1
                continue
            yield from (part for _, part in document.parts if type(part) is str)
        if bad is not None and left_out == count:
            raise DataError(
                f"none of the first {count} documents of source {entry.source.name!r} can be used to train a "
                f"tokenizer; the last: {bad}"
            )
        if bad is not None:
            logger.warning(
                "%d of the first %d documents of source %r are bad: the tokenizer is trained without; the last: %s",
                left_out, count, entry.source.name, bad,
            )  # fmt: skip


def build_processor(config: TrainConfig, mixture: Mixture) -> NMMProcessor:
    """The tokenizer is loaded, or trained on the first documents of each source."""
    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer.path)
    else:
        tokenizer = train_tokenizer(_corpus(config, mixture), config.tokenizer.vocab_size)
    spec = config.model
    image_processor = NMMImageProcessor(
        patch_size=spec.patch_size, image_size=spec.image_size, pool_image=spec.pool_image,
        native_resolution=spec.native_resolution,
    )  # fmt: skip
    return NMMProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def _tell_unused(config: TrainConfig, its: NMMConfig) -> None:
    """Warn of what `model` asks for, other than by default, and the model of `init_from` is not."""
    shape, spec = preset(config.model.preset), config.model
    default = ModelConfig()
    unused = []
    for key in (field.name for field in dataclasses.fields(spec)):
        if key == "preset":  # late fusion is matched to it, in another shape
            differs = its.encoder is None and (shape.hidden_size, shape.num_hidden_layers) != (
                its.hidden_size,
                its.num_hidden_layers,
            )
        else:
            differs = hasattr(its, key) and getattr(its, key) != getattr(spec, key)
        if differs and getattr(spec, key) != getattr(default, key):
            unused.append(f"model.{key} {getattr(spec, key)!r}")
    if unused:
        logger.warning(
            "init_from brings its model, and this has no effect: %s. What %s has is shown by nmm-serve info",
            ", ".join(unused), config.init_from,
        )  # fmt: skip


def build(config: TrainConfig, mixture: Mixture) -> tuple[NMMForConditionalGeneration, NMMProcessor]:
    """A fresh model, one with parts of `start`, or the one of `init_from` with its own tokenizer and image sizes.

    Raises ConfigError for a decoder that would stay as random as it starts.
    """
    if config.optimizer.decoder_lr_scale == 0 and config.init_from is None and config.start.decoder is None:
        raise ConfigError(
            "optimizer.decoder_lr_scale is 0, and a decoder from scratch would stay random; give start.decoder or "
            "init_from, or let it train"
        )
    if config.init_from is not None:
        model = load_model(config.init_from)
        if config.context_length > model.config.max_position_embeddings:
            raise ConfigError(
                f"context_length {config.context_length} is over that of {config.init_from}, "
                f"{model.config.max_position_embeddings}"
            )
        _tell_unused(config, model.config)
        return model.float(), load_processor(config.init_from)
    if config.start.decoder is not None or config.start.encoder is not None:
        return build_started(config, lambda: build_processor(config, mixture))
    processor = build_processor(config, mixture)
    return NMMForConditionalGeneration(model_config(config, processor)), processor
