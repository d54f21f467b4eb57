"""`onnx.json`: what an exported directory holds, in what the runtime needs to know. Read without torch."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nmm_serve.errors import CheckpointError

MANIFEST = "onnx.json"
DECODER, IMAGE = "decoder.onnx", "image.onnx"
FILES = (DECODER, f"{DECODER}.data", IMAGE, f"{IMAGE}.data")
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Sizes of the graphs' inputs, the special tokens, and where the export came from."""

    format: int
    family: str
    quantization: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    context_length: int
    patch_size: int
    image_size: int
    bos_token_id: int | None
    eos_token_ids: list[int]
    image_start_token_id: int | None
    image_token_id: int | None
    image_end_token_id: int | None
    parameters: int
    checkpoint_sha256: str
    """Hash of the checkpoint that was exported."""
    versions: dict[str, str]
    check: dict[str, Any]
    """How far the exported model was from torch when it was written."""


def is_exported(path: str | Path) -> bool:
    """Whether a directory says that it is an exported model."""
    return (Path(path) / MANIFEST).is_file()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(path: str | Path) -> Manifest:
    """Raises CheckpointError for a directory that is not, or no longer, an exported model."""
    path = Path(path)
    how = "make one with: nmm-serve export CHECKPOINT --onnx OUT"
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; expected an exported model ({how})")
    if not is_exported(path):
        raise CheckpointError(f"{path} is not an exported model: it lacks {MANIFEST}; {how}")
    missing = [name for name in (*FILES, "tokenizer.json") if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path} is not a whole exported model: it lacks {', '.join(missing)}; {how}")
    try:
        raw = json.loads((path / MANIFEST).read_text())
        number = raw["format"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}/{MANIFEST} is damaged; {how}") from None
    if number != FORMAT:
        raise CheckpointError(f"{path} has export format {number!r}, this version reads {FORMAT}; export it again")
    names = {field.name for field in fields(Manifest)}
    if set(raw) != names:
        wrong = ", ".join(sorted(names ^ set(raw)))
        raise CheckpointError(f"{path}/{MANIFEST} has missing or unknown entries: {wrong}; {how}")
    for name, value in raw.items():
        sizes = ("_size", "num_layers", "_heads", "head_dim", "_length")
        if name.endswith(sizes) and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31):
            raise CheckpointError(f"{path}/{MANIFEST}: {name} must be a positive number, not {value!r}; {how}")
    return Manifest(**raw)
