"""Is an exported model the checkpoint? Compares the graphs with torch, position by position, before they appear."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.cache_utils import DynamicCache

from nmm_serve.engines.decoding import log_softmax
from nmm_serve.errors import EngineError
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.onnx.runtime import Runtime
from nmm_serve.processor import NMMProcessor
from nmm_serve.prompt import Prompt

NEW_TOKENS = 16
FP32_BOUND = 2e-3
"""Nats. Seen: 1e-4 for logits whose standard deviation is 12."""
LEAST_CORRELATION = {"int8": 0.95, "int4": 0.8}
"""Median over positions of the correlation between torch's logits and the quantised model's. Weights that were laid out
wrongly give 0; random ones, which bear quantisation worst, gave 0.99 and 0.93."""

SENTENCES = ("Describe the image.", "What colour is the largest object?", "How many are there? Answer with a number.")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of comparing an exported model with torch in fp32, both reading torch's greedy tokens."""

    prompts: int
    images: int
    positions: int
    """Positions compared: the last of each prompt, and the new tokens after it."""
    greedy_equal: int
    """Positions where both choose the same token."""
    max_logprob_diff: float
    """Largest difference in nats between log-probabilities of torch's token."""
    mean_logprob_diff: float
    median_correlation: float
    """Between the logits of one position, median over positions."""

    def to_record(self) -> dict[str, Any]:
        return asdict(self)


def check(model: NMMForConditionalGeneration, processor: NMMProcessor, runtime: Runtime) -> Check:
    """Compare on prompts with no image, one and two, of several shapes; several run together.

    Raises EngineError when they differ by more than rounding (fp32) or than these few bits can explain.
    """
    prompts = list(check_prompts(processor, runtime))
    if not prompts:
        raise EngineError(
            f"the model's context of {runtime.manifest.context_length} tokens is too short for any prompt of the check"
        )
    expected = [torch_logits(model, processor, prompt) for prompt in prompts]
    actual = [onnx_logits(runtime, group, tokens) for group, tokens in batches(prompts, expected, runtime.slots)]
    got = [logits for batch in actual for logits in batch]
    result = summarise([logits for logits, _ in expected], got, sum(len(prompt.pixels) for prompt in prompts))
    verdict(result, [logits for logits, _ in expected], got, runtime.manifest.quantization)
    return result


def check_prompts(processor: NMMProcessor, runtime: Runtime) -> Iterator[Prompt]:
    """What fits the model's context of: chats with drawn images of different shapes, and without."""
    sizes: list[tuple[tuple[int, int], ...]] = [(), ((64, 64),), ((90, 40),), ((30, 100), (64, 64)), ((200, 150),)]
    for number, shapes in enumerate(sizes):
        images = [drawn(number + 7 * k, *size) for k, size in enumerate(shapes)]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": SENTENCES[number % len(SENTENCES)]}]
        prompt = processor.prompt_of_chat([{"role": "user", "content": content}], images)
        if len(prompt.input_ids) + NEW_TOKENS <= runtime.manifest.context_length:
            yield prompt


def drawn(seed: int, width: int, height: int) -> Image.Image:
    """Coloured blocks and noise, the same for the same seed."""
    random = np.random.default_rng(seed)
    blocks = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height))
    noise = random.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(blocks, np.int64) + noise).clip(0, 255).astype(np.uint8))


@torch.inference_mode()
def torch_logits(
    model: NMMForConditionalGeneration, processor: NMMProcessor, prompt: Prompt
) -> tuple[np.ndarray, list[int]]:
    """Logits [NEW_TOKENS, V] and the greedy tokens."""
    inputs: dict[str, Any] = dict(processor.collate([processor.to_tensors(prompt)]))
    inputs.pop("attention_mask")
    cache = DynamicCache(config=model.config)
    rows, tokens = [], []
    for _ in range(NEW_TOKENS):
        rows.append(model(**inputs, past_key_values=cache, logits_to_keep=1).logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
        inputs = {"input_ids": torch.tensor([[tokens[-1]]])}
    return torch.stack(rows).numpy(), tokens


def batches(
    prompts: Sequence[Prompt], expected: Sequence[tuple[np.ndarray, list[int]]], size: int
) -> Iterator[tuple[Sequence[Prompt], list[list[int]]]]:
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        yield prompts[part], [tokens for _, tokens in expected[part]]


def onnx_logits(runtime: Runtime, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The same from the graphs, told torch's tokens; the prompts run together. Each [NEW_TOKENS, V]."""
    steps = []
    for slot, prompt in enumerate(prompts):
        runtime.clear(slot)
        image_PD = runtime.image_tokens(prompt.pixels)
        steps.append([runtime.prefill(slot, prompt.input_ids, image_PD, [len(prompt.input_ids) - 1])[0]])
    for position in range(NEW_TOKENS - 1):
        logits_BV = runtime.decode([row[position] for row in tokens])
        for rows, logits_V in zip(steps, logits_BV, strict=True):
            rows.append(logits_V.copy())
    return [np.stack(rows) for rows in steps]


def summarise(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], num_images: int) -> Check:
    a_NV, b_NV = np.concatenate(expected), np.concatenate(actual)
    real_V = a_NV[0] > np.finfo(np.float32).min  # not the masked placeholder
    chosen_N1 = a_NV.argmax(-1)[:, None]
    diff_N = np.abs(np.take_along_axis(log_softmax(a_NV) - log_softmax(b_NV), chosen_N1, -1))
    x_NV, y_NV = (v[:, real_V] - v[:, real_V].mean(-1, keepdims=True) for v in (a_NV, b_NV))
    norm_N = np.maximum(np.linalg.norm(x_NV, axis=-1) * np.linalg.norm(y_NV, axis=-1), 1e-30)
    return Check(
        prompts=len(expected),
        images=num_images,
        positions=len(a_NV),
        greedy_equal=int((a_NV.argmax(-1) == b_NV.argmax(-1)).sum()),
        max_logprob_diff=float(diff_N.max()),
        mean_logprob_diff=float(diff_N.mean()),
        median_correlation=float(np.median((x_NV * y_NV).sum(-1) / norm_N)),
    )


def verdict(result: Check, expected: Sequence[np.ndarray], actual: Sequence[np.ndarray], quantization: str) -> None:
    """Raises EngineError unless the two are one model."""
    numbers = (
        f"greedy tokens equal at {result.greedy_equal} of {result.positions} positions, log-probabilities up to "
        f"{result.max_logprob_diff:.2g} nats apart, logits correlated {result.median_correlation:.3f}"
    )
    advice = "nothing was written; this is a fault of the exporter or of ONNX Runtime, please report it with the config"
    if not all(np.isfinite(logits).all() for logits in actual):
        raise EngineError(f"the exported model gives NaN or infinite logits; {advice}")
    if quantization != "none":
        least = LEAST_CORRELATION[quantization]
        if result.median_correlation < least:
            raise EngineError(f"the {quantization} model differs from torch: {numbers}, expected {least}; {advice}")
        return
    a_NV, b_NV = np.concatenate(expected), np.concatenate(actual)
    a_N, b_N = a_NV.argmax(-1)[:, None], b_NV.argmax(-1)[:, None]
    gap_N = np.take_along_axis(a_NV, a_N, -1) - np.take_along_axis(a_NV, b_N, -1)
    if result.max_logprob_diff > FP32_BOUND or gap_N.max() > 2 * FP32_BOUND:
        raise EngineError(f"the exported model differs from torch: {numbers}; {advice}")
