"""Plots of a comparison of latency as SVG; None where there is nothing to draw."""

from collections.abc import Callable, Sequence
from typing import Any

from nmm_serve.evals.lab.document import cell_name, ratio_of
from nmm_serve.evals.lab.tables import PARTS
from nmm_serve.evals.plots import Drawing, colour, drawing, legend_above, span
from nmm_serve.evals.records import Record

METRICS = (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "end to end"))
MARKS = "os^Dv"


def ratios(document: dict[str, Any]) -> str | None:
    """Ratios of medians to the first model with paired intervals: a row of panels for each engine, a column for each
    metric, and along each panel the sizes and their cells."""
    runs = [run for run in document["runs"] if any(cell["ratios"] for cell in run["cells"])]
    engines = list(dict.fromkeys(run["engine"] for run in runs))
    if not engines:
        return None
    names = _compared(runs)
    places = max(sum(len(run["cells"]) for run in runs if run["engine"] == engine) for engine in engines)
    width = max(9.5, 2.0 + len(METRICS) * 0.16 * places * (len(names) + 1))
    with drawing("latency-ratios", width, 0.7 + 2.7 * len(engines), columns=len(METRICS), rows=len(engines)) as (
        drawn, panels,
    ):  # fmt: skip
        for index, axes in enumerate(panels):
            engine, (metric, title) = engines[index // len(METRICS)], METRICS[index % len(METRICS)]
            _ratio_panel(axes, [run for run in runs if run["engine"] == engine], names, metric, short_name)
            axes.set_title(f"{engine}: {title}, times the first model's", fontsize=10)
        _legend_of_names(drawn, names)
    return drawn.svg


def training(document: dict[str, Any]) -> str | None:
    """Ratios of training steps to the first model's, over sizes and resolutions."""
    runs = [run for run in document["training"] if any(cell["ratios"] for cell in run["cells"])]
    if not runs:
        return None
    names = _compared(runs)
    with drawing("latency-training", 9.5, 3.6) as (drawn, axes):
        _ratio_panel(axes, runs, names, "step_s", lambda cell: f"{cell['resolution']} px")
        axes.set_title("a training step, times the first model's", fontsize=10)
        _legend_of_names(drawn, names)
    return drawn.svg


def short_name(cell: dict[str, Any]) -> str:
    if cell["varies"] in (None, "resolution"):
        return f"{cell['resolution']} px" + (f", x{cell['concurrency']}" if cell["concurrency"] > 1 else "")
    return cell_name(cell)


def _compared(runs: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["model"] for run in runs for cell in run["cells"] for r in cell["ratios"]))


def _ratio_panel(
    axes: Any, runs: Sequence[dict[str, Any]], names: Sequence[str], metric: str, label: Callable[[dict[str, Any]], str]
) -> None:
    """Points with intervals beside each other at each cell, one colour for each model; a line at 1."""
    ticks, position = [], 0.0
    for run in runs:
        if position:
            axes.axvline(position - 0.75, color="#9aa0a8", lw=0.6)
        begin = position
        for cell in sorted(run["cells"], key=lambda cell: (cell["resolution"], cell.get("concurrency", 1))):
            for index, name in enumerate(names):
                ratio = ratio_of(cell, name, metric)
                if ratio is None or ratio["ratio"] is None:
                    continue
                low, high = span(ratio["ratio"], ratio["interval"])
                at = position + 0.7 * ((index + 0.5) / len(names) - 0.5)
                axes.errorbar(
                    at, ratio["ratio"], yerr=[[low], [high]], fmt="o", ms=4, elinewidth=1.2, color=colour(index)
                )
            ticks.append((position, label(cell)))
            position += 1
        middle = (begin + position - 1) / 2
        axes.text(middle, 0.99, run["group"], ha="center", va="top", fontsize=9, transform=axes.get_xaxis_transform())
        position += 0.5
    axes.axhline(1.0, color="#111", lw=1)
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)
    axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8, rotation=35, ha="right")


def _legend_of_names(drawn: Drawing, names: Sequence[str], marks: Sequence[str] = ()) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour(i)) for i in range(len(names))]
    handles += [Line2D([], [], color="#333", ls="", marker=MARKS[i % len(MARKS)]) for i in range(len(marks))]
    labels = [*names, *marks]
    drawn.figure.legend(handles, labels, loc="outside upper center", ncols=min(7, len(labels)))


def parts(document: dict[str, Any]) -> str | None:
    """Medians of the parts stacked, for the first cell of each run whose engine tells them. `wait_s` is a difference of
    times, so its median may be below 0: such a part has no bar there, and the axis says so."""
    bars = []
    for run in document["runs"]:
        for result in _first_cell(run)["results"]:
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
        below = [name for i, name in enumerate(PARTS) if any(medians[i] < 0 for _, medians in bars)]
        hidden = f" (not drawn where below 0: {', '.join(name.removesuffix('_s') for name in below)})" if below else ""
        axes.set_xlabel(f"ms of one request, medians of its parts{hidden}")
        legend_above(drawn, axes)
    return drawn.svg


def pareto(document: dict[str, Any], quality: Sequence[Record]) -> str | None:
    """Scores of the compared checkpoints, found by their hash, against end-to-end time and peak memory: a row for each
    kind of score, a colour for each model, a mark for each engine, a line through the points that no other one beats
    in both."""
    costs = _costs(document)
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for record in quality:
        for kind, value, interval in scores(record):
            for name, engine, model_hash, seconds, memory in costs:
                if model_hash == record["model"]["hash"]:
                    rows.setdefault(kind, []).append((name, engine, value, interval, seconds, memory))
    if not rows:
        return None
    names, engines = (list(dict.fromkeys(point[i] for row in rows.values() for point in row)) for i in (0, 1))
    with drawing("latency-pareto", 9.5, 0.9 + 3.3 * len(rows), columns=2, rows=len(rows)) as (drawn, panels):
        shown = ((4, 1000, "median end-to-end latency, ms"), (5, 1e-6, "peak memory, MB"))
        for index, axes in enumerate(panels):
            kind, (column, scale, title) = list(rows)[index // 2], shown[index % 2]
            known = [point for point in rows[kind] if point[column]]
            for point in known:
                name, engine, value, interval, *_ = point
                low, high = span(value, interval)
                axes.errorbar(
                    scale * point[column], value, yerr=[[low], [high]], ms=7, elinewidth=1,
                    fmt=MARKS[engines.index(engine) % len(MARKS)], color=colour(names.index(name)),
                )  # fmt: skip
            front, best = [], float("-inf")
            for x, y in sorted(((scale * point[column], point[2]) for point in known), key=lambda at: (at[0], -at[1])):
                if y > best:
                    front.append((x, y))
                    best = y
            axes.step([x for x, _ in front], [y for _, y in front], where="post", color="#9aa0a8", lw=1)
            axes.set_xlabel(title)
            axes.margins(x=0.1, y=0.15)
            if index % 2 == 0:
                axes.set_ylabel(kind)
        _legend_of_names(drawn, names, engines)
    return drawn.svg


def _costs(document: dict[str, Any]) -> list[tuple[str, str, str, float | None, int | None]]:
    """(name, engine, hash, median end-to-end seconds, peak bytes) of every model and engine in its first cell."""
    found = []
    for run in document["runs"]:
        group = next(group for group in document["groups"] if group["label"] == run["group"])
        hashes = {model["name"]: model["hash"] for model in group["models"]}
        costs = {cost["model"]: cost for cost in run["models"]}
        for result in _first_cell(run)["results"]:
            name = result["model"]
            if cost := costs.get(name):
                memory = cost["memory"]["peak_gpu_bytes"] or cost["memory"]["peak_rss_bytes"]
                label = name if len(document["groups"]) == 1 else f"{group['label']} {name}"
                found.append((label, run["engine"], hashes[name], result["e2e_s"].get("p50"), memory))
    return found


def _first_cell(run: dict[str, Any]) -> dict[str, Any]:
    return run["cells"][0] if run["cells"] else {"results": []}


def scores(record: Record) -> list[tuple[str, float, Any]]:
    """(kind, value, interval) of each task that a record holds and that has a score."""
    vqa, caption = record["tasks"].get("vqa", {}), record["tasks"].get("caption", {})
    found = [
        ("VQA accuracy, %", vqa.get("accuracy"), vqa.get("interval")),
        ("CIDEr", (caption.get("metrics") or {}).get("CIDEr"), (caption.get("intervals") or {}).get("CIDEr")),
    ]
    return [(kind, value, interval) for kind, value, interval in found if value is not None]
