"""A checkpoint is one directory: config, safetensors, tokenizer and processor files, `run.json`. No pickle.

It is written beside its place and renamed into it, so that a reader sees a whole one or none.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmm_serve.errors import CheckpointError, NMMError, first_line
from nmm_serve.onnx.manifest import is_exported

if TYPE_CHECKING:
    import torch

    from nmm_serve.config import NMMConfig
    from nmm_serve.models import NMMForConditionalGeneration
    from nmm_serve.processor import NMMProcessor

WEIGHTS = "model.safetensors"
REQUIRED = ("config.json", "tokenizer.json", "processor_config.json")
HASHED = ("config.json", "tokenizer.json", "processor_config.json", WEIGHTS)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A new directory that appears at `path` whole, and durably, or not at all. It replaces an old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
        publish(staging, path)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        # safetensors and tokenizers have errors of their own for a full disk, a quota, a disk that fails
        if not isinstance(error, OSError) and (told := re.search(r"os error (\d+)", str(error))):
            raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from error
        raise


def publish(staging: Path, path: Path) -> None:
    """Give a finished directory its name, durably; the files in it first. It replaces an old one."""
    for file in staging.rglob("*"):
        if file.is_file():
            _fsync(file)
    staging.chmod(0o755)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    staging.rename(path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(path: Path) -> None:
    """Delete what processes that were killed while they wrote a directory left beside it: of `path`, or of all whose
    names begin so. Only for one that alone may write them."""
    for leftover in path.parent.glob(f".{path.name}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    path: str | Path, model: "NMMForConditionalGeneration", processor: "NMMProcessor", run: dict[str, Any]
) -> None:
    """Write model, processor and `run.json` as one checkpoint."""
    with atomic_directory(path) as staging:
        write_checkpoint(staging, model, processor, run)


def write_checkpoint(folder: Path, model, processor, run: dict[str, Any]) -> None:
    """The files of a checkpoint, into a folder that the caller publishes."""
    with no_progress_bars():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows a bar for each file; ours are small, and a run has a bar of its own."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def check_checkpoint(path: str | Path) -> Path:
    """Raise CheckpointError unless `path` holds the files of one of our checkpoints."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"checkpoint directory {path} does not exist; a run leaves its own in OUT/final")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the checkpoint's directory")
    if is_exported(path):
        raise CheckpointError(f"{path} is an exported model, not a checkpoint; give the directory it was exported from")
    missing = [name for name in REQUIRED if not (path / name).is_file()]
    if missing:
        run = f"; it is a run's folder: give {path / 'final'}" if (path / "final").is_dir() else ""
        raise CheckpointError(f"{path} is not a checkpoint: it lacks {', '.join(missing)}{run}")
    try:
        model_type = json.loads((path / "config.json").read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise CheckpointError(f"{path}/config.json is not a JSON object") from None
    if model_type != "nmm":
        raise CheckpointError(f"{path} holds a {model_type!r} model; this project loads model_type 'nmm'")
    if not (path / WEIGHTS).is_file() and not (path / f"{WEIGHTS}.index.json").is_file():
        pickles = [p.name for p in path.glob("*.bin")] + [p.name for p in path.glob("*.pt")]
        hint = f"; {pickles[0]} is a pickle, which can run code and is never loaded" if pickles else ""
        if (path / "training" / "shards").is_dir():
            hint = ": several processes wrote its weights in shards, which only their run goes on from; use its final"
        raise CheckpointError(f"{path} has no {WEIGHTS}{hint}")
    return path


def load_config(path: str | Path) -> "NMMConfig":
    from nmm_serve.config import NMMConfig

    path = check_checkpoint(path)
    try:
        config = NMMConfig.from_pretrained(path)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise CheckpointError(f"{path}/config.json is not valid: {reason}") from error
    if config.tie_word_embeddings and "lm_head.weight" in weight_names(path):
        # transformers would use it, and vLLM the embeddings
        raise CheckpointError(
            f"{path}/config.json is not valid: tie_word_embeddings is true, but the weights hold an output layer of "
            "their own, lm_head.weight; set it to false, or save the model anew with its weights tied"
        )
    return config


def weight_names(path: Path) -> set[str]:
    """Names of the tensors, from their files' headers. None of files that are damaged, which loading them tells."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for file in path.glob("*.safetensors"):
        with suppress(SafetensorError), safe_open(file, "numpy") as tensors:
            names |= set(tensors.keys())
    return names


def load_processor(path: str | Path) -> "NMMProcessor":
    """The processor, checked against the model's config: another model's tokenizer is refused."""
    from nmm_serve.processor import NMMProcessor
    from nmm_serve.tokenizer import token_ids

    config = load_config(path)
    try:
        processor = NMMProcessor.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: the tokenizer or processor files cannot be read: {error}") from error
    for name, value in token_ids(processor.tokenizer).items():
        expected = getattr(config, name)
        if value != expected and not (isinstance(expected, list) and value in expected):  # there may be several ends
            raise CheckpointError(
                f"{path}: tokenizer and model do not match: {name} is {value} in the tokenizer "
                f"but {expected} in config.json; use the tokenizer that the model was trained with"
            )
    if len(processor.tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {len(processor.tokenizer)} tokens but the model only {config.vocab_size}"
        )
    for name in ("patch_size", "image_size", "pool_image", "native_resolution"):
        if getattr(processor.image_processor, name) != getattr(config, name):
            raise CheckpointError(f"{path}: {name} differs between processor_config.json and config.json")
    return processor


def load_whole(
    model_class: Any, path: str | Path, config: Any, dtype: "torch.dtype | str", *, what: str, error: type[NMMError]
) -> Any:
    """A transformers model from a local directory. Every weight must be there, and no other.

    `model_class` may be an Auto class. Raises `error`, which calls the weights `what`; pickles are refused.
    """
    try:
        with no_progress_bars():
            model, info = model_class.from_pretrained(
                path, config=config, dtype=dtype, local_files_only=True, use_safetensors=True,
                output_loading_info=True,
            )  # fmt: skip
    except Exception as cause:
        raise error(f"{what} cannot be loaded: {first_line(cause)}") from cause
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(sorted(map(str, info[kind]))[:3])
            raise error(f"{what} do not fit config.json: {kind.replace('_', ' ')}: {names}")
    return model


def load_model(
    path: str | Path, dtype: "torch.dtype | None" = None, device: str = "cpu"
) -> "NMMForConditionalGeneration":
    """The model in evaluation mode. Every weight must be there, and no other."""
    from nmm_serve.models import NMMForConditionalGeneration

    model = load_whole(
        NMMForConditionalGeneration, path, load_config(path), dtype or "auto",
        what=f"the weights {path}/{WEIGHTS}", error=CheckpointError,
    )  # fmt: skip
    return model.to(device).eval()


def read_run(path: str | Path) -> dict[str, Any]:
    """`run.json`: how the checkpoint came to be. Empty when someone left it out. Raises CheckpointError for a damaged
    one."""
    file = Path(path) / "run.json"
    if not file.is_file():
        return {}
    try:
        run = json.loads(file.read_text())
    except ValueError:
        run = None
    if not isinstance(run, dict):
        raise CheckpointError(f"{file} is not a JSON object; restore it, or delete it: the model works without")
    return run


def checkpoint_hash(path: str | Path) -> str:
    """sha256 over the files that decide what the model says: weights, config, tokenizer, processor."""
    digest = hashlib.sha256()
    weights = (file.name for pattern in ("*.safetensors", "*.onnx", "*.onnx.data") for file in Path(path).glob(pattern))
    for name in sorted({*HASHED, *weights}):
        file = Path(path) / name
        if file.is_file():
            digest.update(name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
