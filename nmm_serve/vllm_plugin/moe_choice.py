"""Whose kernels compute the experts under vLLM: vLLM's own, or ours where a benchmark on the same GPU showed them
faster. Imports nothing heavy.

The environment variable NMM_SERVE_MOE decides: `auto` (the default) looks into the table, `vllm` and `nmm-serve`
insist. The table is made of the records of `nmm-serve kernels bench` by `nmm-serve kernels choose`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

VARIABLE = "NMM_SERVE_MOE"
SETTINGS = ("auto", "vllm", "nmm-serve")
TABLE = Path(__file__).with_name("moe_choice.json")
OURS, THEIRS = "nmm-serve", "vLLM fused_moe"
"""Names of the peers in the benchmark's records."""
REGIMES = "decode", "prefill"
"""What serving does, of the benchmark's regimes."""

Choice = Literal["vllm", "nmm-serve"]


@dataclass(frozen=True)
class ExpertsLayer:
    """What a measurement holds for. `gpu` is None where there is none."""

    gpu: str | None
    dtype: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


def choose(layer: ExpertsLayer, obstacle: str | None = None, table: Path = TABLE) -> Choice:
    """Who computes this layer.

    Args:
        obstacle: why our kernels cannot, if they cannot: parallelism or quantization.

    Raises ValueError for an unknown setting, and when ours are insisted on but cannot be had.
    """
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in SETTINGS:
        raise ValueError(f"{VARIABLE} is {setting!r}; set it to one of {', '.join(SETTINGS)}")
    if setting == "nmm-serve" and obstacle is not None:
        raise ValueError(f"{VARIABLE}=nmm-serve cannot be had with {obstacle}; unset it or drop the option")
    if setting != "auto":
        return "vllm" if setting == "vllm" else "nmm-serve"
    if obstacle is not None:
        return "vllm"
    faster = any(row["faster"] for row in read_table(table) if row["layer"] == asdict(layer))
    return "nmm-serve" if faster else "vllm"


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    """Rows of `layer`, `cells`, `worst_ratio`, `faster`, `reason`, `measured`. Empty where nothing was measured."""
    return json.loads(path.read_text())["rows"]


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What benchmarks say, taken together, of each layer. Ours are `faster` if they were timed with vLLM's in decode
    and in prefill, and were nowhere slower: one serving process does both with the same layer, and vLLM picks it once.
    A cell in which ours failed was lost. `worst_ratio` is null where no cell has both.

    Only inference counts, and CUDA graphs where vLLM's had them, since vLLM runs so.
    """
    found: dict[ExpertsLayer, Evidence] = {}
    for record in records:
        for cell in record["cells"]:
            results = {result["peer"]: result for result in cell["results"]}
            mine, theirs = results.get(OURS, {}), results.get(THEIRS, {})
            mode = "graph" if "graph" in theirs else "eager"
            if cell["regime"] not in REGIMES or (mode in mine and mode not in theirs):
                continue
            numbers = {name: cell[name] for name in ("hidden", "intermediate", "experts", "top_k")}
            layer = ExpertsLayer(gpu=record["device"]["name"], dtype=record["dtype"], **numbers)
            evidence = found.setdefault(layer, Evidence())
            evidence.measured = max(evidence.measured, record["created"])
            if mode in mine:
                evidence.ratios.append((cell["regime"], theirs[mode]["median_s"] / mine[mode]["median_s"]))
            else:
                evidence.failures.append(cell["regime"])
    return [evidence.row(layer) for layer, evidence in found.items()]


@dataclass
class Evidence:
    """On one layer, from all its cells."""

    measured: str = ""
    ratios: list[tuple[str, float]] = field(default_factory=list)
    """Regime, and vLLM's time over ours."""
    failures: list[str] = field(default_factory=list)
    """Regimes of the cells in which ours gave no time."""

    def row(self, layer: ExpertsLayer) -> dict[str, Any]:
        worst = min((ratio for _, ratio in self.ratios), default=None)
        missing = [regime for regime in REGIMES if all(regime != known for known, _ in self.ratios)]
        reason = None
        if self.failures:
            reason = f"cells in which ours failed: {len(self.failures)}"
        elif missing:
            reason = f"not compared in {' and '.join(missing)}"
        elif worst is not None and worst <= 1:
            reason = "ours are slower in a cell"
        return {
            "layer": asdict(layer),
            "cells": len(self.ratios) + len(self.failures),
            "worst_ratio": worst,
            "faster": reason is None,
            "reason": reason,
            "measured": self.measured,
        }


def merged(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newer row wins where two are of one layer."""
    latest: dict[ExpertsLayer, dict[str, Any]] = {}
    for row in sorted([*old, *new], key=lambda row: row["measured"]):
        latest[ExpertsLayer(**row["layer"])] = row
    return list(latest.values())
