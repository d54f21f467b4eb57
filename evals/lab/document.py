"""The document of a comparison: one JSON file that grows while the comparison runs and can be taken up again."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nmm_serve.errors import DataError
from nmm_serve.evals.annotations import read_json
from nmm_serve.evals.lab import training
from nmm_serve.evals.lab.contenders import TEXT_TOKENS, Group, describe
from nmm_serve.evals.lab.workload import Pictures
from nmm_serve.evals.latency import DEFINITIONS, SWEEPS, Load
from nmm_serve.evals.records import environment, without_password, write_text

FORMAT = "nmm-serve/latency-comparison/2"
COMPARISON_DEFINITIONS = {
    "ratio": "statistic of the model's times / the same of the baseline's (the first model of the group) over the "
    "requests that both answered; above 1: the model is slower",
    "interval": "paired percentile bootstrap: whole rounds are drawn, the same ones for both models",
    "round": "every model in turn gets the same requests, one wave of `concurrency` of them",
    "lower_latency": "1 - 1 / ratio of medians: by how much the baseline's latency is lower than the model's",
    "better_training": "ratio of medians of step_s - 1: how many more samples the baseline trains on in the same time",
    "startup_s": "from starting the engine's process to its being ready for requests, Python's own start and what "
    "it compiles included; the compilers' caches are empty",
    "flops": f"matrix products of one forward pass over one full-size image and {TEXT_TOKENS} tokens of text",
    "random_weights": "the weights are random and every answer has a forced length: times and memory do not hang on "
    "what a model has learned, quality does",
    "operator_calls": "operators that one request makes torch call, views left out, nothing compiled: up to the first "
    "token, and for each further token",
    "failures": "models that did not open or broke off; `cell` says where. A model that broke off is in none of that "
    "cell's numbers, the others are; a cell that ended all of them twice has no results",
}
_SAME = ("seed", "images", "load", "groups", "environment")
"""What must be equal for a document to be taken up."""


def new_document(groups: Sequence[Group], load: Load, files: Sequence[Path], seed: int) -> dict[str, Any]:
    document = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *map(without_password, sys.argv[1:])],
        "seed": seed,
        "final": False,
        "environment": environment(),
        "definitions": DEFINITIONS | COMPARISON_DEFINITIONS | training.DEFINITIONS,
        "images": Pictures(files, seed).describe(),
        "load": asdict(load),
        "groups": [{"label": group.label, "models": describe(group)} for group in groups],
        "runs": [],
        "training": [],
        "failures": [],
    }
    return json.loads(json.dumps(document))  # tuples as they will be read back


def take_up(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The document at `path` for a run that would begin with `fresh`. What is in it stays; models that did not open
    in an unfinished run are tried again, and so is the cell in which its last model broke off (once: see
    `Comparison.close_cell`).

    Raises DataError when it was measured otherwise.
    """
    found = load_comparison(path)
    for name in _SAME:
        if found[name] != fresh[name]:
            raise DataError(
                f"{path} cannot be taken up: its {name} differ from what would be measured now; leave out --resume to "
                "measure all anew"
            )
    closed = {(run["group"], run["engine"]) for run in (*found["runs"], *found["training"]) if run["final"]}
    measured = {
        (run["group"], run["engine"], name(cell))
        for section, name in (("runs", cell_name), ("training", training_cell_name))
        for run in found[section]
        for cell in run["cells"]
    }
    found["failures"] = [
        failure
        for failure in found["failures"]
        if (failure["group"], failure["engine"]) in closed
        or (failure["group"], failure["engine"], failure["cell"]) in measured
    ]
    return found | {"final": False}


def keep(document: dict[str, Any], out: Path) -> None:
    write_text(out, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def load_comparison(path: Path) -> dict[str, Any]:
    """Read a comparison. Raises DataError for a file that is none."""
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path} is not a comparison of latency; `nmm-eval latency --compare -o` writes them")
    absent = [key for key in (*_SAME, "runs", "training", "failures", "final") if key not in document]
    if absent:
        raise DataError(f"{path} is damaged: it lacks {', '.join(absent)}; run the comparison again")
    return document


def cell_name(cell: dict[str, Any]) -> str:
    if cell["varies"] is None:
        return f"{cell['resolution']} px, concurrency {cell['concurrency']}"
    return f"{cell['varies']} {cell['workload'][SWEEPS[cell['varies']]]}"


def training_cell_name(cell: dict[str, Any]) -> str:
    return f"resolution {cell['resolution']}"


def results(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Every run, cell and result of a model in it."""
    for run in document["runs"]:
        for cell in run["cells"]:
            for result in cell["results"]:
                yield run, cell, result


def ratio_of(cell: dict[str, Any], model: str, metric: str, statistic: str = "p50") -> dict[str, Any] | None:
    """A model's ratio to the first one; None for that one itself, and where one of the two broke off."""
    wanted = (model, metric, statistic)
    return next((r for r in cell["ratios"] if (r["model"], r["metric"], r["statistic"]) == wanted), None)


def failed(document: dict[str, Any]) -> list[str]:
    """One line per model that failed and per cell with failed requests."""
    lines = [failure_line(failure) for failure in document["failures"]]
    for run, cell, result in results(document):
        if result["failed"]:
            lines.append(
                f"{run['group']} {run['engine']} {result['model']}, {cell_name(cell)}: {result['failed']} of "
                f"{result['n']} requests: " + "; ".join(result["errors"])
            )
    return lines


def failure_line(failure: dict[str, Any]) -> str:
    where = "" if failure["cell"] is None else f", {failure['cell']}"
    return f"{failure['group']} {failure['engine']} {failure['model']}{where}: {failure['error']}"
