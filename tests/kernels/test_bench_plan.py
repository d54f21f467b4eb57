"""What the benchmark measures: its cells, routings, least work and roofline."""

import math

import torch
from bench_fakes import TINY, FakeDevice, a_cell

from nmm_serve.kernels.bench import measure, roofline
from nmm_serve.kernels.bench.device import CpuDevice
from nmm_serve.kernels.bench.measure import make_copies
from nmm_serve.kernels.bench.plan import REGIMES, ROUTINGS, SHAPES, Cell, cells, router_logits, step_bytes, work
from nmm_serve.kernels.bench.roofline import Roofline, Work


def test_plan_has_every_shape_regime_and_number_of_tokens_and_the_telling_ones_first():
    plan = cells(list(SHAPES.values()), REGIMES)
    assert len(set(plan)) == len(plan)
    for k in (1, 2):
        have = {(c.shape.name, c.regime, c.tokens) for c in plan if c.top_k == k and c.routing == "multinomial"}
        assert have == {(s, r, t) for s in SHAPES for r, tokens in REGIMES.items() for t in tokens}
    for routing in ROUTINGS:
        have = {(c.shape.name, c.regime) for c in plan if c.routing == routing}
        assert have == {(s, r) for s in SHAPES for r in REGIMES}
    assert len({(c.shape.name, c.regime) for c in plan[:12]}) == 12


def test_routings_route_as_their_names_say():
    counts = {}
    for routing in ROUTINGS:
        cell = a_cell(tokens=64, routing=routing)
        logits = router_logits(cell, "cpu", torch.Generator().manual_seed(0))
        counts[routing] = torch.bincount(logits.topk(2, dim=-1).indices.flatten(), minlength=8).tolist()
    assert counts["balanced"] == [16] * 8
    assert counts["empty"][-1] == 0
    assert min(counts["empty"][:-1]) > 0
    assert counts["skewed"][0] >= 32
    assert len(set(counts["multinomial"])) > 1


def test_least_work_counts_the_experts_in_use_and_the_backward_pass():
    logits = torch.tensor([[9.0, 8.0, 0, 0, 0, 0, 0, 0]])
    assert work(a_cell(tokens=1), logits, 2) == Work(2 * (2 * TINY.weights + 2 * 16), 4 * TINY.weights)
    forward = work(a_cell(tokens=1), logits, 2)
    assert work(a_cell("train", tokens=1), logits, 2) == Work(3 * forward.num_bytes, 3 * forward.flops)
    ceiling = Roofline(bandwidth=10.0, flop_rate=100.0)
    assert (ceiling.seconds(Work(20, 50)), ceiling.bound(Work(20, 50))) == (2.0, "bandwidth")
    assert (ceiling.seconds(Work(1, 500)), ceiling.bound(Work(1, 500))) == (5.0, "compute")


def test_graphs_hold_the_training_steps_that_launches_count_in():
    def captured(name, tokens):
        return step_bytes(Cell(SHAPES[name], "train", tokens, 2, ROUTINGS[0]), 2) <= measure.MOST_GRAPH_BYTES

    assert all(captured(name, 4096) for name in SHAPES)
    assert captured("A", 65536)
    assert not captured("D", 16384)


def test_weights_in_turn_are_many_times_the_cache_and_all_alike():
    device = FakeDevice({})
    copies = make_copies(TINY, device, torch.float32, False)
    assert len(copies) == measure.CACHE_MULTIPLE * 3 + 1
    assert all(torch.equal(copy.gate_up, copies[0].gate_up) for copy in copies)
    assert len({copy.gate_up.data_ptr() for copy in copies}) == len(copies)


# What the libraries do, as plainly as can be, so that the adapters' arrangement of rows and weights is tested here.


def test_roofline_of_this_cpu_is_finite():
    ceiling = roofline.measure(CpuDevice(), torch.float32, repeats=1)
    assert 0 < ceiling.bandwidth < math.inf
    assert 0 < ceiling.flop_rate < math.inf
