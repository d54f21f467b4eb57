"""The MoE layer's output and every gradient against plain fp64, on whatever device and in whatever type."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nmm_serve.kernels.moe import moe_mlp

BOUND = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
"""Largest error as a share of the largest value: a few roundings of the type. (Seen in the interpreter: 4e-7, 8e-4.)"""


@dataclass(frozen=True)
class Case:
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    score: str = "softmax"
    renormalize: bool = False
    pattern: str = "random"
    padding: bool = False


CASES = [
    Case(37, 48, 40, 4, 2),
    Case(1, 16, 16, 8, 1),
    Case(9, 8, 8, 1, 1, padding=True),
    Case(5, 33, 17, 3, 3, "sigmoid", True),  # odd sizes: no TMA
    Case(20, 24, 40, 5, 4, renormalize=True, padding=True),
    Case(67, 16, 24, 4, 1, pattern="one expert takes all"),
    Case(67, 16, 24, 4, 2, "sigmoid", pattern="empty expert", padding=True),
    Case(70, 16, 8, 40, 2, padding=True),  # three blocks of the routing pass
    Case(300, 40, 24, 2, 1, pattern="skewed"),  # the large tiles, with fewer programs than tiles
    Case(0, 16, 16, 4, 2),
]


def dense(x, logits, gate_up, down, case: Case):
    """Every expert on every token, then the chosen ones weighted; and the router's losses."""
    score = logits.softmax(-1) if case.score == "softmax" else logits.sigmoid()
    weight, expert = score.topk(case.top_k, dim=-1)
    if case.renormalize:
        weight = weight / weight.sum(-1, keepdim=True)
    mixed = torch.zeros_like(score).scatter(1, expert, weight)
    gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, dim=-1)
    y = torch.einsum("tef,edf,te->td", F.silu(gate) * up, down, mixed)
    return y, score / score.sum(-1, keepdim=True), expert


def router_loss(logits, probs, expert, counted):
    if not counted.any():
        return logits.sum() * 0
    chosen = F.one_hot(expert, logits.shape[1]).sum(1)[counted].double()
    share = chosen.sum(0) / chosen.sum()
    balance = logits.shape[1] * (share * probs[counted].mean(0)).sum()
    return balance + 0.1 * logits[counted].logsumexp(-1).square().mean()


def inputs(case: Case, dtype: torch.dtype, device: str):
    generator = torch.Generator().manual_seed(case.tokens)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    logits = normal(case.tokens, case.experts)
    if case.pattern == "one expert takes all":
        logits[:, 1] = logits.amax(1) + 1
    elif case.pattern == "empty expert":
        logits[:, 0] = logits.amin(1) - 1
    elif case.pattern == "skewed":
        logits[:, 0] += 1.5
    x = normal(case.tokens, case.hidden).to(dtype)
    gate_up = (normal(case.experts, 2 * case.intermediate, case.hidden) / case.hidden**0.5).to(dtype)
    down = (normal(case.experts, case.hidden, case.intermediate) / case.intermediate**0.5).to(dtype)
    counted = torch.arange(case.tokens) % 3 != 1 if case.padding else torch.ones(case.tokens, dtype=torch.bool)
    dy = normal(case.tokens, case.hidden).to(dtype)
    return [t.to(device) for t in (x, logits, gate_up, down)], counted.to(device), dy.to(device)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    leaves, counted, dy = inputs(case, dtype, device)
    leaves = [t.requires_grad_() for t in leaves]
    options = {"top_k": case.top_k, "score": case.score, "renormalize": case.renormalize}
    y, stats = moe_mlp(*leaves, **options, counted_T=counted if case.padding else None)
    loss = stats.load_balancing_loss() + 0.1 * stats.z_loss()
    grads = torch.autograd.grad((y, loss), leaves, (dy, torch.ones_like(loss)))
    with torch.no_grad():
        inferred, inferred_stats = moe_mlp(*leaves, **options, counted_T=counted if case.padding else None)

    exact = [t.detach().double().requires_grad_() for t in leaves]
    exact_y, probs, expert = dense(*exact, case)
    exact_loss = router_loss(exact[1], probs, expert, counted)
    exact_grads = torch.autograd.grad((exact_y, exact_loss), exact, (dy.double(), torch.ones_like(exact_loss)))

    names = ("output", "inference", "dx", "dlogits", "dgate_up", "ddown", "router loss")
    ours = (y, inferred, *grads, loss)
    expected = (exact_y, exact_y, *exact_grads, exact_loss)
    for name, a, b in zip(names, ours, expected, strict=True):
        assert a.shape == b.shape, (name, case)
        if b.numel() and (case.tokens or name != "router loss"):
            error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)
            assert error <= BOUND[dtype], f"{name} is off by {error:.2g} in {case}, {dtype}"
    slots = torch.bincount(expert[counted].reshape(-1), minlength=case.experts)
    assert torch.equal(stats.slots_E.long(), slots), case
    torch.testing.assert_close(inferred_stats.stat_BS, stats.stat_BS)
    assert int(stats.num_tokens) == int(counted.sum())
