"""One self-contained HTML page from records: no network, no other file needed to read it."""

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from nmm_serve.errors import ImageError
from nmm_serve.evals import plots
from nmm_serve.evals.records import Record, load_items, load_record, tell_apart, write_text
from nmm_serve.evals.samples import by_hash, thumbnail
from nmm_serve.evals.scaling.plots import report_plots
from nmm_serve.evals.table import (
    MISSING,
    Cell,
    brackets,
    comparison,
    contamination_table,
    join,
    joined,
    remarks,
    routing_table,
)

_QUESTIONS_PER_IMAGE = 4
_DIFFERING_IMAGES = 24
_RIGHT = 90
"""VQA accuracy in percent from which an answer counts as right: three of the other nine annotators gave it."""


Image = tuple[int, str]
"""The number of its data set, and its id there."""


def write_report(
    paths: Sequence[Path], output: Path, *, title: str = "Model comparison", scaling: Path | None = None
) -> None:
    """Draw the records into one page at `output`, written whole or not at all. `scaling`: fits of a sweep, drawn too.

    Raises DataError for a file that is no record, OSError when the page cannot be written.
    """
    loaded = [load_record(path) for path in paths]
    single_items = [_printable(load_items(path, record)) for path, record in zip(paths, loaded, strict=True)]
    single = [_printable(record) for record in loaded]
    groups = joined(single)
    records = [join([single[i] for i in group]) for group in groups]
    items = [[item for i in group for item in single_items[i]] for group in groups]
    tell_apart(records)
    columns, rows = comparison(records)
    first = [i for i, column in enumerate(columns) if not column.aside]  # the others have sections of their own
    columns, rows = [columns[i] for i in first], [[row[i] for i in first] for row in rows]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("nmm_serve.evals").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        title=title,
        records=records,
        columns=columns,
        rows=rows,
        best=_best_rows(columns, rows),
        remarks=remarks(records),
        plots=_plots(records) + ([] if scaling is None else report_plots(scaling)),
        samples=_samples(records, items),
        type_table=_type_table(records),
        text_table=_text_table(records),
        routing=_routing(records),
        contamination=[(r["model"]["name"], *contamination_table(r)) for r in records if "contamination" in r["tasks"]],
        definitions=_definitions(records),
        provenance=[
            (record["model"]["name"], _provenance(single[i]))
            for record, group in zip(records, groups, strict=True)
            for i in group
        ],
    )
    write_text(output, page)


def _best_rows(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[int | None]:
    """For each column the row with the best number; None where there is no better or worse, or only one number."""
    best: list[int | None] = []
    for index, column in enumerate(columns):
        values = {i: row[index].value for i, row in enumerate(rows) if row[index].value is not None}
        if column.higher_is_better is None or len(values) < 2:
            best.append(None)
        else:
            best.append((max if column.higher_is_better else min)(values, key=lambda i: values[i]))
    return best


def _plots(records: Sequence[Record]) -> list[dict[str, str]]:
    drawn = [
        (
            "Quality against latency",
            "Up and to the left is better. Whiskers: 95 % intervals over images.",
            plots.quality_against_latency(records),
        ),
        (
            "VQA accuracy by question type",
            "Whiskers: 95 % intervals over images. Black mark: the best constant answer of that type, which needs "
            "neither image nor question.",
            plots.vqa_by_question_type(records),
        ),
        ("Captions", "Whiskers: 95 % intervals over images.", plots.caption_metrics(records)),
        (
            "Latency",
            "Medians; whiskers reach to the 90th percentile. Definitions are at the end of the page.",
            plots.latency_bars(records),
        ),
        ("Experts, layer by layer", "Bands: 95 % intervals over images.", plots.routing_by_layer(records)),
        ("Experts over training", "From the runs' logs, a line a layer.", plots.routing_over_training(records)),
        ("Training", "As the checkpoints' run.json tells it.", plots.training_curves(records)),
    ]
    return [{"title": title, "note": note, "svg": svg} for title, note, svg in drawn if svg]


def _type_table(records: Sequence[Record]) -> tuple[list[str], list[list[Cell]]] | None:
    """VQA accuracy of each question type, a column a model."""
    held = [r for r in records if r["tasks"].get("vqa", {}).get("per_question_type")]
    if not held:
        return None
    sections = [r["tasks"]["vqa"] for r in held]
    constants = sections[0]["best_constant"]["per_question_type"]
    rows = []
    for name in dict.fromkeys(name for section in sections for name in section["per_question_type"]):
        groups = [section["per_question_type"].get(name) for section in sections]
        n = max(group["n"] for group in groups if group)
        constant = constants[name]["accuracy"] if name in constants else None
        best = Cell(constant, MISSING if constant is None else f"{constant:.1f}")
        cells = [
            Cell(group["accuracy"], f"{group['accuracy']:.1f}", brackets(group["interval"], 1))
            if group
            else Cell(None, MISSING)
            for group in groups
        ]
        rows.append([Cell(name, name), Cell(n, f"{n:,}"), best, *cells])
    return ["question type", "n", "best const %", *(r["model"]["name"] for r in held)], rows


def _text_table(records: Sequence[Record]) -> tuple[list[str], list[list[Cell]]] | None:
    """Every metric of every text task, a column a model."""
    held = [r for r in records if r["tasks"].get("text", {}).get("tasks")]
    if not held:
        return None
    tasks = [r["tasks"]["text"]["tasks"] for r in held]
    names = dict.fromkeys((task, metric) for found in tasks for task in found for metric in found[task]["metrics"])
    rows = []
    for task, metric in names:
        cells = []
        for found in tasks:
            value = found.get(task, {}).get("metrics", {}).get(metric)
            interval = (found.get(task, {}).get("intervals") or {}).get(metric)
            cells.append(Cell(None, MISSING) if value is None else Cell(value, f"{value:.4g}", brackets(interval, 3)))
        rows.append([Cell(task, task), Cell(metric, metric), *cells])
    return ["task", "metric", *(r["model"]["name"] for r in held)], rows


def _routing(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each model with experts: its heat map and its table."""
    return [
        {"name": record["model"]["name"], "svg": plots.routing_heat_map(record), "table": routing_table(record)}
        for record in records
        if record["tasks"].get("routing", {}).get("layers")
    ]


def _samples(records: Sequence[Record], items: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Cards of images: questions and captions with every model's answer.

    First those whose thumbnails the records carry; then, where their files are still there, some whose questions the
    models answer differently: what changes from model to model is rare among a few images chosen blindly.
    """
    sets = _data_sets(records)
    thumbnails: dict[Image, str] = {}
    for data_set, record in zip(sets, records, strict=True):
        thumbnails |= {(data_set, image): src for image, src in record["samples"].items()}
    asked, captions, files = _by_image(sets, records, items)
    carried = set(thumbnails)
    differ = [
        (data_set, image)
        for image in by_hash(image for _, image in asked)
        for data_set in sorted(set(sets))
        if (data_set, image) not in carried
        and any(q["verdict"] == "changed" for q in asked.get((data_set, image), {}).values())
    ]
    for image in differ[:_DIFFERING_IMAGES]:
        if image in files and files[image].is_file():
            try:
                thumbnails[image] = thumbnail(files[image])
            except ImageError:  # changed since it was evaluated
                continue
    return [
        {
            "id": image[1],
            "src": src,
            "chosen": "by hash" if image in carried else "because the models differ",
            "questions": _most_telling(asked.get(image, {}).values()),
            "captions": captions.get(image, {}).get("predictions", []),
            "references": captions.get(image, {}).get("references", []),
        }
        for image, src in thumbnails.items()
    ]


def _printable(document: Any) -> Any:
    """Annotations, and folders' names, may hold half a surrogate pair, which neither pages nor plots can."""
    return json.loads(json.dumps(document, ensure_ascii=False).encode(errors="replace"))


def _data_sets(records: Sequence[Record]) -> list[int]:
    """A number for each record: equal where no task that both hold differs in its files. Ids repeat between data."""
    seen: list[dict[str, Any]] = []
    numbers = []
    for record in records:
        held = {task: record["tasks"][task]["data"]["files"] for task in ("vqa", "caption") if task in record["tasks"]}
        alike = (n for n, known in enumerate(seen) if all(known.get(task, held[task]) == held[task] for task in held))
        number = next(alike, len(seen))
        if number == len(seen):
            seen.append({})
        seen[number] |= held
        numbers.append(number)
    return numbers


def _by_image(
    sets: Sequence[int], records: Sequence[Record], items: Sequence[Sequence[dict[str, Any]]]
) -> tuple[dict[Image, dict[Any, dict[str, Any]]], dict[Image, dict[str, Any]], dict[Image, Path]]:
    """Questions by image and question id, captions by image, and where each image's file was."""
    asked: dict[Image, dict[Any, dict[str, Any]]] = {}
    captions: dict[Image, dict[str, Any]] = {}
    files: dict[Image, Path] = {}
    for data_set, record, record_items in zip(sets, records, items, strict=True):
        for item in record_items:
            if item["task"] not in ("vqa", "caption"):
                continue
            image = (data_set, str(item["image_id"]))
            files[image] = Path(item["image"])
            shown = {"model": record["model"]["name"], "text": item["prediction"], "error": item["error"]}
            if item["task"] == "caption":
                card = captions.setdefault(image, {"references": item["references"], "predictions": []})
                card["predictions"].append(shown | {"cider": (item["scores"] or {}).get("CIDEr")})
            else:
                question = asked.setdefault(image, {}).setdefault(
                    item["question_id"],
                    {"text": item["question"], "answers": _counted(item["answers"]), "predictions": []},
                )
                mark = _mark(item["accuracy"])
                question["predictions"].append(shown | {"accuracy": item["accuracy"], "mark": mark})
    for questions in asked.values():
        for question in questions.values():
            marks = {p["mark"] for p in question["predictions"]}
            question["verdict"] = marks.pop() if len(marks) == 1 else "changed"
    return asked, captions, files


def _mark(accuracy: float | None) -> str:
    if accuracy is None:
        return "failed"
    return "right" if accuracy >= _RIGHT else ("wrong" if accuracy == 0 else "half")


def _most_telling(questions: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first few in file order, those that the models answer differently before the others."""
    return sorted(questions, key=lambda question: question["verdict"] != "changed")[:_QUESTIONS_PER_IMAGE]


def _counted(answers: Sequence[str]) -> str:
    """`dog ×7, puppy ×3`: the annotators' answers, most frequent first."""
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer] = counts.get(answer, 0) + 1
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{answer} ×{count}" for answer, count in ordered)


def _definitions(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    merged: dict[tuple[str, str], str] = {}
    for record in records:
        for task, section in record["tasks"].items():
            for name, text in section["definitions"].items():
                merged[task, name] = text
    return [(task, name, text) for (task, name), text in merged.items()]


def _provenance(record: Record) -> dict[str, str]:
    model, environment = record["model"], record["environment"]
    rows = {
        "model": model["source"],
        "checkpoint sha256": model["hash"] or f"none: {model['hash_reason']}",
        "evaluated": record["created"],
        "engine": ", ".join(f"{key} {value}" for key, value in record["engine"].items() if key != "name"),
        "hardware": ", ".join([f"{environment['cpu_count']} x {environment['cpu']}", *environment["gpus"]]),
        "versions": ", ".join(f"{name} {number}" for name, number in environment["packages"].items()),
    }
    for task, section in record["tasks"].items():
        rows[f"{task}: n"] = f"{section['n']}" + (f" of {section['n_total']}" if "n_total" in section else "")
        rows[f"{task}: failed"] = str(section["failed"])
        if "prompt" in section:
            rows[f"{task}: prompt"] = section["prompt"]
        if "decoding" in section:
            rows[f"{task}: decoding"] = json.dumps(section["decoding"])
        if section.get("tokenizer"):
            rows[f"{task}: tokenizer"] = section["tokenizer"]
    return rows
