"""Continuous batching over an exported model: one thread computes, everyone else submits jobs and reads events.

A prompt is computed in pieces, and between two pieces every running request gets a token. A request that ends, or whose
client left, makes room for the next one at once.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nmm_serve.engines.base import SamplingParams
from nmm_serve.engines.decoding import Decoding, log_softmax
from nmm_serve.errors import NMMError
from nmm_serve.onnx.manifest import Manifest
from nmm_serve.onnx.runtime import Runtime
from nmm_serve.prompt import Prompt

PIECE = 256
"""Tokens of a prompt computed at a time; an image that is longer stays whole."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """A new token, the end of a job, or both. `error` means that the server failed, not the client."""

    token: int | None = None
    logprob: float | None = None
    best: tuple[int, float] | None = None
    """The likeliest token, and its log-probability."""
    finish_reason: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """One answer in the making. `notify` is called in the scheduler's thread and must not block."""

    prompt: Prompt
    sampling: SamplingParams
    notify: Callable[[Event], None]
    decoding: Decoding
    prompt_logprobs: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    done: int = 0
    """Tokens of the prompt that are in the cache."""
    images_done: int = 0
    prompt_scores: list[tuple[float, int]] = field(default_factory=list)
    """(log-probability, rank) of each prompt token but the first, when `prompt_logprobs`."""
    outcome: str | None = None
    """`success`, `error` or `aborted`, once it has ended."""

    def cancel(self) -> None:
        """Nobody reads the answer any more."""
        self.cancelled = True


class Busy(Exception):
    """The waiting line is full."""


class Scheduler:
    """Args:
    runtime: the model; its slots are the requests that run at once.
    max_waiting: jobs that may wait for a slot; one more raises Busy.
    ended: called with each job that has ended.
    """

    def __init__(self, runtime: Runtime, max_waiting: int, ended: Callable[[Job], None] = lambda job: None):
        self.runtime = runtime
        self.max_waiting = max_waiting
        self.ended = ended
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.arriving: Job | None = None
        self.steps = 0
        self.failure: str | None = None
        """Why the thread died; None while it lives."""
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    def is_full(self) -> bool:
        """Whether another job would have to be refused."""
        free = self.runtime.slots - len(self.running) - (self.arriving is not None)
        return len(self.waiting) >= self.max_waiting + max(0, free)

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them or none; several of one request may go over the line's end. Raises Busy."""
        with self._wake:
            if self.is_full():
                raise Busy
            self.waiting.extend(jobs)
            self._wake.notify()

    def stop(self) -> None:
        """End the thread; what still runs is aborted."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=30)

    # ---- the thread

    def _loop(self) -> None:
        try:
            while self._wait():
                try:
                    self._drop_cancelled()
                    self._advance_prompt()
                    self._advance_running()
                except Exception as error:  # one bad batch must not end the server
                    logger.exception("a step failed")
                    self._fail_all(error)
            for job in [*self.running, *([self.arriving] if self.arriving else []), *self.waiting]:
                self._end(job, "aborted", Event(finish_reason="abort"))
        except BaseException as error:
            self.failure = type(error).__name__
            raise

    def _wait(self) -> bool:
        """Until there is something to do; False to end."""
        with self._wake:
            while not (self._stopping or self.waiting or self.running or self.arriving):
                self._wake.wait()
            return not self._stopping

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [job for job in self.waiting if job.cancelled]
            if gone:
                self.waiting = deque(job for job in self.waiting if not job.cancelled)
        for job in gone:
            self._end(job, "aborted")
        if self.arriving is not None and self.arriving.cancelled:
            job, self.arriving = self.arriving, None
            self._end(job, "aborted")
        for job in [job for job in self.running if job.cancelled]:
            self._leave(job)
            self._end(job, "aborted")

    def _advance_prompt(self) -> None:
        """Compute the next piece of the prompt that is coming in."""
        if self.arriving is None:
            if len(self.running) == self.runtime.slots:
                return
            with self._wake:
                if not self.waiting:
                    return
                self.arriving = self.waiting.popleft()
            self.runtime.clear(len(self.running))
        job = self.arriving
        ids = job.prompt.input_ids
        end, images = next_piece(job.prompt, job.done, job.images_done, self.runtime.manifest)
        image_PD = self.runtime.image_tokens(images)
        piece = ids[job.done : end]
        wanted = range(len(piece)) if job.prompt_logprobs else [len(piece) - 1]
        logits_KV = self.runtime.prefill(len(self.running), piece, image_PD, wanted)
        if job.prompt_logprobs:
            following = ids[job.done + 1 : end + 1]
            logprobs_KV = log_softmax(logits_KV[: len(following)])
            for logprobs_V, token in zip(logprobs_KV, following, strict=True):
                job.prompt_scores.append((float(logprobs_V[token]), int((logprobs_V > logprobs_V[token]).sum()) + 1))
        job.done, job.images_done = end, job.images_done + len(images)
        if end == len(ids):
            self.arriving = None
            self.running.append(job)
            self._step(job, logits_KV[-1])

    def _advance_running(self) -> None:
        if not self.running:
            return
        jobs = list(self.running)
        logits_BV = self.runtime.decode([job.decoding.tokens[-1] for job in jobs])
        self.steps += 1
        for job, logits_V in zip(jobs, logits_BV, strict=True):
            self._step(job, logits_V)

    def _step(self, job: Job, logits_V: np.ndarray) -> None:
        decoding = job.decoding
        try:
            token = decoding.step(logits_V, job.submitted)
        except NMMError as error:
            self._leave(job)
            self._end(job, "error", Event(finish_reason="error", error=str(error)))
            return
        logprob, best = (decoding.logprobs[-1], decoding.best[-1]) if job.sampling.logprobs else (None, None)
        event = Event(token=token, logprob=logprob, best=best, finish_reason=decoding.finish_reason)
        if decoding.finish_reason:
            self._leave(job)
            self._end(job, "success", event)
        else:
            job.notify(event)

    def _leave(self, job: Job) -> None:
        """Free a running job's slot; the last sequences move up."""
        slot = self.running.index(job)
        last = self.running.pop()
        if last is not job:
            self.runtime.move(len(self.running), slot)
            self.running[slot] = last
        if self.arriving is not None:
            self.runtime.move(len(self.running) + 1, len(self.running))

    def _end(self, job: Job, outcome: str, event: Event | None = None) -> None:
        job.outcome = outcome
        self.ended(job)
        if event is not None:
            job.notify(event)

    def _fail_all(self, error: Exception) -> None:
        jobs = [*self.running, *([self.arriving] if self.arriving else [])]
        self.running, self.arriving = [], None
        for job in jobs:
            self._end(job, "error", Event(finish_reason="error", error="the model failed on this batch; try again"))


def next_piece(
    prompt: Prompt, start: int, images_done: int, manifest: Manifest, size: int = PIECE
) -> tuple[int, Sequence[np.ndarray]]:
    """Where the piece of a prompt that begins at `start` ends, and the images in it. No image is cut: a piece that
    would end inside one ends before it, or, if it begins with it, after it."""
    ids = prompt.input_ids
    limit = min(start + size, len(ids))
    end, taken = start, 0
    while end < limit:
        if ids[end] != manifest.image_token_id:
            end += 1
            continue
        height, width, _ = prompt.pixels[images_done + taken].shape
        length = height * width // manifest.patch_size**2
        if end + length > limit and end > start:
            break
        end, taken = end + length, taken + 1
    return end, prompt.pixels[images_done : images_done + taken]
