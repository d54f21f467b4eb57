"""Plots of records as inline SVG. Each takes records and gives back None when they hold nothing to draw."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nmm_serve.errors import NMMError
from nmm_serve.evals.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers with any kind of colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a8",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Names and question types are plain text: a `$` in them is no formula.
    "text.parse_math": False,
}
_MAX_GROUPS = 16


def vqa_by_question_type(records: Sequence[Record]) -> str | None:
    """Accuracy per question type with intervals, and the best constant answer of each type as a mark."""
    held = [r for r in records if r["tasks"].get("vqa", {}).get("per_question_type")]
    if not held:
        return None
    sizes: dict[str, int] = {}
    for record in held:
        for name, group in record["tasks"]["vqa"]["per_question_type"].items():
            sizes[name] = max(sizes.get(name, 0), group["n"])
    types = sorted(sizes, key=lambda name: (-sizes[name], name))[:_MAX_GROUPS]
    with _figure("vqa", 9.5, 0.8 + 0.26 * len(types) * (len(held) + 1)) as (figure, axes):
        thickness = 0.8 / len(held)
        for index, record in enumerate(held):
            groups = record["tasks"]["vqa"]["per_question_type"]
            here = [i for i, name in enumerate(types) if name in groups]
            values = [groups[types[i]]["accuracy"] for i in here]
            spans = [_span(groups[types[i]]["accuracy"], groups[types[i]]["interval"]) for i in here]
            axes.barh(
                [i - 0.4 + thickness * (index + 0.5) for i in here],
                values,
                height=thickness * 0.92,
                color=_colour(index),
                label=record["model"]["name"],
                xerr=list(zip(*spans, strict=True)),
                error_kw={"elinewidth": 0.9, "ecolor": "#333"},
            )
        constants = held[0]["tasks"]["vqa"]["best_constant"]["per_question_type"]
        for i, name in enumerate(types):
            if name in constants:
                label = "best constant answer" if i == 0 else None
                axes.plot([constants[name]["accuracy"]] * 2, [i - 0.46, i + 0.46], color="#111", lw=1.8, label=label)
        axes.set_yticks(range(len(types)), [f"{name}  (n={sizes[name]})" for name in types])
        axes.invert_yaxis()
        axes.set_xlim(0, 102)
        axes.set_xlabel("VQA accuracy, %")
        axes.grid(axis="y", visible=False)
        _legend_above(figure, axes)
    return figure.svg


def caption_metrics(records: Sequence[Record]) -> str | None:
    """One small panel per metric, since their scales differ."""
    held = [r for r in records if r["tasks"].get("caption", {}).get("metrics")]
    metrics = [
        name
        for name in ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")
        if any(r["tasks"]["caption"]["metrics"].get(name) is not None for r in held)
    ]
    if not held or not metrics:
        return None
    with _figure("caption", 9.5, 2.9, columns=len(metrics)) as (figure, panels):
        for axes, metric in zip(panels, metrics, strict=True):
            for index, record in enumerate(held):
                value = record["tasks"]["caption"]["metrics"].get(metric)
                if value is None:
                    continue
                low, high = _span(value, (record["tasks"]["caption"].get("intervals") or {}).get(metric))
                axes.bar(index, value, color=_colour(index), width=0.7, yerr=[[low], [high]], ecolor="#333")
            axes.set_title(metric.replace("Bleu", "BLEU").replace("_", "-"), fontsize=10)
            axes.set_xticks(range(len(held)), [r["model"]["name"] for r in held], rotation=30, ha="right")
            axes.grid(axis="x", visible=False)
    return figure.svg


def latency_bars(records: Sequence[Record]) -> str | None:
    """TTFT and TPOT (median, with a whisker to p90) and throughput at each concurrency."""
    held = [r for r in records if r["tasks"].get("latency", {}).get("levels")]
    if not held:
        return None
    concurrencies = sorted({level["concurrency"] for r in held for level in r["tasks"]["latency"]["levels"]})
    panels_of = (("ttft_s", "TTFT, ms"), ("tpot_s", "TPOT, ms"), ("output_tokens_per_s", "output tokens/s"))
    with _figure("latency", 9.5, 3.1, columns=3) as (figure, panels):
        for axes, (key, title) in zip(panels, panels_of, strict=True):
            width = 0.8 / len(held)
            for index, record in enumerate(held):
                for level in record["tasks"]["latency"]["levels"]:
                    at = concurrencies.index(level["concurrency"]) - 0.4 + width * (index + 0.5)
                    value, whisker = _level_value(level[key])
                    if value is not None:
                        axes.bar(at, value, width=width * 0.92, color=_colour(index), yerr=whisker, ecolor="#333")
            axes.set_title(title, fontsize=10)
            axes.set_xticks(range(len(concurrencies)), [str(c) for c in concurrencies])
            axes.set_xlabel("concurrency")
            axes.grid(axis="x", visible=False)
        _legend_of_models(figure, held)
    return figure.svg


def _level_value(value: Any) -> tuple[float | None, list[list[float]] | None]:
    if not isinstance(value, dict):
        return value, None
    if value.get("p50") is None:
        return None, None
    p50, p90 = 1000 * value["p50"], 1000 * value["p90"]
    return p50, [[0.0], [p90 - p50]]


def quality_against_latency(records: Sequence[Record]) -> str | None:
    """Each model as a point: median end-to-end latency at the lowest concurrency, and its scores."""

    def e2e_ms(record: Record) -> float | None:
        levels = record["tasks"].get("latency", {}).get("levels")
        p50 = min(levels, key=lambda level: level["concurrency"])["e2e_s"].get("p50") if levels else None
        return None if p50 is None else 1000 * p50

    def accuracy(record: Record) -> tuple[float | None, Any]:
        section = record["tasks"].get("vqa", {})
        return section.get("accuracy"), section.get("interval")

    def cider(record: Record) -> tuple[float | None, Any]:
        section = record["tasks"].get("caption", {})
        return (section.get("metrics") or {}).get("CIDEr"), (section.get("intervals") or {}).get("CIDEr")

    panels_of: list[tuple[Callable[[Record], tuple[float | None, Any]], str]] = [
        (quality, title)
        for quality, title in ((accuracy, "VQA accuracy, %"), (cider, "CIDEr"))
        if any(e2e_ms(r) is not None and quality(r)[0] is not None for r in records)
    ]
    if not panels_of:
        return None
    with _figure("pareto", 4.75 * len(panels_of), 3.3, columns=len(panels_of)) as (figure, panels):
        for axes, (quality, title) in zip(panels, panels_of, strict=True):
            for index, record in enumerate(records):
                x, (y, interval) = e2e_ms(record), quality(record)
                if x is None or y is None:
                    continue
                low, high = _span(y, interval)
                axes.errorbar(x, y, yerr=[[low], [high]], fmt="o", color=_colour(index), ms=7, elinewidth=1)
                axes.annotate(record["model"]["name"], (x, y), xytext=(7, 5), textcoords="offset points")
            axes.margins(y=0.2)
            axes.set_xlim(0, 1.25 * max(filter(None, map(e2e_ms, records))))
            axes.set_xlabel("median end-to-end latency, ms")
            axes.set_ylabel(title)
    return figure.svg


def training_curves(records: Sequence[Record]) -> str | None:
    """Training and validation loss over tokens, from the checkpoints' own `run.json`."""
    held = [(i, r) for i, r in enumerate(records) if (r["model"]["run"] or {}).get("history")]
    if not held:
        return None
    validated = [(i, r) for i, r in held if any("loss_avg" in e for e in r["model"]["run"].get("validation", ()))]
    with _figure("training", 9.5, 3.2, columns=2 if validated else 1) as (figure, panels):
        for index, record in held:
            points = record["model"]["run"]["history"]
            x, y = [p["tokens"] / 1e6 for p in points], [p["loss"] for p in points]
            panels[0].plot(x, y, color=_colour(index), lw=1.1, label=record["model"]["name"])
        panels[0].set_title("training loss", fontsize=10)
        for index, record in validated:
            points = [p for p in record["model"]["run"]["validation"] if "loss_avg" in p]
            x, y = [p["tokens"] / 1e6 for p in points], [p["loss_avg"] for p in points]
            panels[1].plot(x, y, color=_colour(index), lw=1.3, marker="o", ms=3)
        if validated:
            panels[1].set_title("validation loss, mean over data types", fontsize=10)
        for axes in panels:
            axes.set_xlabel("tokens, millions")
        _legend_above(figure, panels[0])
    return figure.svg


class _Drawing:
    """A figure that becomes SVG text when its `with` block ends."""

    svg: str

    def __init__(self, figure: "Figure") -> None:
        self.figure = figure


@contextmanager
def _figure(name: str, width: float, height: float, columns: int = 0) -> Iterator[tuple[_Drawing, Any]]:
    """A figure of `columns` panels (0: one, not in a list). `name` keeps element ids of SVGs in one page apart."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise NMMError("plots need matplotlib; pip install 'nmm-serve[evals]'") from None

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(1, max(1, columns), squeeze=False)[0]
        drawing = _Drawing(figure)
        yield drawing, list(panels) if columns else panels[0]
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # Text stays text in the SVG: the reader's browser has the letters that matplotlib's font lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        drawing.svg = text[text.index("<svg") :]


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _span(value: float, interval: Any) -> tuple[float, float]:
    """How far the interval reaches below and above the value; a resampled interval need not hold it."""
    if not interval:
        return 0.0, 0.0
    return max(0.0, value - interval["low"]), max(0.0, interval["high"] - value)


def _legend_above(drawing: _Drawing, axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    drawing.figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))


def _legend_of_models(drawing: _Drawing, records: Sequence[Record]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_colour(i)) for i in range(len(records))]
    names = [record["model"]["name"] for record in records]
    drawing.figure.legend(handles, names, loc="outside upper center", ncols=min(6, len(names)))
