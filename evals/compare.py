"""Compare models by their records: paired tests over the same items, intervals, effect sizes, and a careful ranking.

Whole images are drawn with replacement, the same ones for every model, and each metric is computed anew on every draw:
CIDEr and BLEU are no means over images, so averaging their per-image scores would test another quantity. Times are
compared unpaired, since no two runs serve the same moment.

Shape suffixes: R resamples, C clusters (images or waves of requests), N items, M models.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nmm_serve.errors import DataError
from nmm_serve.evals import stats
from nmm_serve.evals.measures import Measure, caption_measures, latency_measures, vqa_measures
from nmm_serve.evals.records import Record, load_items, load_record, tell_apart

FORMAT = "nmm-serve/comparison/1"
SIGNIFICANCE = 0.05
FEW_CLUSTERS = 30
"""With fewer the bootstrap's p-values are too small: at 10 images one in ten differences of equal models looks real."""
RESAMPLES_PER_PAIR = 200
"""At least so many, or Holm's correction could never call a difference real among many models."""

DEFINITIONS = {
    "difference": "score of a minus score of b on the same items",
    "interval": (
        "95 % percentile bootstrap interval, drawing whole images, the same for both models; for CIDEr, which drawing "
        "an image twice lowers, moved by the bootstrap's own bias"
    ),
    "p_value": "two-sided: twice the smaller share of resampled differences on one side of zero; not below 2/(R+1)",
    "p_holm": "p_value after Holm's correction over all pairs of this metric",
    "effect_size": (
        "difference / (bootstrap standard error x sqrt(images)); for a mean this is the mean difference in standard "
        "deviations of the per-image differences (Cohen's d for pairs)"
    ),
    "rank": (
        "1 + the number of models that are better with p_holm < 0.05, to the number of models - those that are worse; "
        "a range says that the order inside it cannot be told"
    ),
    "times": (
        "medians; for each model by itself, whole waves are drawn, since their requests wait for each other; "
        "images above read waves (requests, where a wave is one)"
    ),
    "METEOR": "mean over images of METEOR 1.5, not the corpus score, which only Java can resample",
}


def compare(
    paths: Sequence[Path], *, seed: int = 0, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> dict[str, Any]:
    """Compare the records at `paths`, two or more, and return one JSON document.

    What only some records hold, or what has failed items, stands under `left_out` with the reason.

    Raises DataError when there are fewer than two records, when a task was run on different data or items, or when
    nothing is left to compare.
    """
    if len(paths) < 2:
        raise DataError(f"there is nothing to compare with {len(paths)} record; give two or more")
    records = [load_record(path) for path in paths]
    tell_apart(records)
    names = [record["model"]["name"] for record in records]
    left_out: dict[str, str] = {}
    measures: list[Measure] = []
    for task, build in (("vqa", vqa_measures), ("caption", caption_measures), ("latency", latency_measures)):
        reason = _unusable(task, records)
        if reason is not None:
            left_out[task] = reason
            continue
        items: list[list[dict[str, Any]]] = []
        if task != "latency":
            _check_same_data(task, records)
            items = [
                [item for item in load_items(path, record) if item["task"] == task]
                for path, record in zip(paths, records, strict=True)
            ]
        measures += build(records, items, left_out)
    left_out = {name: reason for name, reason in left_out.items() if reason}
    if not measures:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in left_out.items())
        raise DataError(
            f"these records cannot be compared: {reasons or 'none holds vqa, caption or latency'}. "
            "Give records that all hold one of these tasks whole: those of one task at a time, or of `nmm-eval all`"
        )
    pairs = len(names) * (len(names) - 1) // 2
    resamples = max(stats.RESAMPLES, RESAMPLES_PER_PAIR * pairs)
    metrics = {}
    for done, measure in enumerate(measures):
        progress(done, len(measures))
        metrics[measure.name] = _judge(measure, names, resamples, seed)
    progress(len(measures), len(measures))
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "resamples": resamples,
        "level": stats.LEVEL,
        "definitions": DEFINITIONS,
        "models": [
            {"name": name, "record": str(path), "hash": record["model"]["hash"], "engine": record["engine"]["name"]}
            for name, path, record in zip(names, paths, records, strict=True)
        ],
        "metrics": metrics,
        "left_out": left_out,
        "remarks": _remarks(metrics),
        "final": all(record["final"] for record in records),
    }


def _remarks(metrics: Mapping[str, Any]) -> list[str]:
    few = {name: found["clusters"] for name, found in metrics.items() if 1 < found["clusters"] < FEW_CLUSTERS}
    units = " and ".join(dict.fromkeys(f"{n} {metrics[name]['unit']}s" for name, n in few.items()))
    if not few:
        return []
    return [
        f"{', '.join(few)}: only {units} were drawn; with fewer than {FEW_CLUSTERS} the p-values are too small and the "
        "intervals too narrow"
    ]


def _unusable(task: str, records: Sequence[Record]) -> str | None:
    """Why a task cannot be compared, "" when no record has it, None when it can."""
    having = [record for record in records if task in record["tasks"]]
    if not having:
        return ""
    if len(having) < len(records):
        lacking = [record["model"]["name"] for record in records if task not in record["tasks"]]
        return f"{', '.join(lacking)} did not run it"
    for record in records:
        if record["tasks"][task].get("failed"):
            section = record["tasks"][task]
            return f"{section['failed']} of {section['n']} items of {record['model']['name']} failed"
    return None


def _check_same_data(task: str, records: Sequence[Record]) -> None:
    def data(record: Record) -> dict[str, Any]:
        section = record["tasks"][task]
        found = section["data"]
        return {
            "annotation files": sorted(found["files"].values()),
            "numbers of items (--limit)": section["n"],
            "images": found["images"],
            "bytes of images": found["image_bytes"],
        }

    first = records[0]
    for record in records[1:]:
        for what, value in data(first).items():
            if data(record)[what] != value:
                raise DataError(
                    f"{first['model']['name']} and {record['model']['name']} ran {task} on different data ({what} "
                    "differ); evaluate both on the same split"
                )


def _judge(measure: Measure, names: Sequence[str], resamples: int, seed: int) -> dict[str, Any]:
    """Scores, pairwise tests and ranking of one measure."""
    unit = measure.unit
    values = [
        float(statistic(np.ones((1, clusters), dtype=np.int64))[0])
        for statistic, clusters in zip(measure.statistics, measure.clusters, strict=True)
    ]
    drawn_MR = [
        stats.bootstrap(statistic, clusters, resamples, seed if measure.paired else seed + position)
        for position, (statistic, clusters) in enumerate(zip(measure.statistics, measure.clusters, strict=True))
    ]
    if measure.centred:
        drawn_MR = [stats.centred(drawn_R, value) for drawn_R, value in zip(drawn_MR, values, strict=True)]
    scores = {
        name: {"value": value, "interval": _as_dict(stats.percentile_interval(drawn_R, clusters, unit))}
        for name, value, drawn_R, clusters in zip(names, values, drawn_MR, measure.clusters, strict=True)
    }
    pairs: list[dict[str, Any]] = []
    for a, b in itertools.combinations(range(len(names)), 2):
        clusters = min(measure.clusters[a], measure.clusters[b])
        deltas_R = drawn_MR[a] - drawn_MR[b]
        testable = clusters > 1
        spread = float(deltas_R.std()) * math.sqrt(clusters)
        difference = values[a] - values[b]
        pairs.append(
            {
                "a": names[a],
                "b": names[b],
                "difference": difference,
                "interval": _as_dict(stats.percentile_interval(deltas_R, clusters, unit)),
                "p_value": stats.sign_p_value(deltas_R) if testable else None,
                "effect_size": difference / spread if testable and spread > 0 else None,
            }
        )
    for pair, p_holm in zip(pairs, stats.holm([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_holm"] = p_holm
        pair["better"] = _better(pair, measure.higher_is_better)
    ranking = _ranking(names, values, pairs, measure.higher_is_better)
    return {
        "higher_is_better": measure.higher_is_better,
        "n": measure.n,
        "clusters": min(measure.clusters),
        "unit": unit,
        "paired": measure.paired,
        "scores": scores,
        "pairs": pairs,
        "ranking": ranking,
        "conclusion": _conclusion(ranking, pairs),
    }


def _better(pair: Mapping[str, Any], higher_is_better: bool) -> str | None:
    """The better model of a pair; None when the data cannot tell."""
    if pair["p_holm"] is None or pair["p_holm"] >= SIGNIFICANCE:
        return None
    return str(pair["a"] if (pair["difference"] > 0) == higher_is_better else pair["b"])


def _ranking(
    names: Sequence[str], values: Sequence[float], pairs: Sequence[Mapping[str, Any]], higher_is_better: bool
) -> list[dict[str, Any]]:
    rows = []
    for name, value in sorted(zip(names, values, strict=True), key=lambda row: -row[1] if higher_is_better else row[1]):
        own = [pair for pair in pairs if name in (pair["a"], pair["b"]) and pair["better"] is not None]
        worse_than = sum(pair["better"] != name for pair in own)
        rows.append({"model": name, "value": value, "rank": [1 + worse_than, len(names) - (len(own) - worse_than)]})
    return rows


def _conclusion(ranking: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    """Only a model that is better than every other one is called the best."""
    leader = ranking[0]["model"]
    beaten = {pair["b"] if pair["better"] == pair["a"] else pair["a"] for pair in pairs if pair["better"] == leader}
    rivals = [row["model"] for row in ranking[1:] if row["model"] not in beaten]
    if not rivals:
        return f"{leader} is best"
    return f"cannot tell which of {', '.join([leader, *rivals])} is best"


def _as_dict(interval: stats.Interval | None) -> dict[str, Any] | None:
    return None if interval is None else interval.as_dict()
