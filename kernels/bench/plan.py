"""What is measured: shapes, regimes, routings, and in which order, since the time is limited.

Legend: T tokens, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nmm_serve.kernels.bench.roofline import Work


@dataclass(frozen=True)
class Shape:
    """One layer: model width, expert hidden size, number of experts."""

    name: str
    hidden: int
    intermediate: int
    experts: int = 8

    @property
    def weights(self) -> int:
        """Numbers in the weights of one expert."""
        return 3 * self.hidden * self.intermediate


SHAPES = {
    shape.name: shape
    for shape in (Shape("A", 512, 1024), Shape("B", 1024, 2816), Shape("C", 2048, 5632), Shape("D", 4096, 14336))
}
"""Few experts at widths from 512 to 4096; D is Mixtral's layer, which others publish figures for."""

TINY = {shape.name: shape for shape in (Shape("A", 64, 96), Shape("B", 96, 160))}
"""For a CPU: they show that the benchmark works, and nothing about speed."""

REGIMES = {
    "decode": (1, 2, 4, 8, 16, 32, 64),
    "prefill": (1024, 4096, 16384, 65536),
    "train": (4096, 16384, 65536),
}
"""Tokens of each regime. `train` is forward and backward."""

TINY_REGIMES = {"decode": (1, 8), "prefill": (64,), "train": (32,)}

ROUTINGS = ("multinomial", "balanced", "skewed", "empty")
"""multinomial: experts drawn at random; balanced: equal counts; skewed: half of the tokens want the first expert;
empty: the last expert gets none."""


@dataclass(frozen=True)
class Cell:
    """One measurement: a shape, a regime, a number of tokens, a routing."""

    shape: Shape
    regime: str
    tokens: int
    top_k: int
    routing: str

    @property
    def label(self) -> str:
        return f"{self.shape.name} {self.regime} T={self.tokens} k={self.top_k} {self.routing}"


def cells(shapes: Sequence[Shape], regimes: dict[str, tuple[int, ...]], top_ks: Sequence[int] = (2, 1)) -> list[Cell]:
    """Most telling first: one number of tokens for each shape and regime, then the other numbers, then all of them for
    the next top-k, then the other routings. Within each of these, shape by shape, so that weights are made once."""
    middle = {regime: tokens[len(tokens) // 2] for regime, tokens in regimes.items()}
    grid = [(s, r, t) for s in shapes for r, tokens in regimes.items() for t in tokens]
    grid.sort(key=lambda place: place[2] != middle[place[1]])
    found = [Cell(s, r, t, k, ROUTINGS[0]) for k in top_ks for s, r, t in grid]
    return found + [
        Cell(s, r, t, top_ks[0], routing) for s in shapes for r, t in middle.items() for routing in ROUTINGS[1:]
    ]


def router_logits(cell: Cell, device: str, generator: torch.Generator) -> torch.Tensor:
    """[T, E] float32 that route as the cell says. Drawn, hence without ties: all peers choose the same experts."""
    T, E = cell.tokens, cell.shape.experts
    logits_TE = torch.randn(T, E, generator=generator, device=device)
    if cell.routing == "balanced":
        turn_TK = (torch.arange(T * cell.top_k, device=device) % E).view(T, cell.top_k)
        logits_TE.scatter_add_(1, turn_TK, torch.full(turn_TK.shape, 20.0, device=device))
    elif cell.routing == "skewed":
        logits_TE[::2, 0] += 20.0
    elif cell.routing == "empty":
        logits_TE[:, -1] -= 40.0
    return logits_TE


def work(cell: Cell, logits_TE: torch.Tensor, element_size: int) -> Work:
    """The least that any implementation must read, write and multiply for this routing."""
    shape, T, training = cell.shape, cell.tokens, cell.regime == "train"
    active = int(logits_TE.topk(cell.top_k, dim=-1).indices.unique().numel())
    passes = 3 if training else 1  # backward: weights are read again, their gradients written; twice the products
    return Work(
        num_bytes=passes * element_size * (active * shape.weights + 2 * T * shape.hidden),
        flops=passes * 2 * T * cell.top_k * shape.weights,
    )


def step_bytes(cell: Cell, element_size: int) -> int:
    """What a training step has in memory beside the weights, about: activations, their gradients and the weights'."""
    shape, rows = cell.shape, cell.tokens * cell.top_k
    return element_size * (rows * (6 * shape.intermediate + 4 * shape.hidden) + shape.experts * shape.weights)
