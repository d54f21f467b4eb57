"""What a training step costs: forward pass, loss, backward pass and optimizer, timed with torch on the models.

The trainer is not part of it: no loader, no packing, no schedule. Every model sees the same samples, in turn (A-B-A-B).
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nmm_serve.errors import NMMError
from nmm_serve.evals.lab import resources
from nmm_serve.evals.lab.contenders import TEXT_TOKENS
from nmm_serve.evals.lab.interleave import SETTLE_S, ratios
from nmm_serve.evals.lab.process import Child, answer
from nmm_serve.evals.lab.workload import Pictures
from nmm_serve.evals.latency import quantiles

BATCH = 2
"""Samples of a step."""
DEFINITIONS = {
    "step_s": f"one optimizer step on {BATCH} samples: forward pass, loss over the text, backward pass, clipping, "
    "AdamW; not decoding images or making batches, which other processes do while a trainer computes",
    "sample": f"one image and {TEXT_TOKENS} text tokens",
    "samples_per_s": "samples of the measured steps / their seconds",
}


class Steps(Protocol):
    """What measuring needs of a model: `Trainee` in a run, a fake in a test."""

    name: str

    def step(self, resolution: int | None, numbers: Sequence[int]) -> tuple[float, int]: ...


class Trainee(Child):
    """A checkpoint in training, in a process of its own. Raises EngineError when it does not load."""

    def __init__(self, name: str, model: Path, *, files: Sequence[Path] = (), seed: int = 0) -> None:
        self.name = name
        super().__init__(f"{name} in training", _run, str(model), tuple(map(str, files)), seed)

    def step(self, resolution: int | None, numbers: Sequence[int]) -> tuple[float, int]:
        """Seconds of one step on the samples of these numbers, and their tokens."""
        return self.ask("step", resolution, list(numbers))

    def memory(self) -> dict[str, Any]:
        return self.ask("memory")


def measure_steps(
    models: Sequence[Steps],
    resolution: int | None,
    rounds: int,
    warmup: int,
    numbers: Iterator[int],
    *,
    baseline: str,
    image_size: int,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Steps of every model in turn on the same samples: one cell of the document's `training`."""
    seconds: dict[str, list[float]] = {model.name: [] for model in models}
    tokens = 0
    failures = []
    for round_ in range(-warmup, rounds):
        batch = [next(numbers) for _ in range(BATCH)]
        for model in models:
            progress(1)
            if model.name not in seconds:
                continue
            sleep(SETTLE_S)
            try:
                step_s, tokens = model.step(resolution, batch)
            except NMMError as error:
                failures.append({"model": model.name, "error": str(error)})
                del seconds[model.name]
                continue
            if round_ >= 0:
                seconds[model.name].append(step_s)
    return {
        "resolution": resolution or image_size,
        "tokens_per_step": tokens,
        "results": [
            {
                "model": name,
                "n": len(values),
                "step_s": quantiles(values, seed=seed, keep=True),
                "samples_per_s": BATCH * len(values) / sum(values),
            }
            for name, values in seconds.items()
        ],
        "ratios": [
            ratio
            for name, values in seconds.items()
            if name != baseline and baseline in seconds
            for ratio in ratios(
                {"model": name, "baseline": baseline, "metric": "step_s"},
                values,
                seconds[baseline],
                range(len(values)),
                seed,
            )
        ],
        "failures": failures,
    }


def _run(pipe: Connection, model: str, files: tuple[str, ...], seed: int) -> None:
    os.dup2(2, 1)  # what libraries print is no result
    answer(pipe, lambda: _open(model, files, seed))


def _open(model: str, files: tuple[str, ...], seed: int) -> tuple[dict[str, Any], Callable[..., Any]]:
    import torch

    from nmm_serve.checkpoint import load_model, load_processor
    from nmm_serve.image_processor import takes_raw_pixels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = device == "cuda"  # as nmm-train does: float32 weights, bfloat16 products
    network = load_model(model, None, device).train()
    processor = load_processor(model)
    processor.image_processor.raw_pixels = takes_raw_pixels(device)
    own = processor.image_processor.image_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    pictures = Pictures(files, seed)
    special = {*processor.tokenizer.all_special_ids, processor.image_token_id}
    words = [token for token in range(len(processor.tokenizer)) if token not in special]
    resources.reset_peak()

    def batch_of(resolution: int | None, numbers: Sequence[int]) -> tuple[dict[str, torch.Tensor], int]:
        processor.image_processor.image_size = resolution or own
        samples = []
        for number in numbers:
            sample = processor.encode_prompt(processor.image_token, [pictures.picture(number)])
            text = np.random.default_rng((seed, number)).choice(words, TEXT_TOKENS)
            sample.input_ids.extend(map(int, text))
            samples.append(sample)
        tokens = sum(len(sample.input_ids) for sample in samples)
        batch = processor.collate(samples, padding_side="right")
        nothing = (batch["input_ids"] == processor.image_token_id) | (batch["attention_mask"] == 0)
        batch["labels"] = batch["input_ids"].masked_fill(nothing, -100)
        if batch["attention_mask"].all():
            del batch["attention_mask"]
        return {name: tensor.to(device) for name, tensor in batch.items()}, tokens

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(resolution: int | None, numbers: Sequence[int]) -> tuple[float, int]:
        batch, tokens = batch_of(resolution, numbers)
        begin = now()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = network(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return now() - begin, tokens

    def handle(what: str, *message: Any) -> Any:
        return step(*message) if what == "step" else resources.memory()

    dtype = "bfloat16 products, float32 weights" if half else str(network.dtype).removeprefix("torch.")
    about = {"device": device, "dtype": dtype, "optimizer": "AdamW, fused"}
    return about | {"compiled": False, "batch": BATCH}, handle
