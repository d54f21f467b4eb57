"""Exported models of every family, made once in a session: an export costs a second or two."""

import tempfile
from functools import cache
from pathlib import Path

from parity_checkpoint import make_parity_checkpoint

from nmm_serve.onnx.export import export

FOLDER = tempfile.TemporaryDirectory(prefix="nmm-exported-")


@cache
def checkpoint_of(family: str) -> Path:
    return make_parity_checkpoint(Path(FOLDER.name) / f"{family}-ckpt", family)


@cache
def exported(family: str, quantization: str = "none") -> Path:
    out = Path(FOLDER.name) / f"{family}-{quantization}"
    export(checkpoint_of(family), out, quantization)
    return out
