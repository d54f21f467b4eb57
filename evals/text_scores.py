"""The scores of a text task: lm-eval's values, with intervals, and null with the reason where an item failed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nmm_serve.evals.stats import Interval, bootstrap, mean_interval, percentile_interval

RATES = {"bits_per_byte", "byte_perplexity", "word_perplexity"}


def scores(
    task: Any,
    aggregated: dict[str, Any],
    documents: Sequence[dict[str, Any]],
    kept: Sequence[dict[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Metrics with standard errors and intervals; null with the reason when an item failed, and then those of the
    items that did not fail apart."""
    metrics, stderr = {}, {}
    for key, value in aggregated.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or not isinstance(value, int | float | str):
            continue
        shown = metric if filter_name == "none" else key
        if metric.endswith("_stderr"):
            stderr[shown.replace("_stderr", "", 1)] = number(value)
        else:
            metrics[shown] = number(value)
    if len(kept) == len(documents):
        intervals = {shown: _interval(task, shown, kept, seed) for shown in metrics}
        return {"metrics": metrics, "stderr": stderr, "intervals": intervals}
    reason = (
        f"{len(documents) - len(kept)} of {len(documents)} items failed; a score over fewer items is not this task's "
        "score"
    )
    answered = {shown: _aggregate(task, shown, kept) for shown in metrics} if kept else None
    return {
        "metrics": dict.fromkeys(metrics),
        "stderr": dict.fromkeys(metrics),
        "intervals": dict.fromkeys(metrics),
        "reason": reason,
        "answered_only": None if answered is None else {"n": len(kept), "metrics": answered},
    }


def _values(shown: str, documents: Sequence[dict[str, Any]]) -> list[Any]:
    """What the documents contribute to a metric."""
    metric, _, filter_name = shown.partition(",")
    return [d[metric] for d in documents if d["filter"] == (filter_name or "none") and metric in d]


def _aggregate(task: Any, shown: str, documents: Sequence[dict[str, Any]]) -> float | None:
    aggregation = task.aggregation().get(shown.partition(",")[0])
    values = _values(shown, documents)
    return number(aggregation(values)) if aggregation and values else None


def _interval(task: Any, shown: str, documents: Sequence[dict[str, Any]], seed: int) -> dict[str, Any] | None:
    """Of means of numbers, of perplexities, which are exp(-mean), and of rates: sums of likelihoods over sums of sizes.
    Other metrics have none."""
    values = _values(shown, documents)
    aggregation = getattr(task.aggregation().get(shown.partition(",")[0]), "__name__", None)
    interval: Interval | None = None
    if shown in RATES and values:
        interval = _rate_interval(shown, np.array(values, dtype=float), seed)
    elif aggregation in ("mean", "perplexity") and values and all(map(_is_number, values)):
        interval = mean_interval(values, range(len(values)), seed=seed, unit="document")
        if interval is not None and aggregation == "perplexity":
            with np.errstate(over="ignore"):
                interval = replace(interval, low=float(np.exp(-interval.high)), high=float(np.exp(-interval.low)))
    if interval is None or not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return None
    return interval.as_dict()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _rate_interval(metric: str, values_N2: Any, seed: int) -> Interval | None:
    """values_N2: each document's log-likelihood in nats, and its size."""
    likelihood_N, size_N = values_N2.T

    def rate(counts_RN: Any) -> Any:
        nats_R = -(counts_RN @ likelihood_N) / (counts_RN @ size_N)
        return nats_R / math.log(2) if metric == "bits_per_byte" else np.exp(nats_R)

    return percentile_interval(bootstrap(rate, len(values_N2), seed=seed), len(values_N2), "document")


def number(value: Any) -> float | None:
    """A number as JSON has it; None for lm-eval's "N/A" and for what is not finite."""
    return float(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else None
