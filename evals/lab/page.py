"""A comparison of latency as a folder: `latency.md` with the tables, and its plots as SVG files beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nmm_serve.errors import DataError
from nmm_serve.evals.lab import plots
from nmm_serve.evals.lab.document import failed
from nmm_serve.evals.lab.tables import Table, all_tables
from nmm_serve.evals.records import Record, write_text


def write_page(document: dict[str, Any], quality: Sequence[Record], folder: Path) -> Path:
    """Write tables and plots; returns the page. `quality`: vqa or caption records of the compared models, by hash.

    Raises DataError for a record of quality that says nothing of the compared models.
    """
    compared = {model["hash"]: model["name"] for group in document["groups"] for model in group["models"]}
    for record in quality:
        model = record["model"]
        if model["hash"] not in compared:
            raise DataError(
                f"the quality record of {model['name']} is of checkpoint {model['hash']}, which is none of the "
                f"compared ones: {', '.join(f'{name} {digest}' for digest, name in compared.items())}"
            )
        if not plots.scores(record):
            raise DataError(
                f"the quality record of {model['name']} has neither VQA accuracy nor CIDEr; give one of `nmm-eval vqa` "
                "or `nmm-eval caption`"
            )
    drawn = {
        "ratios": ("Ratios to the first model, with paired intervals", plots.ratios(document)),
        "training": ("Training steps, with paired intervals", plots.training(document)),
        "parts": ("Where the time goes", plots.parts(document)),
        "pareto": ("Quality against latency and memory", plots.pareto(document, quality)),
    }
    lines = ["# Latency side by side", ""]
    environment = document["environment"]
    hardware = ", ".join([f"{environment['cpu_count']} x {environment['cpu']}", *environment["gpus"]])
    lines += [f"Measured {document['created']} on {hardware}; images: {document['images']}.", ""]
    if not document["final"]:
        lines += ["**Not final: the run was cut off.**", ""]
    if any(model["random_weights"] for group in document["groups"] for model in group["models"]):
        lines += [f"Random weights: {document['definitions']['random_weights']}.", ""]
    lines += [f"- failed: {line}" for line in failed(document)]
    lines += [""] if failed(document) else []
    for name, (title, svg) in drawn.items():
        if svg is not None:
            write_text(folder / f"{name}.svg", svg)
            lines += [f"## {title}", "", f"![{title}]({name}.svg)", ""]
    for table in all_tables(document):
        lines += [*_markdown(table), ""]
    lines += ["## Definitions", "", *(f"- `{name}`: {text}" for name, text in document["definitions"].items())]
    page = folder / "latency.md"
    write_text(page, "\n".join(lines) + "\n")
    return page


def _markdown(table: Table) -> list[str]:
    title, columns, rows = table

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [f"## {title}", "", line(columns), line(["---"] * len(columns)), *map(line, rows)]
