"""How fast the exported model computes, against torch eager and against what the memory could deliver.

All variants take turns within each round, so that a change of the machine's load meets all of them; ratios are taken
within a round. Weights are random: they do not change the time.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from nmm_serve.checkpoint import load_model, save_checkpoint
from nmm_serve.config import NMMConfig
from nmm_serve.evals import stats
from nmm_serve.image_processor import NMMImageProcessor
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.onnx.export import export
from nmm_serve.onnx.quantize import Quantization
from nmm_serve.onnx.runtime import Runtime
from nmm_serve.presets import preset
from nmm_serve.processor import NMMProcessor
from nmm_serve.sizing import count_params
from nmm_serve.tokenizer import token_ids, train_tokenizer

BANDWIDTH_BYTES = 2**30
"""Of the array that measures reading; larger than any cache."""
SETTLE_S = 0.05
"""Between two variants: a thread pool goes on spinning for a moment, and would disturb the next one's."""

DEFINITIONS = {
    "prefill_tokens_per_s": "prompt tokens / seconds from handing over a prompt to its last position's logits",
    "decode_tokens_per_s": "new tokens / seconds, one sequence, after the prompt",
    "read_gib_per_s": "1 GiB of fp32, bytes read / seconds; of its sum, its largest value and a matrix-vector product "
    "the fastest",
    "bandwidth_share": "bytes that one token reads in fp32 (the weights it meets, without the embedding table, and the "
    "KV cache, half of the new tokens in it) x decode_tokens_per_s / read_gib_per_s of the same round",
    "x_torch": "tokens_per_s / torch eager's of the same round",
    "x_dense": "decode_tokens_per_s of the MoE / the dense model's of the same round and type",
    "value": "median over rounds, with a percentile bootstrap interval over rounds",
}

Step = Callable[[], object]


class TorchVariant:
    """Eager, fp32, with a KV cache."""

    def __init__(self, checkpoint: Path):
        self.model = load_model(checkpoint, torch.float32)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.model(input_ids=torch.tensor([ids]), past_key_values=self.cache, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self, token: int) -> None:
        self.model(input_ids=torch.tensor([[token]]), past_key_values=self.cache, logits_to_keep=1)


class OnnxVariant:
    def __init__(self, exported: Path, threads: int):
        self.runtime = Runtime(exported, slots=1, threads=threads)

    def prefill(self, ids: Sequence[int]) -> None:
        self.runtime.clear(0)
        self.runtime.prefill(0, ids, None, [len(ids) - 1])

    def decode(self, token: int) -> None:
        self.runtime.decode([token])


def random_checkpoint(path: Path, size: str, family: str, context: int) -> NMMConfig:
    """A checkpoint of a preset with random weights and the full vocabulary. `family`: early or moe."""
    found, tokenizer = preset(size), train_tokenizer(["a"], 300)
    config = NMMConfig(
        hidden_size=found.hidden_size, num_hidden_layers=found.num_hidden_layers,
        intermediate_size=found.intermediate_size, max_position_embeddings=context,
        num_experts=8 if family == "moe" else 0, **token_ids(tokenizer),
    )  # fmt: skip
    torch.manual_seed(0)
    processor = NMMProcessor(NMMImageProcessor(), tokenizer, chat_template=tokenizer.chat_template)
    save_checkpoint(path, NMMForConditionalGeneration(config), processor, {})
    return config


def measure(
    folder: Path,
    size: str,
    families: Sequence[str],
    quantizations: Sequence[Quantization],
    *,
    threads: int,
    rounds: int,
    prompt_tokens: int,
    new_tokens: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Make, export and time the models; `folder` holds them meanwhile. `progress` counts rounds."""
    torch.set_num_threads(threads)
    variants: dict[tuple[str, str], TorchVariant | OnnxVariant] = {}
    bytes_a_token, sizes = {}, {}
    for family in families:
        config = random_checkpoint(folder / family, size, family, prompt_tokens + new_tokens + 320)
        counts = count_params(config)
        cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        bytes_a_token[family] = 4 * (
            counts.decoder_active + config.vocab_size * config.hidden_size + cached * (prompt_tokens + new_tokens / 2)
        )
        sizes[family] = {"parameters": counts.total, "active": counts.active}
        for quantization in quantizations:
            out = folder / f"{family}-{quantization}"
            export(folder / family, out, quantization)
            variants[family, quantization] = OnnxVariant(out, threads)
        variants[family, "torch"] = TorchVariant(folder / family)
    random = np.random.default_rng(0)
    matrix = torch.ones(BANDWIDTH_BYTES // 4 // 4096, 4096)
    reading: list[float] = []
    times: dict[str, dict[tuple[str, str], list[float]]] = {"prefill": {}, "decode": {}}
    for number in range(rounds + 1):  # the first one warms up
        # none of them is the fastest on every machine, and a limit must not be passed by what it limits
        read_s = min(timed(reader) for reader in (matrix.sum, matrix.amax, lambda: matrix @ matrix[0]))
        for index in random.permutation(len(variants)):
            key, variant = list(variants.items())[index]
            ids = random.integers(10, 300, prompt_tokens + new_tokens).tolist()
            time.sleep(SETTLE_S)
            prefill_s = timed(partial(variant.prefill, ids[:prompt_tokens]))
            decode_s = timed(partial(_decode_all, variant, ids[prompt_tokens:]))
            if number:
                times["prefill"].setdefault(key, []).append(prompt_tokens / prefill_s)
                times["decode"].setdefault(key, []).append(new_tokens / decode_s)
        if number:
            reading.append(BANDWIDTH_BYTES / read_s / 2**30)
        progress(1)
    rows = []
    for family, kind in variants:
        prefill, decode = (np.array(times[step][family, kind]) for step in ("prefill", "decode"))
        row: dict[str, Any] = {
            "family": family,
            "variant": kind,
            "prefill_tokens_per_s": summary(prefill),
            "prefill_x_torch": summary(prefill / np.array(times["prefill"][family, "torch"])),
            "decode_tokens_per_s": summary(decode),
            "decode_x_torch": summary(decode / np.array(times["decode"][family, "torch"])),
            "bandwidth_share": None,
            "x_dense": None,
        }
        if kind in ("torch", "none"):
            row["bandwidth_share"] = summary(decode * bytes_a_token[family] / 2**30 / np.array(reading))
        if family == "moe" and "early" in families:
            row["x_dense"] = summary(decode / np.array(times["decode"]["early", kind]))
        rows.append(row)
    return {
        "definitions": DEFINITIONS,
        "preset": size,
        "sizes": sizes,
        "threads": threads,
        "rounds": rounds,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "read_gib_per_s": summary(np.array(reading)),
        "variants": rows,
    }


def _decode_all(variant: Any, ids: list[int]) -> None:
    for token in ids:
        variant.decode(token)


def timed(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def summary(values: np.ndarray) -> dict[str, Any]:
    (interval,) = stats.quantile_intervals(values, (0.5,), unit="round")
    return {"value": float(np.median(values)), "interval": interval.as_dict() if interval else None, "n": len(values)}
