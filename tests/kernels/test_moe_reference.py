import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nmm_serve.kernels.moe_reference import load_balancing_loss, moe_mlp, route


def every_token_alone(x, weight, expert, gate_up, down):
    """The definition, one token and one expert at a time."""
    out = x * 0
    for t in range(len(x)):
        for w, e in zip(weight[t], expert[t], strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            out[t] += w * (down[e] @ (F.silu(gate) * up))
    return out


@settings(deadline=None, max_examples=40)
@given(T=st.integers(0, 9), D=st.integers(1, 17), Fh=st.integers(1, 13), E=st.integers(1, 5), data=st.data())
def test_output_and_every_gradient_match_the_definition(T, D, Fh, E, data):
    k = data.draw(st.integers(1, E))
    one_expert = data.draw(st.booleans())
    generator = torch.Generator().manual_seed(T * 1000 + D)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, gate_up, down, logits = leaf(T, D), leaf(E, 2 * Fh, D), leaf(E, D, Fh), leaf(T, E)
    bias = torch.zeros(E, dtype=torch.float64)
    bias[0] = 50.0 if one_expert else 0.0  # every token to one expert, the others empty
    results = []
    for mlp in (moe_mlp, every_token_alone):
        probs = (logits + bias).softmax(-1)
        weight, expert = probs.topk(k, dim=-1)
        y = mlp(x, weight, expert, gate_up, down)
        grads = torch.autograd.grad((y * y.detach().cos()).sum(), (x, gate_up, down, logits), allow_unused=True)
        results.append((y, *grads))
    for ours, expected in zip(*results, strict=True):
        if ours is None or expected is None:
            assert T == 0
            continue
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_route_takes_the_largest_and_may_rescale():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    weight, expert, probs = route(logits, 2, renormalize=False)
    assert expert.tolist() == [[1, 2]]
    assert torch.equal(weight, probs[:, [1, 2]])
    rescaled, _, _ = route(logits, 2, renormalize=True)
    assert rescaled.sum().item() == pytest.approx(1.0)


def test_load_balancing_loss_is_one_when_balanced_and_E_when_collapsed():
    balanced = torch.full((8, 4), 0.25)
    assert load_balancing_loss(balanced, torch.arange(8)[:, None] % 4).item() == pytest.approx(1.0)
    collapsed = F.one_hot(torch.zeros(8, dtype=torch.long), 4).float()
    assert load_balancing_loss(collapsed, torch.zeros(8, 1, dtype=torch.long)).item() == pytest.approx(4.0)


def test_load_balancing_loss_leaves_padding_out():
    probs = torch.rand(6, 4).softmax(-1)
    expert = torch.tensor([[0], [1], [2], [3], [0], [0]])
    valid = torch.tensor([True] * 4 + [False] * 2)
    expected = load_balancing_loss(probs[:4], expert[:4])
    torch.testing.assert_close(load_balancing_loss(probs, expert, valid), expected)
