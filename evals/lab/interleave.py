"""One cell of a comparison: the same requests to each model in turn (A-B-A-B), so that what the machine does meanwhile
meets all of them; differences as ratios of the same requests."""

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nmm_serve.engines.base import Output
from nmm_serve.errors import NMMError
from nmm_serve.evals import stats
from nmm_serve.evals.lab.workload import Workload
from nmm_serve.evals.latency import Load, summarise, tpot

SETTLE_S = 0.02
"""Between two models' turns: the threads of the one before go to sleep."""
RATIOS = ("ttft_s", "tpot_s", "e2e_s")
STATISTICS: dict[str, Callable[..., Any]] = {"p50": np.median, "mean": np.mean}


class Answers(Protocol):
    """What interleaving needs of a model: `Worker` in a run, a fake in a test."""

    name: str

    def wave(self, workload: Workload, numbers: Sequence[int]) -> tuple[list[Output], float]: ...


@dataclass(frozen=True)
class Cell:
    varies: str | None
    concurrency: int
    workload: Workload

    def requests(self, load: Load) -> int:
        """Of each model, warm-up included."""
        return self.concurrency * (load.warmup + load.waves(self.concurrency))


def cells(load: Load, image_size: int) -> list[Cell]:
    """The workload at every concurrency, then every shape of the sweep at the first. Scaling images to `image_size`,
    which is the models' own, changes nothing and is no second cell."""
    plan = [Cell(None, concurrency, load.workload) for concurrency in load.concurrencies]
    for name, shape in load.shapes():
        if name != "resolution" or shape.resolution != image_size:
            plan.append(Cell(name, load.concurrencies[0], shape))
    return plan


def interleave(
    models: Sequence[Answers],
    cell: Cell,
    load: Load,
    numbers: Iterator[int],
    *,
    baseline: str,
    image_size: int,
    seed: int = 0,
    reason: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Measure one cell: summaries of every model, and ratios to `baseline`.

    A model that breaks off is left out of the results and named under `failures`; the others go on.
    """
    outputs: dict[str, list[Output]] = {model.name: [] for model in models}
    walls = dict.fromkeys(outputs, 0.0)
    warmup: dict[str, dict[str, Any]] = {name: {"requests": 0, "failed": 0, "first_e2e_s": None} for name in outputs}
    failures: list[dict[str, str]] = []
    for round_ in range(-load.warmup, load.waves(cell.concurrency)):
        wave = cell.workload.take(numbers, cell.concurrency)
        for model in models:
            progress(len(wave))
            if model.name not in outputs:
                continue
            sleep(SETTLE_S)
            try:
                found, wall_s = model.wave(cell.workload, wave)
            except NMMError as error:
                failures.append({"model": model.name, "error": str(error)})
                del outputs[model.name]
                continue
            if round_ < 0:
                if not warmup[model.name]["requests"]:
                    warmup[model.name]["first_e2e_s"] = found[0].timing.e2e_s
                warmup[model.name]["requests"] += len(found)
                warmup[model.name]["failed"] += sum(output.error is not None for output in found)
            else:
                outputs[model.name] += found
                walls[model.name] += wall_s
    results = [
        {
            "model": name,
            "warmup": warmup[name],
            **summarise(
                outputs[name],
                walls[name],
                cell.workload.output_tokens,
                seed,
                wave=cell.concurrency,
                slo=load.slo,
                reason=reason,
            ),
        }
        for name in outputs
    ]
    return {
        "varies": cell.varies,
        "concurrency": cell.concurrency,
        "resolution": cell.workload.resolution or image_size,
        "workload": cell.workload.as_dict(),
        "results": results,
        "ratios": [
            ratio
            for name in outputs
            if name != baseline and baseline in outputs
            for metric in RATIOS
            for ratio in ratios(
                {"model": name, "baseline": baseline, "metric": metric},
                [_time(output, metric) for output in outputs[name]],
                [_time(output, metric) for output in outputs[baseline]],
                [position // cell.concurrency for position in range(len(outputs[name]))],
                seed,
            )
        ],
        "failures": failures,
    }


def ratios(
    names: dict[str, str],
    theirs: Sequence[float | None],
    ours: Sequence[float | None],
    rounds: Sequence[Hashable],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Ratios of medians and of means, over the pairs that both have."""
    pairs = [
        (a, b, round_) for a, b, round_ in zip(theirs, ours, rounds, strict=True) if a is not None and b is not None
    ]
    common = names | {"pairs": len(pairs), "of": len(theirs)}
    for statistic, function in STATISTICS.items():
        if not pairs:
            yield common | {"statistic": statistic, "ratio": None, "reason": "no request that both answered"}
            continue
        a_N, b_N, rounds_N = (list(column) for column in zip(*pairs, strict=True))
        ratio, interval = stats.paired_ratio(a_N, b_N, rounds_N, statistic=function, seed=seed)
        yield common | {
            "statistic": statistic,
            "ratio": ratio,
            "interval": None if interval is None else interval.as_dict(),
        }


def _time(output: Output, metric: str) -> float | None:
    if output.error is not None:
        return None
    return tpot(output) if metric == "tpot_s" else getattr(output.timing, metric)
