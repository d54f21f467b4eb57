"""Results and samples in lm-eval's own files, saved by its own code, and checked: lm-eval only warns when it cannot."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import hash_string

from nmm_serve.engines.base import Engine
from nmm_serve.errors import DataError
from nmm_serve.evals.records import check_place, describe_model

_TRACKER = "lm_eval.loggers.evaluation_tracker"


def task_hash(samples: Sequence[dict[str, Any]]) -> str:
    """lm-eval's hash of a task's documents, prompts and targets: equal where the same was asked."""
    return hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))


class ResultsFolder:
    """`FOLDER/NAME-HASH/results_TIME.json` and `samples_TASK_TIME.jsonl`. lm-eval itself would draw a random name for
    the model's folder in each run; here it is the model's, with its hash, so that two models never mix.

    Raises DataError where it cannot be written.
    """

    def __init__(self, folder: Path, name: str, engine: Engine) -> None:
        known = describe_model(engine.model)["hash"]
        self.name = f"{name}-{known[:12]}" if known else name
        self.folder = folder
        check_place(folder / self.name / "results.json")
        self.tracker = EvaluationTracker(output_path=str(folder))

    def save(
        self,
        results: dict[str, Any],
        samples: dict[str, list[dict[str, Any]]],
        failed: dict[str, dict[int, str]],
        log_samples: bool,
    ) -> list[str]:
        """Returns the files that were written. Raises DataError when lm-eval could not write one."""
        with _warnings_raised():
            self.tracker.save_results_aggregated(results=results, samples=samples)
            place = self.folder / str(self.tracker.general_config_tracker.model_name_sanitized)
            files = [place / f"results_{self.tracker.date_id}.json"]
            for task, documents in samples.items() if log_samples else ():
                logged = [_with_error(sample, failed.get(task, {})) for sample in documents]
                self.tracker.save_results_samples(task_name=task, samples=logged)
                files.append(place / f"samples_{task}_{self.tracker.date_id}.jsonl")
                _check_lines(files[-1], len(documents))
        if not files[0].is_file():
            raise DataError(f"{files[0]} was not written by lm-eval; check the folder")
        return [str(file) for file in files]


def _with_error(sample: dict[str, Any], broken: dict[int, str]) -> dict[str, Any]:
    """A copy, since lm-eval changes what it saves. A failed document has its error, and null for its metrics."""
    if sample["doc_id"] not in broken:
        return dict(sample)
    return {**sample, **dict.fromkeys(sample["metrics"]), "error": broken[sample["doc_id"]]}


def _check_lines(file: Path, expected: int) -> None:
    found = 0
    if file.is_file():
        with file.open("rb") as stream:
            found = sum(1 for line in stream if json.loads(line))
    if found != expected:
        raise DataError(f"{file} holds {found} of {expected} samples; is the disk full?")


class _warnings_raised:
    """lm-eval logs a warning, and then the reason, where it could not save."""

    def __enter__(self) -> None:
        self.said: list[str] = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]
        self.logger = logging.getLogger(_TRACKER)
        self.before = self.logger.level, self.logger.propagate
        self.logger.addHandler(self.handler)
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False

    def __exit__(self, kind: Any, _error: Any, _traceback: Any) -> None:
        self.logger.removeHandler(self.handler)
        self.logger.setLevel(self.before[0])
        self.logger.propagate = self.before[1]
        for line, reason in zip(self.said, [*self.said[1:], ""], strict=True):
            if line.startswith("Could not save"):
                raise DataError(f"lm-eval could not save its results: {reason or line}")
