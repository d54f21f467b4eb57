"""An image encoder from a Hugging Face directory: CLIP's or SigLIP's, kept exactly as it is."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from nmm_serve.checkpoint import load_whole
from nmm_serve.config import PRETRAINED_ENCODERS
from nmm_serve.errors import ConfigError, first_line

KEPT = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "vision_use_head",
)  # fmt: skip
"""The fields of its config that decide what it computes."""


def read_encoder(path: str | Path, patch_size: int, image_size: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The `vision_config` that stands for an encoder, and its weights under our names in float32.

    Args:
        patch_size: must be the encoder's.
        image_size: a multiple of it. The encoder's positions are interpolated where it was trained on another.

    Raises ConfigError for another kind of model, a field or weight that does not fit, and for pickles.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"start.encoder: directory {path} does not exist")
    try:
        whole = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a damaged or missing file makes the library raise
        raise ConfigError(f"start.encoder: {path}/config.json cannot be read: {first_line(error)}") from error
    config = getattr(whole, "vision_config", whole)
    if config.model_type not in PRETRAINED_ENCODERS:
        raise ConfigError(
            f"start.encoder: {path} has model_type {config.model_type!r}; these can be loaded, whole or their image "
            "side alone: clip, siglip"
        )
    if config.num_channels != 3:
        raise ConfigError(f"start.encoder: {path} has num_channels {config.num_channels!r}, and our images have 3")
    if config.patch_size != patch_size:
        raise ConfigError(
            f"start.encoder: {path} has patch_size {config.patch_size!r}; set model.patch_size to that, not "
            f"{patch_size}, and model.image_size to a multiple ({config.image_size} is what it was trained on)"
        )
    mean, std = read_normalisation(Path(path))
    fields = {
        "pretrained": {name: getattr(config, name) for name in KEPT if hasattr(config, name)},
        "image_mean": mean,
        "image_std": std,
    }
    what = f"start.encoder: the weights in {path}"
    model = load_whole(AutoModel, path, whole, torch.float32, what=what, error=ConfigError)
    tower = getattr(model, "vision_model", model)
    return fields, {f"model.vision.tower.{name}": tensor for name, tensor in tower.state_dict().items()}


def read_normalisation(path: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the encoder's pixels, for values from 0 to 1."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = path / name
        if not file.is_file():
            continue
        try:
            values = json.loads(file.read_text())
            values = values.get("image_processor", values)
            mean, std = ([float(x) for x in values[key]] for key in ("image_mean", "image_std"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"start.encoder: {file} names no image_mean and image_std") from None
        if len(mean) != 3 or len(std) != 3 or not values.get("do_normalize", True):
            raise ConfigError(f"start.encoder: {file} does not normalise three colours, as CLIP and SigLIP do")
        if not math.isclose(values.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
            raise ConfigError(f"start.encoder: {file} has rescale_factor {values['rescale_factor']}, not 1/255")
        return mean, std
    raise ConfigError(
        f"start.encoder: {path} has no preprocessor_config.json, which says how its pixels are normalised; "
        "copy it from where the encoder comes from"
    )
