"""Engines whose likelihoods are known, and lm-eval tasks of a few documents."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.instance import Instance
from tiny_data import tiny_processor

from nmm_serve.engines.base import Output, Progress, Request, Score, ScoreRequest

Likelihood = Callable[[str, str, int], float]
"""From context, continuation and its number of tokens to nats."""


class KnownEngine:
    """Tokenises as our engines do, and answers by functions of the words. Keeps what it was asked."""

    name = "known"
    context_length = 512

    def __init__(self, likelihood: Likelihood, says: Callable[[str], str] = lambda _: "", model: str = "known-model"):
        self.model = model
        self.processor: Any = tiny_processor()
        self.likelihood, self.says = likelihood, says
        self.asked: list[Any] = []
        self.closed = False

    def words(self, ids: Any) -> str:
        return self.processor.decode(list(ids))

    def loglikelihood(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        self.asked += requests
        return [
            Score(
                logprob=self.likelihood(self.words(r.context), self.words(r.continuation), len(r.continuation)),
                is_greedy=False,
                num_tokens=len(r.continuation),
            )
            for r in requests
        ]

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        self.asked += requests
        if progress:
            progress(len(requests))
        return [Output(text=self.says(self.words(r.prompt))) for r in requests]

    def describe(self) -> dict[str, Any]:
        return {"dtype": "none", "device": "none"}

    def close(self) -> None:
        self.closed = True


def uniform(_context: str, _continuation: str, num_tokens: int) -> float:
    return -num_tokens * math.log(len(tiny_processor().tokenizer))


def coin(context: str, continuation: str, _num_tokens: int) -> float:
    """Random, but the same for the same words."""
    return -hashlib.sha256(f"{context}|{continuation}".encode()).digest()[0] / 10.0


def instance(kind: str, *arguments: Any, doc_id: int = 0, task: str = "toy") -> Instance:
    return Instance(request_type=kind, doc={}, arguments=tuple(arguments), idx=0, metadata=(task, doc_id, 1))  # type: ignore[arg-type]


def likelihood(context: str, continuation: str, *images: Any, doc_id: int = 0) -> Instance:
    extra = ({"visual": list(images)},) if images else ()
    return instance("loglikelihood", context, continuation, *extra, doc_id=doc_id)


def write_task(folder: Path, name: str, docs: Sequence[dict[str, Any]], **config: Any) -> Path:
    """A task of the user's: its YAML and its data in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    fields = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields | config))
    return folder
