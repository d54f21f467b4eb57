"""Plots of records as inline SVG. Each takes records and gives back None when they hold nothing to draw."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

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
    held = _held(records, "vqa", "per_question_type")
    if not held:
        return None
    sizes: dict[str, int] = {}
    for _, record in held:
        for name, group in record["tasks"]["vqa"]["per_question_type"].items():
            sizes[name] = max(sizes.get(name, 0), group["n"])
    types = sorted(sizes, key=lambda name: (-sizes[name], name))[:_MAX_GROUPS]
    with drawing("vqa", 9.5, 0.8 + 0.26 * len(types) * (len(held) + 1)) as (figure, axes):
        thickness = 0.8 / len(held)
        for place, (index, record) in enumerate(held):
            groups = record["tasks"]["vqa"]["per_question_type"]
            here = [i for i, name in enumerate(types) if name in groups]
            values = [groups[types[i]]["accuracy"] for i in here]
            spans = [span(groups[types[i]]["accuracy"], groups[types[i]]["interval"]) for i in here]
            axes.barh(
                [i - 0.4 + thickness * (place + 0.5) for i in here],
                values,
                height=thickness * 0.92,
                color=colour(index),
                label=record["model"]["name"],
                xerr=list(zip(*spans, strict=True)),
                error_kw={"elinewidth": 0.9, "ecolor": "#333"},
            )
        constants = held[0][1]["tasks"]["vqa"]["best_constant"]["per_question_type"]
        for i, name in enumerate(types):
            if name in constants:
                label = "best constant answer" if i == 0 else None
                axes.plot([constants[name]["accuracy"]] * 2, [i - 0.46, i + 0.46], color="#111", lw=1.8, label=label)
        axes.set_yticks(range(len(types)), [f"{name}  (n={sizes[name]})" for name in types])
        axes.invert_yaxis()
        axes.set_xlim(0, 102)
        axes.set_xlabel("VQA accuracy, %")
        axes.grid(axis="y", visible=False)
        legend_above(figure, axes)
    return figure.svg


def caption_metrics(records: Sequence[Record]) -> str | None:
    """One small panel per metric, since their scales differ."""
    held = _held(records, "caption", "metrics")
    metrics = [
        name
        for name in ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L")
        if any(r["tasks"]["caption"]["metrics"].get(name) is not None for _, r in held)
    ]
    if not held or not metrics:
        return None
    with drawing("caption", 9.5, 2.9, columns=len(metrics)) as (figure, panels):
        for axes, metric in zip(panels, metrics, strict=True):
            for place, (index, record) in enumerate(held):
                value = record["tasks"]["caption"]["metrics"].get(metric)
                if value is None:
                    continue
                low, high = span(value, (record["tasks"]["caption"].get("intervals") or {}).get(metric))
                axes.bar(place, value, color=colour(index), width=0.7, yerr=[[low], [high]], ecolor="#333")
            axes.set_title(metric.replace("Bleu", "BLEU").replace("_", "-"), fontsize=10)
            axes.set_xticks([])
        _legend_of_models(figure, held)
    return figure.svg


def latency_bars(records: Sequence[Record]) -> str | None:
    """TTFT and TPOT (median, with a whisker to p90) and throughput at each concurrency."""
    held = _held(records, "latency", "levels")
    if not held:
        return None
    concurrencies = sorted({level["concurrency"] for _, r in held for level in r["tasks"]["latency"]["levels"]})
    panels_of = (("ttft_s", "TTFT, ms"), ("tpot_s", "TPOT, ms"), ("output_tokens_per_s", "output tokens/s"))
    with drawing("latency", 9.5, 3.1, columns=3) as (figure, panels):
        for axes, (key, title) in zip(panels, panels_of, strict=True):
            width = 0.8 / len(held)
            for place, (index, record) in enumerate(held):
                for level in record["tasks"]["latency"]["levels"]:
                    at = concurrencies.index(level["concurrency"]) - 0.4 + width * (place + 0.5)
                    value, whisker = _level_value(level[key])
                    if value is not None:
                        axes.bar(at, value, width=width * 0.92, color=colour(index), yerr=whisker, ecolor="#333")
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
    drawn: dict[int, Record] = {}
    with drawing("pareto", 4.75 * len(panels_of), 3.3, columns=len(panels_of)) as (figure, panels):
        for axes, (quality, title) in zip(panels, panels_of, strict=True):
            for index, record in enumerate(records):
                x, (y, interval) = e2e_ms(record), quality(record)
                if x is None or y is None:
                    continue
                low, high = span(y, interval)
                axes.errorbar(x, y, yerr=[[low], [high]], fmt="o", color=colour(index), ms=7, elinewidth=1)
                drawn[index] = record
            axes.margins(y=0.2)
            axes.set_xlim(0, 1.25 * max(filter(None, map(e2e_ms, records))))
            axes.set_xlabel("median end-to-end latency, ms")
            axes.set_ylabel(title)
        _legend_of_models(figure, sorted(drawn.items(), key=lambda held: held[0]))
    return figure.svg


def training_curves(records: Sequence[Record]) -> str | None:
    """Training and validation loss over tokens, from the checkpoints' own `run.json`."""
    held = [(i, r) for i, r in enumerate(records) if (r["model"]["run"] or {}).get("history")]
    if not held:
        return None
    validated = [(i, r) for i, r in held if any("loss_avg" in e for e in r["model"]["run"].get("validation", ()))]
    with drawing("training", 9.5, 3.2, columns=2 if validated else 1) as (figure, panels):
        for index, record in held:
            points = record["model"]["run"]["history"]
            x, y = [p["tokens"] / 1e6 for p in points], [p["loss"] for p in points]
            panels[0].plot(x, y, color=colour(index), lw=1.1, label=record["model"]["name"])
        panels[0].set_title("training loss", fontsize=10)
        for index, record in validated:
            points = [p for p in record["model"]["run"]["validation"] if "loss_avg" in p]
            x, y = [p["tokens"] / 1e6 for p in points], [p["loss_avg"] for p in points]
            panels[1].plot(x, y, color=colour(index), lw=1.3, marker="o", ms=3)
        if validated:
            panels[1].set_title("validation loss, mean over data types", fontsize=10)
        for axes in panels:
            axes.set_xlabel("tokens, millions")
        legend_above(figure, panels[0])
    return figure.svg


def routing_heat_map(record: Record) -> str | None:
    """Layers by experts: which share of an expert's tokens is image, and where each modality's tokens go."""
    layers = record["tasks"].get("routing", {}).get("layers")
    if not layers:
        return None
    image = np.array([layer["image_tokens"] for layer in layers], dtype=float)
    text = np.array([layer["text_tokens"] for layer in layers], dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        panels_of = [
            ("image share of the expert's tokens, %", 100 * image / (image + text), "coolwarm", 100.0),
            ("share of image tokens, %", 100 * image / image.sum(1, keepdims=True), "Blues", None),
            ("share of text tokens, %", 100 * text / text.sum(1, keepdims=True), "Oranges", None),
        ]
    num_layers, num_experts = image.shape
    with drawing("routing-" + record["model"]["name"], 9.5, 1.5 + 0.3 * num_layers, columns=3) as (figure, panels):
        most = max(
            (float(np.nanmax(v)) for _, v, _, top in panels_of if top is None and not np.isnan(v).all()), default=1
        )
        for axes, (title, values, colours, top) in zip(panels, panels_of, strict=True):
            shown = axes.imshow(values, cmap=colours, vmin=0, vmax=top or most, aspect="auto")
            axes.set_title(title, fontsize=9.5)
            axes.set_xticks(range(num_experts), [str(e) for e in range(num_experts)])
            axes.set_yticks(range(num_layers), [str(layer["layer"]) for layer in layers])
            axes.set_xlabel("expert")
            axes.set_ylabel("layer")
            axes.grid(visible=False)
            for (layer, expert), value in np.ndenumerate(values) if num_layers * num_experts <= 256 else ():
                # dark cells have white letters
                r, g, b, _ = shown.cmap(shown.norm(value))
                ink = "#fff" if 0.3 * r + 0.59 * g + 0.11 * b < 0.55 else "#222"
                label = "–" if np.isnan(value) else f"{value:.0f}"
                axes.text(expert, layer, label, ha="center", va="center", color=ink, fontsize=8)
    return figure.svg


def routing_by_layer(records: Sequence[Record]) -> str | None:
    """Specialisation, its alternative and balance of each layer, with intervals as bands."""
    held = [(i, r) for i, r in enumerate(records) if r["tasks"].get("routing", {}).get("layers")]
    if not held:
        return None
    panels_of = (
        ("specialisation", "specialisation, 0 to 1", 1),
        ("image_skew", "image skew, %", 100),
        ("text_skew", "text skew, %", 100),
        ("max_over_mean", "busiest expert over mean", 1),
    )
    with drawing("routing-layers", 9.5, 2.9, columns=len(panels_of)) as (figure, panels):
        for axes, (key, title, scale) in zip(panels, panels_of, strict=True):
            for index, record in held:
                points = [(layer["layer"], layer[key]) for layer in record["tasks"]["routing"]["layers"]]
                points = [(x, number) for x, number in points if number["value"] is not None]
                values = [scale * number["value"] for _, number in points]
                name = record["model"]["name"]
                axes.plot([x for x, _ in points], values, color=colour(index), marker="o", ms=3, label=name)
                spans = [(x, n["interval"]) for x, n in points if n["interval"]]
                axes.fill_between(
                    [x for x, _ in spans], [scale * i["low"] for _, i in spans], [scale * i["high"] for _, i in spans],
                    color=colour(index), alpha=0.2, lw=0,
                )  # fmt: skip
            axes.set_title(title, fontsize=9.5)
            axes.set_xlabel("layer")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylim(bottom=1 if key == "max_over_mean" else 0)
        legend_above(figure, panels[0])
    return figure.svg


def routing_over_training(records: Sequence[Record]) -> str | None:
    """Specialisation and balance over the tokens of a run, a line a layer, from its log."""
    held = [r for r in records if r["tasks"].get("routing", {}).get("history")]
    if not held:
        return None
    with drawing("routing-training", 9.5, 2.9 * len(held), columns=2, rows=len(held)) as (figure, panels):
        for row, record in enumerate(held):
            history = record["tasks"]["routing"]["history"]
            x = [entry["tokens"] / 1e6 for entry in history]
            num_layers = len(history[0]["specialisation"])
            for axes, key, title in zip(
                panels[2 * row : 2 * row + 2], ("specialisation", "max_over_mean"),
                ("specialisation", "busiest expert over mean"), strict=True,
            ):  # fmt: skip
                for layer in range(num_layers):
                    values = [np.nan if e[key][layer] is None else e[key][layer] for e in history]
                    axes.plot(x, values, color=colour(layer), lw=1, label=f"layer {layer}")
                axes.set_title(f"{record['model']['name']}: {title}", fontsize=9.5)
                axes.set_xlabel("tokens, millions")
        legend_above(figure, panels[0])
    return figure.svg


class Drawing:
    """A figure that becomes SVG text when its `with` block ends."""

    svg: str

    def __init__(self, figure: "Figure") -> None:
        self.figure = figure

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=160)
        return buffer.getvalue()


@contextmanager
def drawing(name: str, width: float, height: float, columns: int = 0, rows: int = 1) -> Iterator[tuple[Drawing, Any]]:
    """A figure of `rows` x `columns` panels in one list (0 columns: one, not in a list). `name` keeps the
    element ids of the SVGs in one page apart."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise NMMError("plots need matplotlib; pip install 'nmm-serve[evals]'") from None

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(rows, max(1, columns), squeeze=False).ravel()
        drawn = Drawing(figure)
        yield drawn, list(panels) if columns else panels[0]
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # Text stays text in the SVG: the reader's browser has the letters that matplotlib's font lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        drawn.svg = text[text.index("<svg") :]


def colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def span(value: float, interval: Any) -> tuple[float, float]:
    """How far the interval reaches below and above the value; a resampled interval need not hold it."""
    if not interval:
        return 0.0, 0.0
    return max(0.0, value - interval["low"]), max(0.0, interval["high"] - value)


def legend_above(drawn: Drawing, axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    drawn.figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))


def _held(records: Sequence[Record], task: str, key: str) -> list[tuple[int, Record]]:
    """The records that have something to draw, with their places among all: a model has one colour in every plot."""
    return [(index, record) for index, record in enumerate(records) if record["tasks"].get(task, {}).get(key)]


def _legend_of_models(drawn: Drawing, held: Sequence[tuple[int, Record]]) -> None:
    """Names beside the points, or below the bars, would take the panels' room where they are long."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour(index)) for index, _ in held]
    names = [record["model"]["name"] for _, record in held]
    drawn.figure.legend(handles, names, loc="outside upper center", ncols=min(6, len(names)))
