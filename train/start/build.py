"""A new model whose parts are taken from elsewhere."""

from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from nmm_serve.config import NMMConfig
from nmm_serve.errors import ConfigError
from nmm_serve.image_processor import NMMImageProcessor
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.presets import preset
from nmm_serve.processor import NMMProcessor
from nmm_serve.tokenizer import token_ids
from nmm_serve.train.config import ModelConfig, TrainConfig
from nmm_serve.train.start.decoder import decoder_fields, grow, read_decoder_config, read_decoder_weights, upcycled
from nmm_serve.train.start.encoder import read_encoder
from nmm_serve.train.start.tokenizer import adopt_tokenizer


def build_started(
    config: TrainConfig, new_processor: Callable[[], NMMProcessor]
) -> tuple[NMMForConditionalGeneration, NMMProcessor]:
    """The model of `start`, its other parts from scratch.

    Without `start.decoder` the preset gives the decoder's shape and `new_processor` the tokenizer. A late model without
    `start.encoder` gets the paper's: half the decoder's width, the same depth.

    Raises ConfigError for a directory that is missing, damaged or of another kind.
    """
    fields: dict[str, Any]
    if config.start.decoder is not None:
        fields, weights, tokenizer = start_decoder(config.start.decoder, config.context_length)
    else:
        shape, tokenizer, weights = preset(config.model.preset), new_processor().tokenizer, {}
        fields = {
            "vocab_size": round_up(len(tokenizer)),
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "max_position_embeddings": config.context_length,
            "tie_word_embeddings": config.model.tie_word_embeddings,
        }
    spec = config.model
    if spec.family.endswith("moe") or fields.get("num_experts"):
        weights = give_experts(spec, fields, weights)
    if config.start.encoder is not None:
        fields["vision_config"], tower = read_encoder(config.start.encoder, spec.patch_size, spec.image_size)
        weights |= tower
    elif spec.family.startswith("late"):
        width = max(32, round(fields["hidden_size"] / 64) * 32)
        fields["vision_config"] = {"hidden_size": width, "num_hidden_layers": fields["num_hidden_layers"]}
    images = {name: getattr(spec, name) for name in ("patch_size", "image_size", "pool_image", "native_resolution")}
    try:
        built = NMMConfig(**fields, **images, **token_ids(tokenizer))
    except (ValueError, StrictDataclassError) as error:
        raise ConfigError(f"start: {str(error.__cause__ or error).splitlines()[-1].strip()}") from error
    model = NMMForConditionalGeneration(built)
    _, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    processor = NMMProcessor(NMMImageProcessor(**images), tokenizer, chat_template=tokenizer.chat_template)
    return model, processor


def start_decoder(path: str, context_length: int) -> tuple[dict[str, Any], dict[str, torch.Tensor], Any]:
    """Config fields, weights and tokenizer of a language model, with rows for our special tokens."""
    theirs = read_decoder_config(path)
    if context_length > theirs.max_position_embeddings:
        raise ConfigError(
            f"context_length {context_length} is over max_position_embeddings {theirs.max_position_embeddings} of "
            f"{path}; lower it"
        )
    tokenizer, new = adopt_tokenizer(path)
    size = round_up(max(theirs.vocab_size, len(tokenizer)))
    weights = read_decoder_weights(path, theirs)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = grow(weights[name], size, new)
    return decoder_fields(theirs) | {"vocab_size": size}, weights, tokenizer


def give_experts(
    spec: ModelConfig, fields: dict[str, Any], weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Complete the fields of a model with experts. Returns the weights, a dense decoder's copied into every expert.

    Copies whose weights sum to 1 are together what the dense layer was, so the decoder's answers stay; the router
    starts at random.
    """
    if not spec.family.endswith("moe"):
        raise ConfigError(
            f"start.decoder holds a mixture of {fields['num_experts']} experts and cannot start family "
            f"{spec.family!r}; set model.family to moe or late-moe"
        )
    fields["router_z_loss_coef"] = spec.router_z_loss_coef
    if fields.get("num_experts"):
        if spec.router != "learned":
            raise ConfigError(f"start.decoder brings a learned router; set model.router to that, not {spec.router!r}")
        return weights
    fields |= {name: getattr(spec, name) for name in ("num_experts", "num_experts_per_tok", "router")}
    if not weights or spec.router == "modality":
        return upcycled(weights, spec.num_experts)
    if spec.num_experts_per_tok == 1:
        raise ConfigError(
            "start.decoder is dense and would be copied into every expert: with model.num_experts_per_tok 1 its "
            "answers would change, or its router would not learn; set it to 2 or more"
        )
    fields["norm_topk_prob"] = True
    return upcycled(weights, spec.num_experts)


def round_up(tokens: int) -> int:
    """A multiple of 64 keeps the output layer on the fast paths."""
    return -(-tokens // 64) * 64
