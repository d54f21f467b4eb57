"""What records can be compared by: each quantity of every model, with how to compute it anew on a draw.

Shape suffixes: R resamples, C clusters (images or waves of requests), N items.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmm_serve.errors import DataError
from nmm_serve.evals import caption, stats
from nmm_serve.evals.cider import CiderResampler
from nmm_serve.evals.records import Record

Statistic = Callable[[stats.Array], stats.Array]
"""Maps counts_RC to values_R."""


@dataclass(frozen=True)
class Measure:
    """One quantity of every model, and how to compute it on a draw. `paired`: one draw serves all models; `centred`:
    the drawing itself moves it (`stats.centred`)."""

    name: str
    statistics: tuple[Statistic, ...]
    clusters: tuple[int, ...]
    n: int
    higher_is_better: bool = True
    paired: bool = True
    centred: bool = False
    unit: str = "image"
    """What a cluster is."""


def _aligned(
    task: str, items: Sequence[Sequence[dict[str, Any]]], key: str, same: str, names: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """The items of every record in the order of the first. Raises DataError when ids or `same` differ."""
    order = [item[key] for item in items[0]]
    by_id = [{item[key]: item for item in record_items} for record_items in items]
    for name, table in zip(names, by_id, strict=True):
        for item_id in order:
            if item_id not in table or table[item_id][same] != by_id[0][item_id][same]:
                raise DataError(
                    f"{names[0]} and {name} ran {task} on different items ({key} {item_id!r}); evaluate both anew"
                )
    return [[table[item_id] for item_id in order] for table in by_id]


def vqa_measures(
    records: Sequence[Record], items: Sequence[Sequence[dict[str, Any]]], left_out: dict[str, str]
) -> list[Measure]:
    names = [record["model"]["name"] for record in records]
    aligned = _aligned("vqa", items, "question_id", "answers", names)
    index_N, images = stats.cluster_index([item["image_id"] for item in aligned[0]])
    measures = []
    for name, key, scale in (
        ("VQA accuracy %", "accuracy", 1.0),
        ("VQA exact match %", "exact_match", 100.0),
        ("VQA relaxed accuracy %", "relaxed_match", 100.0),
    ):
        if any(key not in item for record_items in aligned for item in record_items):
            left_out[name] = "an older version wrote one of the records; evaluate anew"
            continue
        statistics = tuple(
            stats.mean_statistic([scale * item[key] for item in record_items], index_N, images)
            for record_items in aligned
        )
        measures.append(Measure(name, statistics, (images,) * len(names), len(aligned[0])))
    return measures


def caption_measures(
    records: Sequence[Record], items: Sequence[Sequence[dict[str, Any]]], left_out: dict[str, str]
) -> list[Measure]:
    names = [record["model"]["name"] for record in records]
    aligned = _aligned("caption", items, "image_id", "references", names)
    images = len(aligned[0])
    measures: list[Measure] = []

    def add(name: str, statistics: Sequence[Statistic], centred: bool = False) -> None:
        measures.append(Measure(name, tuple(statistics), (images,) * len(names), images, centred=centred))

    if any(item.get("tokens") is None for record_items in aligned for item in record_items):
        left_out["BLEU, CIDEr"] = "an older version wrote one of the records, without tokens; evaluate anew"
    else:
        tokens = [[item["tokens"] for item in record_items] for record_items in aligned]
        references = [t["references"] for t in tokens[0]]
        for name, record_tokens in zip(names, tokens, strict=True):
            if [t["references"] for t in record_tokens] != references:
                raise DataError(
                    f"the captions of {names[0]} and {name} were cut into tokens differently; evaluate both with Java, "
                    "or both without"
                )
        hypotheses = [[t["prediction"] for t in record_tokens] for record_tokens in tokens]
        bleu = [caption.bleu_statistic(texts, references) for texts in hypotheses]
        for order, name in enumerate(caption.BLEU):
            add(name, [_column(statistic, order) for statistic in bleu])
        add("CIDEr", [CiderResampler(texts, references).scores for texts in hypotheses], centred=True)
    for name in ("ROUGE_L", "METEOR", "SPICE"):
        having = [all(name in item["scores"] for item in record_items) for record_items in aligned]
        if all(having):
            values = [[item["scores"][name] for item in record_items] for record_items in aligned]
            add(name, [stats.mean_statistic(v, np.arange(images), images) for v in values])
        elif any(having):
            left_out[name] = f"{', '.join(n for n, has in zip(names, having, strict=True) if not has)} has none"
    return measures


def _column(statistic: Statistic, column: int) -> Statistic:
    return lambda counts_RC: statistic(counts_RC)[:, column]


def latency_measures(
    records: Sequence[Record], _items: Sequence[Sequence[dict[str, Any]]], left_out: dict[str, str]
) -> list[Measure]:
    environments = [record["environment"] for record in records]
    if len({str((e["cpu"], e["cpu_count"], e["gpus"])) for e in environments}) > 1:
        left_out["latency"] = "the records were made on different machines"
        return []
    sections = [record["tasks"]["latency"] for record in records]
    if len({(section["output_tokens"], section["prompt"], section.get("images")) for section in sections}) > 1:
        left_out["latency"] = (
            "the records asked for different numbers of tokens, with different prompts, or about different pictures"
        )
        return []
    levels = [{level["concurrency"]: level for level in section["levels"]} for section in sections]
    shared = sorted(set.intersection(*map(set, levels)))
    if not shared:
        left_out["latency"] = "the records have no concurrency in common"
    measures = []
    for concurrency in shared:
        for key, title in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "E2E")):
            values = [level[concurrency][key].get("values") for level in levels]
            name = f"{title} ms at {concurrency}"
            if any(not v for v in values):
                left_out[name] = "not every record holds the single times"
                continue
            waves = [_waves(level[concurrency], key) for level in levels]
            if any(w is None for w in waves):
                left_out[name] = "an older version wrote one of the records, without the waves; measure anew"
                continue
            clusters = [stats.cluster_index(w or ()) for w in waves]
            measures.append(
                Measure(
                    name,
                    tuple(
                        median_statistic([1000 * x for x in v], index_N)
                        for v, (index_N, _) in zip(values, clusters, strict=True)
                    ),
                    tuple(count for _, count in clusters),
                    min(len(v) for v in values),
                    higher_is_better=False,
                    paired=False,
                    unit="request" if concurrency == 1 else "wave",
                )
            )
    return measures


def _waves(level: Mapping[str, Any], key: str) -> list[int] | None:
    """The wave of each single time. Older records do not tell, but where every request has its time they are in order
    (nothing failed in a record that gets here)."""
    found, concurrency = level[key], level["concurrency"]
    if "waves" in found:
        return list(found["waves"])
    count = len(found["values"])
    return [position // concurrency for position in range(count)] if count == level["n"] else None


def median_statistic(values: Sequence[float], index_N: stats.Array) -> Statistic:
    """Median of what was drawn: the mean of the two middle values, as numpy's. `index_N` tells each value's cluster."""
    order_N = np.argsort(np.asarray(values, dtype=float), kind="stable")
    sorted_N = np.asarray(values, dtype=float)[order_N]
    cluster_N = index_N[order_N]

    def statistic(counts_RC: stats.Array) -> stats.Array:
        upto_RN = np.cumsum(counts_RC[:, cluster_N], axis=1)
        drawn_R1 = upto_RN[:, -1:]
        low_R = (upto_RN > (drawn_R1 - 1) // 2).argmax(axis=1)
        high_R = (upto_RN > drawn_R1 // 2).argmax(axis=1)
        return (sorted_N[low_R] + sorted_N[high_R]) / 2

    return statistic
