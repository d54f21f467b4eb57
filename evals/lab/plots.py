"""Plots of a comparison of latency as SVG; None where there is nothing to draw."""

from collections.abc import Sequence
from typing import Any

from nmm_serve.evals.lab.tables import PARTS, cell_name, ratio_of
from nmm_serve.evals.plots import colour, drawing, legend_above, span
from nmm_serve.evals.records import Record

METRICS = (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "end to end"))


def ratios(document: dict[str, Any]) -> str | None:
    """For every engine, group and cell the ratios of medians to the first model, a panel for each metric."""
    rows = [
        (run, cell, result["model"])
        for run in document["runs"]
        for cell in run["cells"]
        for result in cell["results"][1:]
    ]
    if not rows:
        return None
    engines = sorted({run["engine"] for run, _, _ in rows})
    with drawing("latency-ratios", 10.5, 1.0 + 0.21 * len(rows), columns=len(METRICS)) as (drawn, panels):
        for axes, (metric, title) in zip(panels, METRICS, strict=True):
            for position, (run, cell, model) in enumerate(rows):
                ratio = ratio_of(cell, model, metric)
                if ratio is None or ratio["ratio"] is None:
                    continue
                low, high = span(ratio["ratio"], ratio["interval"])
                index = engines.index(run["engine"])
                axes.errorbar(
                    ratio["ratio"], position, xerr=[[low], [high]], fmt="o", ms=4, elinewidth=1, color=colour(index),
                    label=run["engine"] if position == _first(rows, run["engine"]) else None,
                )  # fmt: skip
            axes.axvline(1.0, color="#111", lw=1)
            axes.set_title(f"{title}, times the first model's", fontsize=10)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            names = [f"{run['group']} {run['engine']} {cell_name(cell)} {model}" for run, cell, model in rows]
            axes.set_yticks(range(len(rows)), names if axes is panels[0] else [""] * len(rows), fontsize=7)
        legend_above(drawn, panels[0])
    return drawn.svg


def _first(rows: Sequence[tuple[dict[str, Any], Any, Any]], engine: str) -> int:
    return next(i for i, (run, _, _) in enumerate(rows) if run["engine"] == engine)


def parts(document: dict[str, Any]) -> str | None:
    """Medians of the parts stacked, for the first cell of each run whose engine tells them."""
    bars = []
    for run in document["runs"]:
        for result in run["cells"][0]["results"]:
            medians = [result["parts"][name].get("p50") for name in PARTS]
            if None not in medians:
                bars.append((f"{run['group']} {run['engine']} {result['model']}", [1000 * m for m in medians]))
    if not bars:
        return None
    with drawing("latency-parts", 9.5, 1.0 + 0.3 * len(bars)) as (drawn, axes):
        lefts = [0.0] * len(bars)
        for index, name in enumerate(PARTS):
            widths = [max(0.0, medians[index]) for _, medians in bars]
            axes.barh(range(len(bars)), widths, left=lefts, color=colour(index), label=name.removesuffix("_s"))
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
        axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("ms of one request, medians of its parts")
        legend_above(drawn, axes)
    return drawn.svg


def pareto(document: dict[str, Any], quality: Sequence[Record]) -> str | None:
    """Scores of the compared checkpoints, found by their hash, against end-to-end time and peak memory."""
    scores = {record["model"]["hash"]: score for record in quality if (score := _score(record)) is not None}
    points = []
    for run in document["runs"]:
        group = next(group for group in document["groups"] if group["label"] == run["group"])
        for model, cost, result in zip(group["models"], run["models"], run["cells"][0]["results"], strict=True):
            if model["hash"] in scores:
                memory = cost["memory"]["peak_gpu_bytes"] or cost["memory"]["peak_rss_bytes"]
                points.append((f"{model['name']} ({run['engine']})", *scores[model["hash"]], result["e2e_s"], memory))
    if not points:
        return None
    with drawing("latency-pareto", 9.5, 3.6, columns=2) as (drawn, panels):
        for index, (name, what, value, interval, e2e, memory) in enumerate(points):
            low, high = span(value, interval)
            for axes, x in zip(panels, (e2e.get("p50") and 1000 * e2e["p50"], memory and memory / 1e6), strict=True):
                if x:
                    axes.errorbar(x, value, yerr=[[low], [high]], fmt="o", color=colour(index), ms=7, elinewidth=1)
                    axes.annotate(name, (x, value), xytext=(6, 4), textcoords="offset points", fontsize=8)
            panels[0].set_ylabel(what)
        panels[0].set_xlabel("median end-to-end latency, ms")
        panels[1].set_xlabel("peak memory, MB")
        for axes in panels:
            axes.margins(x=0.3, y=0.2)
    return drawn.svg


def _score(record: Record) -> tuple[str, float, Any] | None:
    vqa, caption = record["tasks"].get("vqa", {}), record["tasks"].get("caption", {})
    if vqa.get("accuracy") is not None:
        return "VQA accuracy, %", vqa["accuracy"], vqa.get("interval")
    cider = (caption.get("metrics") or {}).get("CIDEr")
    return None if cider is None else ("CIDEr", cider, (caption.get("intervals") or {}).get("CIDEr"))
