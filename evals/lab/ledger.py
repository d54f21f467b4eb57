"""The deployment ledger: what must be built, shipped and kept to serve one model with one engine.

Derived from files and source, or measured by whoever calls; nothing is estimated.
"""

import ast
import importlib
import importlib.util
import inspect
import io
import pkgutil
import tokenize
from pathlib import Path
from typing import Any

from nmm_serve.checkpoint import load_config
from nmm_serve.config import NMMConfig, NMMVisionConfig
from nmm_serve.engines import ENGINES
from nmm_serve.errors import NMMError

SOURCES = {
    "torch": ("nmm_serve.engines.torch", "nmm_serve.engines.decoding"),
    "vllm": ("nmm_serve.engines.vllm", "nmm_serve.engines.vllm_tasks", "nmm_serve.vllm_plugin"),
    "onnx": ("nmm_serve.engines.onnx", "nmm_serve.engines.decoding", "nmm_serve.onnx"),
}
"""The modules, and packages with all of theirs, that make an engine serve our models: adapter, plugin, exporter."""
LATE_ONLY = {
    "torch": (
        ("nmm_serve.models.vision", "VisionEncoder"), ("nmm_serve.models.blocks", "EncoderLayer"),
        ("nmm_serve.config", "NMMVisionConfig"),
    ),
    "vllm": (
        ("nmm_serve.vllm_plugin.vision", None), ("nmm_serve.vllm_plugin.encoder_graphs", None),
        ("nmm_serve.models.blocks", "EncoderLayer"), ("nmm_serve.config", "NMMVisionConfig"),
    ),
    "onnx": (("nmm_serve.onnx.image", "encoder"), ("nmm_serve.config", "NMMVisionConfig")),
}  # fmt: skip
"""Definitions that would go if no model had an encoder."""
MOE_ONLY = {
    "torch": (("nmm_serve.models.blocks", "SparseMoE"), ("nmm_serve.models.blocks", "Experts")),
    "vllm": (("nmm_serve.vllm_plugin.model", "NMMSparseMoE"), ("nmm_serve.vllm_plugin.moe_choice", None)),
    "onnx": (("nmm_serve.onnx.moe", None),),
}

COMPILED = {
    "compile_encoder": "encoder",
    "encoder_graphs": "encoder CUDA graphs",
    "compile_decoder": "decoder",
}

DEFINITIONS = {
    "compiled": "parts that torch.compile has compiled while the engine started or warmed up; ONNX Runtime runs "
    "exported graphs and has none",
    "build": "commands between a checkpoint and a running engine",
    "graphs": "ONNX graphs and their nodes as exported; an engine that builds its graph while running has no such file",
    "caches": "state that an engine keeps between steps or requests; bytes a token of a sequence where it grows so",
    "knobs": "arguments of the engine's constructor, and fields of the model's config that shape it",
    "code_lines": "lines of this project that make the engine serve the model: code only, no comments or docstrings",
    "family_lines": "of all code, those that only this family needs",
}


def entry(
    engine: str, model: Path, checkpoint: Path, operator_calls: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    """One row: what `engine` takes to serve `model`, which was made of `checkpoint`. `about`: the engine's own words.

    Raises ConfigError for an engine that serves no checkpoint.
    """
    config = load_config(checkpoint)
    definitions: tuple[tuple[str, str | None], ...] = ()
    if config.encoder is not None:
        definitions += LATE_ONLY[engine]
    if config.num_experts:
        definitions += MOE_ONLY[engine]
    return {
        "family": config.family,
        "engine": engine,
        "build": ["nmm-serve export CHECKPOINT --onnx OUT"] if engine == "onnx" else [],
        "graphs": onnx_graphs(model) if engine == "onnx" else {"count": 0, "nodes": None},
        "compiled": [words for name, words in COMPILED.items() if about.get(name)],
        "operator_calls": operator_calls,
        "caches": caches(engine, config),
        "knobs": knobs(engine, config),
        "code_lines": sum(code_lines(module) for name in SOURCES[engine] for module in modules(name)),
        "family_lines": sum(code_lines(module, name) for module, name in definitions),
    }


def onnx_graphs(model: Path) -> dict[str, Any]:
    """Graphs of an exported model and their nodes: upper bounds of what one run calls."""
    try:
        import onnx
    except ImportError:
        raise NMMError("counting graph nodes needs the onnx package; pip install 'nmm-serve[onnx]'") from None
    nodes = {
        path.stem: len(onnx.load(path, load_external_data=False).graph.node) for path in sorted(model.glob("*.onnx"))
    }
    return {"count": len(nodes), "nodes": nodes}


def caches(engine: str, config: NMMConfig) -> dict[str, Any]:
    """Caches by name; `kv` in numbers a token, and in bytes where they are float32, as every engine has it on a CPU."""
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    found: dict[str, Any] = {"kv": {"numbers_per_token": kv, "float32_bytes_per_token": 4 * kv}}
    if engine == "vllm":
        found |= {
            "prefix": "blocks of keys and values of earlier prompts",
            "image": "patches of recent images",
            "encoder": "image tokens of images whose prompt is not computed yet",
        }
    return found


def knobs(engine: str, config: NMMConfig) -> dict[str, Any]:
    module, cls = ENGINES[engine].split(":")
    constructor = getattr(importlib.import_module(module), cls).__init__
    names = [
        name
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    model = len(_own_fields(NMMConfig)) - 1  # `vision_config` counts as what it holds
    if config.encoder is not None:
        model += len(_own_fields(NMMVisionConfig))
    return {"engine": names, "model_fields": model}


def _own_fields(cls: type) -> list[str]:
    return [name for name in cls.__annotations__ if not name.startswith("_")]


def modules(name: str) -> list[str]:
    """A module by itself, or a package with its modules."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    return [name, *(f"{name}.{found.name}" for found in pkgutil.iter_modules(spec.submodule_search_locations or ()))]


def code_lines(module: str, name: str | None = None) -> int:
    """Lines with code of a module, or of one class or function in it: comments, docstrings and blank lines left out."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(text)
    first, last = 1, len(text.splitlines())
    if name is not None:
        (node,) = [n for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == name]
        first, last = node.lineno, node.end_lineno or node.lineno
    documented: set[int] = set()
    for statement in ast.walk(tree):
        value = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            documented.update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len({line for line in lines - documented if first <= line <= last})
