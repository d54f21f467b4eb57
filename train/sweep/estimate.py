"""What a sweep will cost, before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass

from nmm_serve.processor import NMMProcessor
from nmm_serve.sizing import ParamCounts, count_params
from nmm_serve.train.build import model_config
from nmm_serve.train.sweep.plan import Plan, Run


@dataclass(frozen=True)
class Estimate:
    """FLOPs by 6ND with every position a token that all active parameters see: an upper bound for late fusion."""

    runs: int
    trunks: int
    flops: float
    flops_alone: float
    """Of the same budgets trained each from scratch."""
    seconds: float
    """At `rate` FLOP/s a worker and the plan's assumed utilisation."""
    disk: int
    """Bytes of the checkpoints kept: weights, and weights with two moments where branches start."""
    smallest: ParamCounts
    largest: ParamCounts


def run_flops(run: Run, counts: ParamCounts) -> float:
    """Training FLOPs of the steps that this run makes itself."""
    config = run.config
    return 6.0 * counts.active * run.own_steps * config.rows * config.accumulate * config.context_length


def count_all(runs: Sequence[Run], processor: NMMProcessor) -> dict[str, ParamCounts]:
    """Parameters of each run, by its name; models are sized, not built."""
    return {run.name: count_params(model_config(run.config, processor)) for run in runs}


def estimate(plan: Plan, runs: Sequence[Run], counts: dict[str, ParamCounts], rate: float) -> Estimate:
    flops = {run.name: run_flops(run, counts[run.name]) for run in runs}
    branches = [run for run in runs if run.trunk is not None]
    alone = sum(flops[run.name] * run.config.steps / run.own_steps for run in branches)
    total = sum(flops.values())
    disk = sum(4 * counts[r.name].total * (1 + 3 * len(r.config.save_at)) for r in runs)
    ordered = sorted(counts.values(), key=lambda c: c.active)
    return Estimate(
        runs=len(branches), trunks=len(runs) - len(branches), flops=total, flops_alone=alone,
        seconds=total / (plan.utilisation * rate * plan.workers), disk=disk, smallest=ordered[0], largest=ordered[-1],
    )  # fmt: skip
