"""Every peer computes the layer, through stand-ins for the libraries."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_fakes import TINY, a_cell
from torch.utils._python_dispatch import TorchDispatchMode

from nmm_serve.kernels.bench import check, measure
from nmm_serve.kernels.bench.device import CpuDevice
from nmm_serve.kernels.bench.measure import make_copies
from nmm_serve.kernels.bench.peers import PEERS, Weights
from nmm_serve.kernels.bench.plan import router_logits


def grouped(x, weights, group):
    out = torch.full((len(x), weights.shape[1]), float("nan"))
    for e in range(len(weights)):
        out[group == e] = x[group == e] @ weights[e].t()
    return out


def experts(x, expert, weight, gate_up, down):
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(expert[t].tolist(), weight[t], strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            y[t] += w * (down[e] @ (F.silu(gate) * up))
    return y


def fake_libraries():
    def deep_gemm_product(a, b, d, group):
        assert len(a) % 16 == 0
        for start in range(0, len(a), 16):  # a tile has one expert
            assert len(set(group[start : start + 16].tolist()) - {-1}) <= 1
        d.copy_(grouped(a, b, group).nan_to_num(nan=1e30))

    def sort_count(expert, num_experts):
        flat, order = expert.flatten().sort(stable=True)
        return flat, order, torch.bincount(flat, minlength=num_experts).cumsum(0)

    def parallel_linear(x, w, k, expert_N, order_N, offsets, gates=None, grouped_in=False, grouped_out=False):
        rows = x if grouped_in else x[order_N // k]
        out = grouped(rows, w.permute(0, 2, 1), expert_N)
        if grouped_out:
            return out
        back = torch.empty_like(out).index_copy(0, order_N, out)
        return (gates[:, None] @ back.view(*gates.shape, -1)).squeeze(1)

    def sonic(x, scores, token, expert, w1, b1, w2, b2, E, activation_type, stream_id, is_inference_mode_enabled):
        gate_up = w1.permute(2, 0, 1).reshape(E, -1, 2, x.shape[1]).transpose(1, 2).flatten(1, 2)  # was in turn
        k = len(expert) // len(x)
        assert token.tolist() == sorted(token.tolist())
        return experts(x, expert.view(-1, k), scores.view(-1, k), gate_up, w2.permute(2, 0, 1)), None

    def routing(logits, k, sm_first):
        assert sm_first
        weight, expert = logits.softmax(-1).topk(k)
        flat, order = expert.flatten().sort(stable=True)
        data = SimpleNamespace(expert=flat, gate_scal=weight.flatten()[order], k=k)
        return data, order, order

    def matmul_ogs(x, w, bias, data, gather_indx=None, scatter_indx=None, gammas=None):
        out = grouped(x if gather_indx is None else x[gather_indx // data.k], w.transpose(1, 2), data.expert)
        if scatter_indx is None:
            return out
        back = torch.empty_like(out).index_copy(0, scatter_indx, out * gammas[:, None])
        return back.view(-1, data.k, out.shape[1]).sum(1)

    def topk(x, logits, k, renormalize):
        weight, expert = logits.softmax(-1).topk(k)
        return weight, expert.int(), None

    return {
        "deep_gemm": {"get_mk_alignment_for_contiguous_layout": lambda: 16,
                      "m_grouped_bf16_gemm_nt_contiguous": deep_gemm_product},
        "scattermoe.parallel_experts": {"flatten_sort_count": sort_count, "parallel_linear": parallel_linear},
        "liger_kernel.ops": {"LigerFusedMoEFunction": SimpleNamespace(
            apply=lambda x, gate_up, down, expert, weight: experts(x, expert, weight, gate_up, down))},
        "sonicmoe.functional": {"moe_general_routing_inputs": sonic},
        "sonicmoe.enums": {"ActivationType": SimpleNamespace(SWIGLU="swiglu")},
        "triton_kernels.routing": {"routing": routing},
        "triton_kernels.matmul_ogs": {"matmul_ogs": matmul_ogs},
        "vllm.model_executor.layers.fused_moe.fused_moe": {
            "fused_experts": lambda x, gate_up, down, weight, expert: experts(x, expert, weight, gate_up, down)},
        "vllm.model_executor.layers.fused_moe.router.fused_topk_router": {"fused_topk": topk},
    }  # fmt: skip


@pytest.fixture
def libraries(monkeypatch):
    for name, content in fake_libraries().items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))


@pytest.mark.parametrize("routing", ["skewed", "empty"])
@pytest.mark.parametrize("peer", [peer for peer in PEERS if not peer.is_bound], ids=lambda peer: peer.name)
def test_every_peer_computes_the_layer(peer, routing, libraries):
    if peer.name.startswith("HF"):
        pytest.importorskip("transformers.integrations.moe", reason="transformers is not installed")
    cell = a_cell("prefill" if not peer.trains or peer.gpu_only else "train", tokens=21, routing=routing)
    generator = torch.Generator().manual_seed(0)
    logits = router_logits(cell, "cpu", generator)
    x, dy = (torch.randn(21, 16, generator=generator) for _ in range(2))
    (weights, _) = make_copies(TINY, CpuDevice(), torch.float32, cell.regime == "train")
    expected = measure.Expected(cell, weights, x, logits, dy)
    entry = measure.Entry(peer)
    measure.check_peer(entry, peer.prepare(weights, 2), expected)
    assert entry.reason is None
    assert entry.error < check.BOUND[torch.float32]


def test_the_loop_makes_the_weights_gradients_once():
    """At a few thousand tokens each further pass over all weights costs as much as an expert's products."""
    (peer,) = (peer for peer in PEERS if peer.name == "loop")
    (weights, _) = make_copies(TINY, CpuDevice(), torch.float32, True)
    shapes = [weights.gate_up.shape, weights.down.shape]
    made = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape in shapes and not out._is_view():
                made.append(out.shape)
            return out

    prepared = peer.prepare(weights, 2)
    with Noted():
        check.gradients(
            prepared.layer, torch.randn(21, 16), torch.randn(21, 8), prepared.parameters, torch.randn(21, 16)
        )
    assert sorted(made) == sorted(shapes)


def test_bound_runs_for_any_number_of_tokens():
    (peer,) = (peer for peer in PEERS if peer.is_bound)
    weights = Weights(torch.randn(8, 48, 16), torch.randn(8, 16, 24))
    for tokens in (1, 3, 64):
        out = peer.prepare(weights, 2).layer(torch.randn(tokens, 16), torch.randn(tokens, 8))
        assert out.shape == (8, math.ceil(tokens * 2 / 8), 16)
