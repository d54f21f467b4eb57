"""Engines by name. An engine's own packages are imported only when it is opened."""

import importlib
from typing import Any

from nmm_serve.engines.base import Engine
from nmm_serve.errors import EngineError, unknown_name
from nmm_serve.onnx.manifest import is_exported

ENGINES = {
    "torch": "nmm_serve.engines.torch:TorchEngine",
    "vllm": "nmm_serve.engines.vllm:VLLMEngine",
    "onnx": "nmm_serve.engines.onnx:OnnxEngine",
    "openai": "nmm_serve.engines.openai:OpenAIEngine",
}


def default_engine(model: str) -> str:
    """`openai` for an http(s) URL, `onnx` for an exported model, `torch` for any other directory."""
    if model.startswith(("http://", "https://")):
        return "openai"
    return "onnx" if is_exported(model) else "torch"


def open_engine(model: str, engine: str | None = None, **options: Any) -> Engine:
    """Open a checkpoint directory, an exported model or a server's URL with the named engine, or the one that fits.

    Raises EngineError for an unknown engine or one that does not fit the model.
    """
    fitting = default_engine(model)
    engine = engine or fitting
    if engine not in ENGINES:
        raise EngineError(unknown_name("engine", engine, ENGINES))
    if (fitting == "openai") != (engine == "openai"):
        raise EngineError(
            f"engine {engine!r} does not fit --model {model!r}: a URL is served by 'openai', a directory by the others"
        )
    if fitting == "onnx" and engine != "onnx":
        raise EngineError(f"{model} is an exported model, which engine {engine!r} cannot read; use engine 'onnx'")
    module, cls = ENGINES[engine].split(":")
    return getattr(importlib.import_module(module), cls)(model, **options)
