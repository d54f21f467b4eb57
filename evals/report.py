"""One self-contained HTML page from records: no network, no other file needed to read it."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from nmm_serve.evals import plots
from nmm_serve.evals.records import Record, load_items, load_record, tell_apart, write_text
from nmm_serve.evals.table import comparison, remarks

_QUESTIONS_PER_IMAGE = 4


def write_report(paths: Sequence[Path], output: Path, *, title: str = "Model comparison") -> None:
    """Draw the records into one page at `output`, written whole or not at all.

    Raises DataError for a file that is no record, OSError when the page cannot be written.
    """
    records = [load_record(path) for path in paths]
    items = [load_items(path, record) for path, record in zip(paths, records, strict=True)]
    tell_apart(records)
    columns, rows = comparison(records)
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
        plots=_plots(records),
        samples=_samples(records, items),
        definitions=_definitions(records),
        provenance=[_provenance(record) for record in records],
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
        ("Training", "As the checkpoints' run.json tells it.", plots.training_curves(records)),
    ]
    return [{"title": title, "note": note, "svg": svg} for title, note, svg in drawn if svg]


def _samples(records: Sequence[Record], items: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Cards of the images whose thumbnails the records carry: questions and captions with every model's answer."""
    thumbnails: dict[str, str] = {}
    for record in records:
        thumbnails |= record["samples"]
    cards: dict[str, dict[str, Any]] = {
        image: {"src": src, "questions": {}, "captions": []} for image, src in thumbnails.items()
    }
    for record, record_items in zip(records, items, strict=True):
        for item in record_items:
            card = cards.get(str(item["image_id"]))
            if card is None:
                continue
            shown = {"model": record["model"]["name"], "text": item["prediction"], "error": item["error"]}
            if item["task"] == "caption":
                card["references"] = item["references"]
                card["captions"].append(shown | {"cider": (item["scores"] or {}).get("CIDEr")})
            elif item["task"] == "vqa" and (
                item["question_id"] in card["questions"] or len(card["questions"]) < _QUESTIONS_PER_IMAGE
            ):
                question = card["questions"].setdefault(
                    item["question_id"],
                    {"text": item["question"], "answers": _counted(item["answers"]), "predictions": []},
                )
                question["predictions"].append(shown | {"accuracy": item["accuracy"]})
    return [card | {"id": image, "questions": list(card["questions"].values())} for image, card in cards.items()]


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
        rows[f"{task}: prompt"] = section["prompt"]
        if "decoding" in section:
            rows[f"{task}: decoding"] = json.dumps(section["decoding"])
        if section.get("tokenizer"):
            rows[f"{task}: tokenizer"] = section["tokenizer"]
    return rows
