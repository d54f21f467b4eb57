"""Ask an engine what lm-eval's requests were made into: in chunks, without what is kept, failures in their places."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from nmm_serve.engines.base import Request, ScoreRequest
from nmm_serve.errors import NMMError
from nmm_serve.evals.answers import Answers

CHUNK = 256
"""Requests handed to the engine in one call. The engine batches them as it sees fit."""


class Asking:
    """What is asked of one engine for the tasks of one evaluation.

    Args:
        kept: answers of an earlier run, which are not asked again, and where new ones go.
        versions: of the tasks, by name; kept answers of another version do not count.
        chunk_size: requests handed to the engine in one call; a kill loses no more than these.
    """

    def __init__(self, kept: Answers, versions: Mapping[str, Any], chunk_size: int) -> None:
        self.kept, self.versions, self.chunk_size = kept, versions, chunk_size
        self.requests = 0
        """Asked, or found among the kept ones."""

    def __call__(
        self,
        asked: Sequence[Any],
        owners: Sequence[Instance | None],
        ask: Callable[[list[Any]], Sequence[Any]],
        progress: Callable[[int], None],
        order: Callable[[Any], int] = lambda _: 0,
    ) -> list[Any]:
        """Answers in order of requests, or errors, which stand for themselves. `owners`: lm-eval's request that each
        was made for; `order` sorts what is asked."""
        results = list(asked)
        good = [i for i, request in enumerate(asked) if not isinstance(request, NMMError)]
        self.requests += len(good)
        progress(len(asked) - len(good))

        def in_chunks(waiting: list[int]) -> Iterator[tuple[int, Any]]:
            for start in range(0, len(waiting), self.chunk_size):
                chunk = [asked[good[k]] for k in waiting[start : start + self.chunk_size]]
                yield from zip(range(start, start + len(chunk)), ask(chunk), strict=True)

        answers = self.kept.complete(
            [self._keyed(asked[i], owners[i]) for i in good], in_chunks, progress, lambda k: order(asked[good[k]])
        )
        for i, answer in zip(good, answers, strict=True):
            results[i] = answer
        return results

    def _keyed(self, request: Request | ScoreRequest, owner: Instance | None) -> tuple[str | None, str | None]:
        """Key and id."""
        if owner is None:
            return None, None
        task = str(owner.task_name)
        return self.kept.key_of(request, task, self.versions.get(task)), f"{task}/{owner.doc_id}"
