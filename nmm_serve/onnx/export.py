"""Export a checkpoint: graphs, small files and manifest as one directory, checked against torch before it appears."""

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmm_serve.checkpoint import atomic_directory, checkpoint_hash, load_model, load_processor
from nmm_serve.errors import ConfigError, EngineError, unknown_name
from nmm_serve.onnx.manifest import DECODER, FORMAT, IMAGE, Manifest, is_exported, write_manifest
from nmm_serve.onnx.quantize import QUANTIZATIONS, Quantization
from nmm_serve.onnx.runtime import INSTALL, import_onnxruntime

if TYPE_CHECKING:
    from nmm_serve.config import NMMConfig

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json",
    "chat_template.jinja", "run.json",
)  # fmt: skip
PACKAGES = ("nmm-serve", "torch", "onnx", "onnxruntime")


def export(checkpoint: str | Path, out: str | Path, quantization: Quantization = "none") -> Manifest:
    """Write `checkpoint` to the directory `out` as ONNX graphs, and return what was written and how it compared.

    Weights of other types become float32 before they are quantised.

    Raises:
        CheckpointError: `checkpoint` is not one of our checkpoints.
        ConfigError: an unknown quantisation, or `out` is something else than an earlier export.
        EngineError: onnx or onnxruntime is missing, there is no graph for the image encoder, or the exported model
            differs from torch; nothing is written then.
    """
    if quantization not in QUANTIZATIONS:
        raise ConfigError(unknown_name("quantisation", quantization, QUANTIZATIONS))
    out = Path(out)
    if out.exists() and not is_exported(out):
        raise ConfigError(f"{out} exists and is not an exported model; choose a directory that does not exist yet")
    import_onnxruntime()
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise EngineError(f"the onnx package is not installed; run {INSTALL}") from None
    import torch

    from nmm_serve.onnx.check import check
    from nmm_serve.onnx.decoder import write_decoder
    from nmm_serve.onnx.image import write_image_front
    from nmm_serve.onnx.runtime import Runtime

    processor = load_processor(checkpoint)
    model = load_model(checkpoint, torch.float32)
    if (encoder := model.config.encoder) is not None and (encoder.pretrained is not None or model.config.pool_image):
        what = "an encoder of transformers" if encoder.pretrained is not None else "pooled images"
        raise EngineError(f"{checkpoint} has {what}, which the exporter has no graph for; serve it with vllm or torch")
    if model.config.native_resolution:
        raise EngineError(
            f"{checkpoint} was trained with native_resolution, and an exported model scales every image to one area; "
            "serve it with vllm or torch"
        )
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    fields = described(model.config, quantization) | {
        "checkpoint_sha256": checkpoint_hash(checkpoint),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": versions(),
    }
    with atomic_directory(out) as staging:
        write_decoder(staging / DECODER, model.config, weights, quantization)
        write_image_front(staging / IMAGE, model.config, weights, quantization)
        for name in SMALL_FILES:
            if (Path(checkpoint) / name).is_file():
                shutil.copyfile(Path(checkpoint) / name, staging / name)
        write_manifest(staging, Manifest(check={}, **fields))
        runtime = Runtime(staging, slots=4, threads=1)  # more would only wait for each other on such short prompts
        manifest = Manifest(check=check(model, processor, runtime).to_record(), **fields)
        write_manifest(staging, manifest)
    return manifest


def described(config: "NMMConfig", quantization: Quantization) -> dict[str, Any]:
    eos = config.eos_token_id
    return {
        "format": FORMAT,
        "family": config.family,
        "quantization": quantization,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "context_length": config.max_position_embeddings,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": eos if isinstance(eos, list) else [] if eos is None else [eos],
        "image_start_token_id": config.image_start_token_id,
        "image_token_id": config.image_token_id,
        "image_end_token_id": config.image_end_token_id,
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
