"""Engines by name. An engine's own packages are imported only when it is opened."""

import importlib
from typing import Any

from nmm_serve.engines.base import Engine
from nmm_serve.errors import EngineError, unknown_name

ENGINES = {
    "torch": "nmm_serve.engines.torch:TorchEngine",
    "vllm": "nmm_serve.engines.vllm:VLLMEngine",
    "openai": "nmm_serve.engines.openai:OpenAIEngine",
}


def open_engine(model: str, engine: str | None = None, **options: Any) -> Engine:
    """Open a checkpoint directory, or a server's URL, with the named engine.

    `engine=None` means `openai` for an http(s) URL and `torch` for a directory.
    Raises EngineError for an unknown engine or one that does not fit the model.
    """
    is_url = model.startswith(("http://", "https://"))
    if engine is None:
        engine = "openai" if is_url else "torch"
    if engine not in ENGINES:
        raise EngineError(unknown_name("engine", engine, ENGINES))
    if is_url != (engine == "openai"):
        raise EngineError(
            f"engine {engine!r} does not fit --model {model!r}: a URL is served by 'openai', a directory by the others"
        )
    module, cls = ENGINES[engine].split(":")
    return getattr(importlib.import_module(module), cls)(model, **options)
