"""Models side by side: the same requests to each in turn (A-B-A-B), in one run, so that what the machine does meanwhile
meets all of them; differences as ratios of the same requests.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nmm_serve.checkpoint import checkpoint_hash, load_config
from nmm_serve.config import NMMConfig
from nmm_serve.engines.base import Output
from nmm_serve.errors import DataError, EngineError, NMMError
from nmm_serve.evals import stats
from nmm_serve.evals.annotations import read_json
from nmm_serve.evals.lab import ledger, resources
from nmm_serve.evals.lab.partners import Contender
from nmm_serve.evals.lab.worker import Worker
from nmm_serve.evals.lab.workload import Pictures, Workload
from nmm_serve.evals.latency import DEFINITIONS, UNSEEN, Load, summarise, tpot
from nmm_serve.evals.records import environment, without_password, write_text
from nmm_serve.sizing import count_params, forward_flops

FORMAT = "nmm-serve/latency-comparison/1"
ENGINES = ("torch", "vllm", "onnx")
SETTLE_S = 0.02
"""Between two models' turns: the threads of the one before go to sleep."""
TEXT_TOKENS = 64
RATIOS = ("ttft_s", "tpot_s", "e2e_s")
STATISTICS: dict[str, Callable[..., Any]] = {"p50": np.median, "mean": np.mean}

COMPARISON_DEFINITIONS = {
    "ratio": "statistic of the model's times / the same of the baseline's (the first model of the group) over the "
    "requests that both answered; above 1: the model is slower",
    "interval": "paired percentile bootstrap: whole rounds are drawn, the same ones for both models",
    "round": "every model in turn gets the same requests, one wave of `concurrency` of them",
    "startup_s": "from starting the engine's process to its being ready for requests, Python's own start included",
    "flops": f"matrix products of one forward pass over one full-size image and {TEXT_TOKENS} tokens of text",
    "random_weights": "the weights are random and every answer has a forced length: times and memory do not hang on "
    "what a model has learned, quality does",
    "operator_calls": "operators that one request makes torch call, views left out, nothing compiled: up to the first "
    "token, and for each further token",
}


@dataclass(frozen=True)
class Group:
    """Models that are compared with their first."""

    label: str
    contenders: tuple[Contender, ...]


class Answers(Protocol):
    """What interleaving needs of a model: `Worker` in a run, a fake in a test."""

    name: str

    def wave(self, workload: Workload, numbers: Sequence[int]) -> tuple[list[Output], float]: ...


@dataclass(frozen=True)
class Cell:
    varies: str | None
    concurrency: int
    workload: Workload


def cells(load: Load) -> list[Cell]:
    """The workload at every concurrency, then every shape of the sweep at the first."""
    return [
        *(Cell(None, concurrency, load.workload) for concurrency in load.concurrencies),
        *(Cell(name, load.concurrencies[0], shape) for name, shape in load.shapes()),
    ]


def interleave(
    models: Sequence[Answers],
    cell: Cell,
    load: Load,
    numbers: Iterator[int],
    *,
    seed: int = 0,
    reason: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Measure one cell: summaries of every model, and ratios to the first."""
    outputs: dict[str, list[Output]] = {model.name: [] for model in models}
    walls = dict.fromkeys(outputs, 0.0)
    warmup: dict[str, dict[str, Any]] = {name: {"requests": 0, "failed": 0, "first_e2e_s": None} for name in outputs}
    for round_ in range(-load.warmup, load.waves(cell.concurrency)):
        wave = [next(numbers) for _ in range(cell.concurrency)]
        for model in models:
            sleep(SETTLE_S)
            found, wall_s = model.wave(cell.workload, wave)
            if round_ < 0:
                if not warmup[model.name]["requests"]:
                    warmup[model.name]["first_e2e_s"] = found[0].timing.e2e_s
                warmup[model.name]["requests"] += len(found)
                warmup[model.name]["failed"] += sum(output.error is not None for output in found)
            else:
                outputs[model.name] += found
                walls[model.name] += wall_s
            progress(len(found))
    first = models[0].name
    results = [
        {
            "model": name,
            "warmup": warmup[name],
            **summarise(outputs[name], walls[name], cell.workload.output_tokens, seed, slo=load.slo, reason=reason),
        }
        for name in outputs
    ]
    ratios = [
        ratio
        for name in outputs
        if name != first
        for ratio in _ratios(name, outputs[name], first, outputs[first], cell.concurrency, seed)
    ]
    return {
        "varies": cell.varies,
        "concurrency": cell.concurrency,
        "workload": cell.workload.as_dict(),
        "results": results,
        "ratios": ratios,
    }


def _ratios(
    name: str, theirs: Sequence[Output], baseline: str, ours: Sequence[Output], concurrency: int, seed: int
) -> Iterator[dict[str, Any]]:
    for metric in RATIOS:
        pairs = [
            (a, b, position // concurrency)
            for position, (a, b) in enumerate(zip(map(_time(metric), theirs), map(_time(metric), ours), strict=True))
            if a is not None and b is not None
        ]
        common = {"model": name, "baseline": baseline, "metric": metric, "pairs": len(pairs), "of": len(theirs)}
        for statistic, function in STATISTICS.items():
            if not pairs:
                yield common | {"statistic": statistic, "ratio": None, "reason": "no request that both answered"}
                continue
            a_N, b_N, rounds = (list(column) for column in zip(*pairs, strict=True))
            ratio, interval = stats.paired_ratio(a_N, b_N, rounds, statistic=function, seed=seed)
            yield common | {
                "statistic": statistic,
                "ratio": ratio,
                "interval": None if interval is None else interval.as_dict(),
            }


def _time(metric: str) -> Callable[[Output], float | None]:
    def read(output: Output) -> float | None:
        if output.error is not None:
            return None
        return tpot(output) if metric == "tpot_s" else getattr(output.timing, metric)

    return read


def contenders(paths: Sequence[Path]) -> tuple[Contender, ...]:
    """Checkpoints as contenders, by the names of their folders. Raises DataError when two have one name."""
    names = [path.resolve().name for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two of the models are called {name!r}; rename one of the folders")
    return tuple(Contender(name, None, path, False) for name, path in zip(names, paths, strict=True))


def ledger_row(contender: Contender, engine: str, folder: Path) -> dict[str, Any]:
    """The ledger of one checkpoint and engine, with what a short run of it measures."""
    model, export_s = for_engine(contender.path, engine, folder)
    load = Load(concurrencies=(1,), requests=1, warmup=0, output_tokens=1)
    worker = Worker(contender.name, str(model), engine, settings(engine, load))
    try:
        calls = worker.operator_calls(load.workload, 0)
        row = {"model": contender.name, **ledger.entry(engine, model, contender.path, calls)}
        return row | {
            "startup_s": worker.startup_s,
            "export_s": export_s,
            "artefact": resources.artefact(str(model)),
            "memory": worker.memory(),
        }
    finally:
        worker.close()


def check_equal(contenders: Sequence[Contender]) -> None:
    """Raise DataError for models that differ in tokenizer or image tokens: their requests would not be the same."""
    first = contenders[0]
    for other in contenders[1:]:
        for what, read in (("tokenizer", _tokenizer), ("image size and patch size", _image_tokens)):
            if read(first.path) != read(other.path):
                raise DataError(
                    f"{first.path} and {other.path} differ in {what}; a comparison of latency needs the same requests"
                )


def _tokenizer(path: Path) -> str:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{path} lacks tokenizer.json; expected a checkpoint")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _image_tokens(path: Path) -> tuple[int, int]:
    config = load_config(path)
    return config.image_size, config.patch_size


def describe(group: Group) -> list[dict[str, Any]]:
    """What each model is, and how its size relates to the first by every yardstick."""
    rows = []
    configs = [load_config(contender.path) for contender in group.contenders]
    for contender, config in zip(group.contenders, configs, strict=True):
        sizes, first = yardsticks(config), yardsticks(configs[0])
        rows.append(
            {
                "name": contender.name,
                "family": config.family,
                "match": contender.match,
                "random_weights": contender.random_weights,
                "hash": checkpoint_hash(contender.path),
                "sizes": sizes,
                "relative": {name: sizes[name] / first[name] for name in ("total", "flops", "decoder")},
                "shape": {
                    name: getattr(config, name)
                    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_experts")
                }
                | {
                    "vision": config.encoder
                    and {
                        "hidden_size": config.encoder.hidden_size,
                        "num_hidden_layers": config.encoder.num_hidden_layers,
                        "intermediate_size": config.encoder.intermediate_size,
                    }
                },
            }
        )
    return rows


def yardsticks(config: NMMConfig) -> dict[str, int]:
    """Parameters by place, and FLOPs of one forward pass."""
    counts, patches = count_params(config), config.max_image_tokens
    return {
        "total": counts.total,
        "active": counts.active,
        "decoder": counts.decoder,
        "vision": counts.vision,
        "flops": forward_flops(config, [patches], [patches + TEXT_TOKENS]),
    }


def settings(engine: str, load: Load) -> dict[str, Any]:
    """Engine options of a fair comparison: room for every request, no cache across requests, the encoder compiled."""
    at_once = max(load.concurrencies)
    return {
        "torch": {"batch_size": at_once, "compile_encoder": True},
        "vllm": {"max_num_seqs": at_once, "prefix_caching": False, "image_cache": False},
        "onnx": {"batch_size": at_once},
    }[engine]


def compare(
    groups: Sequence[Group],
    engines: Sequence[str],
    load: Load,
    out: Path,
    folder: Path,
    *,
    files: Sequence[Path] = (),
    seed: int = 0,
    start_task: Callable[[str, int], Callable[[int], None]] = lambda _name, _total: lambda _: None,
) -> dict[str, Any]:
    """Measure every group with every engine and keep the document at `out` up to date after each.

    An engine that fails for a group is named under `failures`, and the others go on. `folder` takes exported models.
    """
    for group in groups:
        check_equal(group.contenders)
    document: dict[str, Any] = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *map(without_password, sys.argv[1:])],
        "seed": seed,
        "final": False,
        "environment": environment(),
        "definitions": DEFINITIONS | COMPARISON_DEFINITIONS,
        "images": Pictures(files, seed).describe(),
        "warmup_waves": load.warmup,
        "slo_s": dict(load.slo),
        "groups": [{"label": group.label, "models": describe(group)} for group in groups],
        "runs": [],
        "failures": [],
    }
    plan = cells(load)
    for group in groups:
        for engine in engines:
            requests = sum(cell.concurrency * (load.warmup + load.waves(cell.concurrency)) for cell in plan)
            progress = start_task(f"{group.label} {engine}", requests * len(group.contenders))
            try:
                document["runs"].append(_run(group, engine, plan, load, folder, files, seed, progress))
            except NMMError as error:
                document["failures"].append({"group": group.label, "engine": engine, "error": str(error)})
            _keep(document, out)
    document["final"] = True
    _keep(document, out)
    return document


def _run(
    group: Group,
    engine: str,
    plan: Sequence[Cell],
    load: Load,
    folder: Path,
    files: Sequence[Path],
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    numbers = iter(range(10**9))
    workers: list[Worker] = []
    with ExitStack() as stack:
        exports = {}
        for contender in group.contenders:
            model, exports[contender.name] = for_engine(contender.path, engine, folder / group.label)
            worker = Worker(contender.name, str(model), engine, settings(engine, load), files=files, seed=seed)
            stack.callback(worker.close)
            workers.append(worker)
        measured = [
            interleave(workers, cell, load, numbers, seed=seed, reason=UNSEEN.get(engine), progress=progress)
            for cell in plan
        ]
        costs = []
        for contender, worker in zip(group.contenders, workers, strict=True):
            memory = worker.memory()
            costs.append(
                {
                    "model": contender.name,
                    "settings": worker.about,
                    "startup_s": worker.startup_s,
                    "export_s": exports[contender.name],
                    "memory": memory,
                    "artefact": resources.artefact(worker.model),
                    "ledger": ledger.entry(
                        engine, Path(worker.model), contender.path, worker.operator_calls(load.workload, next(numbers))
                    ),
                }
            )
            next(numbers), next(numbers)  # operator calls were counted on these
    return {"group": group.label, "engine": engine, "models": costs, "cells": measured}


def for_engine(checkpoint: Path, engine: str, folder: Path) -> tuple[Path, float | None]:
    """The directory that an engine opens: for ONNX Runtime an export, and the seconds it took.

    Raises EngineError for an engine that cannot be compared in a process of its own.
    """
    if engine not in ENGINES:
        raise EngineError(f"engine {engine!r} is not started from a checkpoint; compare {', '.join(ENGINES)}")
    if engine != "onnx":
        return checkpoint, None
    from nmm_serve.onnx.export import export

    out = folder / f"{checkpoint.resolve().name}-onnx"
    out.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    export(checkpoint, out)
    return out, time.perf_counter() - begin


def _keep(document: dict[str, Any], out: Path) -> None:
    write_text(out, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def load_comparison(path: Path) -> dict[str, Any]:
    """Read a comparison. Raises DataError for a file that is none."""
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path} is not a comparison of latency; `nmm-eval latency --compare -o` writes them")
    absent = [key for key in ("environment", "groups", "runs", "failures", "final") if key not in document]
    if absent:
        raise DataError(f"{path} is damaged: it lacks {', '.join(absent)}; run the comparison again")
    return document


def failed(document: dict[str, Any]) -> list[str]:
    """One line per engine that failed and per cell with failed requests."""
    lines = [f"{f['group']} {f['engine']}: {f['error']}" for f in document["failures"]]
    for run in document["runs"]:
        for cell in run["cells"]:
            for result in cell["results"]:
                if result["failed"]:
                    lines.append(
                        f"{run['group']} {run['engine']} {result['model']}: {result['failed']} of {result['n']} "
                        "requests: " + "; ".join(result["errors"])
                    )
    return lines
