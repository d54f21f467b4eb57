"""The layer on a CPU: outputs, gradients and statistics against the definition, in fp64; operators; torch.compile."""

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from nmm_serve.kernels import moe_ops, moe_reference
from nmm_serve.kernels.moe import expert_mlp, modality_logits, moe_mlp, route


def definition(x, logits, gate_up, down, top_k, score, renormalize):
    """One token and one expert at a time."""
    probs = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    weight, expert = probs.topk(top_k, dim=-1)
    if renormalize:
        weight = weight / weight.sum(-1, keepdim=True)
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
    score, renormalize = data.draw(st.sampled_from(["softmax", "sigmoid"])), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(T * 1000 + D)

    def leaf(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, gate_up, down, logits = leaf(T, D), leaf(E, 2 * Fh, D), leaf(E, D, Fh), leaf(T, E)
    bias = torch.zeros(E, dtype=torch.float64)
    bias[0] = 50.0 if data.draw(st.booleans()) else 0.0  # every token to one expert, the others empty
    results = []
    for ours in (True, False):
        if ours:
            y, _ = moe_mlp(x, logits + bias, gate_up, down, top_k=k, score=score, renormalize=renormalize)
        else:
            y = definition(x, logits + bias, gate_up, down, k, score, renormalize)
        grads = torch.autograd.grad((y * y.detach().cos()).sum(), (x, gate_up, down, logits), allow_unused=True)
        results.append((y, *grads))
    for ours, expected in zip(*results, strict=True):
        if ours is None or expected is None:
            assert T == 0
            continue
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_route_takes_the_largest_and_may_rescale():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    routing = route(logits, 2)
    assert routing.expert_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weight_TK, logits.softmax(-1)[:, [1, 2]])
    assert route(logits, 2, renormalize=True).weight_TK.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(route(logits, 2, score="sigmoid").weight_TK, logits.sigmoid()[:, [1, 2]])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_statistics_and_their_gradients_count_only_what_counts(score):
    torch.manual_seed(0)
    T, E = 700, 5  # more than one block of the routing pass
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    counted = torch.rand(T) < 0.6
    stats = route(logits, 2, score=score, counted_T=counted).stats
    loss = stats.load_balancing_loss() + 0.1 * stats.z_loss()

    real = logits[counted]
    probs = real.softmax(-1) if score == "softmax" else real.sigmoid() / real.sigmoid().sum(-1, keepdim=True)
    chosen = F.one_hot(real.topk(2, dim=-1).indices, E).sum(1).double()
    expected = E * ((chosen.mean(0) / 2) * probs.mean(0)).sum() + 0.1 * real.logsumexp(-1).square().mean()

    assert stats.slots_E.tolist() == chosen.sum(0).tolist()
    assert stats.num_tokens.item() == counted.sum().item()
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, logits)
    (theirs,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs)


def test_load_balancing_loss_is_one_when_balanced_and_E_when_collapsed():
    balanced = torch.eye(4).repeat(4, 1) * 1e-6  # all probabilities equal, all choices equally often
    assert route(balanced, 1).stats.load_balancing_loss().item() == pytest.approx(1.0, rel=1e-5)
    collapsed = torch.tensor([[100.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    assert route(collapsed, 1).stats.load_balancing_loss().item() == pytest.approx(4.0)


def test_hard_routing_by_modality_is_two_dense_layers():
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(6, 8), torch.randn(2, 10, 8), torch.randn(2, 8, 5)
    is_image = torch.tensor([True, False, False, True, True, False])
    y, stats = moe_mlp(x, modality_logits(is_image), gate_up, down, top_k=1)
    gate_0, up_0 = (x @ gate_up[0].T).chunk(2, dim=-1)
    gate_1, up_1 = (x @ gate_up[1].T).chunk(2, dim=-1)
    text, image = (F.silu(gate_0) * up_0) @ down[0].T, (F.silu(gate_1) * up_1) @ down[1].T
    torch.testing.assert_close(y, torch.where(is_image[:, None], image, text))
    assert stats.slots_E.tolist() == [3, 3]


def test_the_decode_path_is_the_sorted_path():
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(7, 12), torch.randn(4, 18, 12), torch.randn(4, 12, 9)
    routing = route(torch.randn(7, 4), 3)
    act = moe_reference.decode_up(x, gate_up, routing.expert_TK, routing.weight_TK)
    y = moe_reference.combine(moe_reference.decode_down(act, down, routing.expert_TK), 3)
    torch.testing.assert_close(y, expert_mlp(x, routing.weight_TK, routing.expert_TK, gate_up, down))


def test_inference_is_training_without_gradients():
    for score, renormalize, T in (("softmax", False, 11), ("sigmoid", True, 700), ("softmax", True, 0)):
        x, logits, gate_up, down = leaves(T)
        options = {"top_k": 2, "score": score, "renormalize": renormalize, "counted_T": torch.arange(T) % 3 != 1}
        trained, stats = moe_mlp(x, logits, gate_up, down, **options)
        with torch.no_grad():
            inferred, inferred_stats = moe_mlp(x, logits, gate_up, down, **options)
        assert trained.requires_grad
        assert not inferred.requires_grad
        torch.testing.assert_close(inferred, trained, rtol=0, atol=0)
        torch.testing.assert_close(inferred_stats.stat_BS, stats.stat_BS, rtol=0, atol=0)


def leaves(T=11, D=8, Fh=6, E=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (T, D), (T, E), (E, 2 * Fh, D), (E, D, Fh)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def test_operators_pass_opcheck():
    top_k = 2
    x, logits, gate_up, down = leaves()
    counted = torch.ones(len(x), dtype=torch.bool)
    torch.library.opcheck(torch.ops.nmm_serve.route.default, (logits, counted, top_k, False, True))
    weight, expert, count, _ = moe_ops.route(logits, None, top_k, False, False)
    weight = weight.detach().requires_grad_()
    torch.library.opcheck(torch.ops.nmm_serve.expert_mlp.default, (x, weight, expert, count, gate_up, down, True))

    x, logits, gate_up, down, weight = (t.detach() for t in (x, logits, gate_up, down, weight))
    stat = moe_ops.route(logits, None, top_k, False, False)[3]
    order, offset = moe_ops.sort_slots(expert, count)
    act, pre = moe_ops.up_proj(x, gate_up, order, offset, top_k, True)
    slot = moe_ops.down_proj(act, down, order, offset, weight)
    dpre, wact, _ = moe_ops.down_backward(x, down, pre, order, offset, weight)
    launches = {
        "route_backward": (weight, stat, logits, expert, None, False, True),
        "count_experts": (expert, 4),
        "sort_slots": (expert, count),
        "up_proj": (x, gate_up, order, offset, top_k, True),
        "down_proj": (act, down, order, offset, weight),
        "combine": (slot, top_k),
        "decode_up": (x, gate_up, expert, weight),
        "decode_down": (act, down, expert),
        "decode_layer": (x, logits, counted, gate_up, down, top_k, False, True),
        "moe_inference": (x, logits, None, gate_up, down, top_k, True, False),
        "down_backward": (x, down, pre, order, offset, weight),
        "up_backward": (dpre, gate_up, order, offset),
        "up_weight_grad": (dpre, x, order, offset, top_k),
        "down_weight_grad": (x, wact, order, offset, top_k),
        "expert_mlp": (x, weight, expert, count, gate_up, down, False),
        "expert_mlp_backward": (x, x, weight, gate_up, down, pre, order, offset, [True, True, True]),
    }
    for name, args in launches.items():  # these have no gradient, so what is left to check is schema and shapes
        operator = getattr(torch.ops.nmm_serve, name).default
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
    frozen = (*launches["expert_mlp_backward"][:-1], [False, True, False])
    operator = torch.ops.nmm_serve.expert_mlp_backward.default
    torch.library.opcheck(operator, frozen, test_utils=("test_schema", "test_faketensor"))
    frozen_weights = (x.clone().requires_grad_(), weight, expert, count, gate_up, down, True)
    torch.library.opcheck(torch.ops.nmm_serve.expert_mlp.default, frozen_weights)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch):
    launched = []
    for name in ("up_backward", "up_weight_grad", "down_weight_grad"):
        launch = getattr(moe_ops, name)
        monkeypatch.setattr(
            moe_ops, name, lambda *args, name=name, launch=launch: launched.append(name) or launch(*args)
        )

    def gradients(*wanted, T=11):
        tensors = [t.requires_grad_(name in wanted) for t, name in zip(leaves(T), "xlgd", strict=True)]
        launched.clear()
        moe_mlp(*tensors, top_k=2)[0].sum().backward()
        return [t.grad for t in tensors]

    everything = gradients(*"xlgd")
    assert launched == ["down_weight_grad", "up_weight_grad", "up_backward"]
    for wanted, needed in (("xl", ["up_backward"]), ("g", ["up_weight_grad"]), ("d", ["down_weight_grad"]), ("l", [])):
        for name, grad, expected in zip("xlgd", gradients(*wanted), everything, strict=True):
            torch.testing.assert_close(grad, expected if name in wanted else None, rtol=0, atol=0)
        assert launched == needed
    assert [grad is None for grad in gradients("d", T=0)] == [True, True, True, False]


def test_double_backward_is_refused():
    x, logits, gate_up, down = leaves()
    frozen_router = moe_mlp(x, logits.detach(), gate_up, down, top_k=2)[0].sum()
    for loss, leaf in ((frozen_router, x), (route(logits, 2).stats.z_loss(), logits)):
        with pytest.raises(RuntimeError, match="no double backward: .* without create_graph=True"):
            torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_layer_again(reentrant):
    plain, recomputed = leaves(), leaves()
    moe_mlp(*plain, top_k=2)[0].square().sum().backward()
    layer = partial(moe_mlp, top_k=2)
    torch.utils.checkpoint.checkpoint(
        lambda *tensors: layer(*tensors)[0], *recomputed, use_reentrant=reentrant
    ).square().sum().backward()
    for ours, expected in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_torch_compile_keeps_one_graph_and_the_same_gradients_for_every_length():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(x, logits, gate_up, down):
        y, stats = moe_mlp(x, logits, gate_up, down, top_k=2, renormalize=True)
        return y, stats.load_balancing_loss() + 0.1 * stats.z_loss()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for T in (11, 300):
        args = leaves(T)
        grads = []
        for function in (layer, compiled):
            y, loss = function(*args)
            grads.append((y, *torch.autograd.grad(y.square().sum() + loss, args)))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected)
    assert counter.frame_count == 1


def test_autocast_runs_the_products_in_its_type():
    x, logits, gate_up, down = leaves(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = moe_mlp(x, logits, gate_up, down, top_k=2)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (x, logits, gate_up, down))
    torch.testing.assert_close(y.float(), moe_mlp(x, logits, gate_up, down, top_k=2)[0], rtol=0.05, atol=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, "at least top_k = 5"),
        ({"score": "max"}, "'softmax' or 'sigmoid'"),
        ({"counted_T": torch.ones(3)}, "11 bools"),
        ({"down_EDF": torch.ones(4, 8, 5)}, r"down_EDF must be \[4, 8, 6\]"),
        ({"x_TD": torch.ones(10, 8, dtype=torch.float64)}, "10 rows"),
        ({"x_TD": torch.ones(11, 8)}, "give one type"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, logits, gate_up, down = leaves()
    arguments = {"x_TD": x, "router_logits_TE": logits, "gate_up_E2FD": gate_up, "down_EDF": down, "top_k": 2} | change
    for training in (True, False):
        with pytest.raises(ValueError, match=message), torch.set_grad_enabled(training):
            moe_mlp(**arguments)


@pytest.mark.parametrize("training", [True, False])
def test_logits_of_another_number_of_experts_are_refused(training):
    x, logits, gate_up, down = leaves()
    logits = torch.cat((logits, logits[:, :1]), dim=1)
    message = r"11 rows, one a token of x, of 4 experts, not \[11, 5\]"
    with pytest.raises(ValueError, match=message), torch.set_grad_enabled(training):
        moe_mlp(x, logits, gate_up, down, top_k=2)


def test_the_cpu_does_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from nmm_serve.kernels.moe import moe_mlp; "
        "y, _ = moe_mlp(torch.ones(3, 8), torch.ones(3, 4), torch.ones(4, 6, 8), torch.ones(4, 8, 3), top_k=2); "
        "print(y.shape)"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.stdout == "torch.Size([3, 8])\n", run.stderr[-2000:]
