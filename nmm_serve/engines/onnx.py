"""ONNX Runtime in this process: an exported model on a CPU, without torch.

Prompts are computed one at a time, new tokens of all running requests together; a request that ends makes room for the
next one at once.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nmm_serve.engines.base import InChunks, Output, Progress, Request, Score, ScoreRequest
from nmm_serve.engines.decoding import Decoding, check_room, log_softmax
from nmm_serve.errors import ConfigError, ImageError, PromptError
from nmm_serve.onnx.runtime import Runtime
from nmm_serve.prompt import Prompt, TokenizerFile


class OnnxEngine(InChunks):
    """An exported model.

    Args:
        model: directory that `nmm-serve export` wrote.
        batch_size: requests that are decoded together.
        threads: of one operator; default: one for each physical core.

    Raises:
        CheckpointError: `model` is not an exported model.
        EngineError: ONNX Runtime is not installed.
    """

    name = "onnx"

    def __init__(self, model: str, *, batch_size: int = 16, threads: int | None = None):
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        self.model = str(model)
        self.runtime = Runtime(model, slots=batch_size, threads=threads)
        manifest = self.manifest = self.runtime.manifest
        self.encoder = TokenizerFile(Path(model), manifest.patch_size, manifest.image_size)
        self.batch_size, self.threads = batch_size, threads
        self.context_length = manifest.context_length

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        del self.runtime

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "onnxruntime": self.runtime.onnxruntime.__version__,
            "device": "cpu",
            "dtype": {"none": "float32"}.get(self.manifest.quantization, self.manifest.quantization),
            "threads": self.threads,
            "batch_size": self.batch_size,
            # int8: one scale for all rows of a step; int4: another kernel for a row that is alone in its step
            **({"answers_depend_on_batch": True} if self.manifest.quantization != "none" else {}),
        }

    def encode(self, request: Request) -> Prompt:
        """Raises PromptError for a prompt that leaves no room for the new tokens, ImageError for a bad image."""
        if request.messages is not None:
            prompt = self.encoder.prompt_of_chat(request.messages, request.images)
        else:
            assert request.prompt is not None
            prompt = self.encoder.prompt_of_text(request.prompt, request.images)
        check_room(len(prompt.input_ids), request.sampling.max_tokens, self.context_length)
        return prompt

    def prefill(self, slot: int, prompt: Prompt, wanted: Sequence[int]) -> np.ndarray:
        """Put a prompt into an empty slot; the logits at the positions `wanted`. [K, V]"""
        self.runtime.clear(slot)
        return self.runtime.prefill(slot, prompt.input_ids, self.runtime.image_tokens(prompt.pixels), wanted)

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        outputs: list[Output | None] = [None] * len(requests)
        waiting = iter(range(len(requests)))
        running: list[Running] = []
        while True:
            begin = time.perf_counter()  # one clock for all that there is room for now: prefills wait for each other
            while len(running) < self.batch_size and (index := next(waiting, None)) is not None:
                task = Running(index, requests[index], begin)
                try:
                    prompt = self.encode(task.request)
                except (PromptError, ImageError) as error:
                    outputs[index] = Output(text="", finish_reason="error", error=str(error))
                    if progress:
                        progress(1)
                    continue
                task.start(self, len(running), prompt)
                running.append(task)
                self.collect(running, outputs, progress)
            if not running:
                return outputs  # type: ignore[return-value]
            logits_BV = self.runtime.decode([task.decoding.tokens[-1] for task in running])
            for task, logits_V in zip(running, logits_BV, strict=True):
                task.decoding.step(logits_V, task.begin)
            self.collect(running, outputs, progress)

    def collect(self, running: list["Running"], outputs: list[Output | None], progress: Progress | None) -> None:
        """Take finished requests out, and let the last ones move into their slots."""
        for slot in reversed(range(len(running))):
            task = running[slot]
            if task.decoding.finish_reason:
                outputs[task.index] = task.output()
                last = running.pop()
                if last is not task:
                    self.runtime.move(len(running), slot)
                    running[slot] = last
                if progress:
                    progress(1)

    def loglikelihood(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """Raises PromptError when a context and its continuation do not fit the model's context."""
        scores = []
        for request in requests:
            context = self.encoder.prompt_of_text(request.context, request.images)
            target = self.encoder.continuation_ids(request.continuation)
            if not target:
                raise PromptError("an empty continuation has no likelihood")
            ids = context.input_ids + target
            if len(ids) > self.context_length:
                raise PromptError(
                    f"context and continuation have {len(ids)} tokens, "
                    f"over the model's context of {self.context_length}"
                )
            wanted = range(len(ids) - len(target) - 1, len(ids) - 1)
            logprobs_TV = log_softmax(self.prefill(0, Prompt(ids, context.pixels), wanted))
            scores.append(
                Score(
                    logprob=float(logprobs_TV[np.arange(len(target)), target].sum()),
                    is_greedy=bool((logprobs_TV.argmax(-1) == target).all()),
                    num_tokens=len(target),
                )
            )
            if progress:
                progress(1)
        return scores


class Running:
    """A request that has a slot. Its clock, `begin`, starts when there is room for it."""

    def __init__(self, index: int, request: Request, begin: float):
        self.begin = begin
        self.encode_begin = time.perf_counter()
        self.index = index
        self.request = request

    def start(self, engine: OnnxEngine, slot: int, prompt: Prompt) -> None:
        self.preprocess_s = time.perf_counter() - self.encode_begin
        self.image_s = prompt.image_s
        self.num_prompt_tokens = len(prompt.input_ids)
        self.decoding = Decoding(self.request.sampling, engine.encoder.decode, engine.manifest.eos_token_ids)
        encoder_begin = time.perf_counter()
        image_PD = engine.runtime.image_tokens(prompt.pixels)
        prefill_begin = time.perf_counter()
        engine.runtime.clear(slot)
        logits_1V = engine.runtime.prefill(slot, prompt.input_ids, image_PD, [self.num_prompt_tokens - 1])
        self.decoding.step(logits_1V[0], self.begin)
        self.encoder_s, self.prefill_s = prefill_begin - encoder_begin, time.perf_counter() - prefill_begin

    def output(self) -> Output:
        return self.decoding.output(
            self.num_prompt_tokens,
            self.preprocess_s,
            image_s=self.image_s,
            host_s=self.preprocess_s - self.image_s,
            encoder_s=self.encoder_s,
            prefill_s=self.prefill_s,
        )
