"""Cells and whole runs of the benchmark: turns, checks, time and what is kept."""

import importlib
import math

import pytest
import torch
from bench_fakes import FakeDevice, a_cell, in_cell

from nmm_serve.kernels.bench import check, measure, roofline
from nmm_serve.kernels.bench.measure import make_copies
from nmm_serve.kernels.bench.peers import OURS, PEERS, Peer, Prepared
from nmm_serve.kernels.bench.plan import Cell, Shape
from nmm_serve.kernels.bench.roofline import Roofline
from nmm_serve.kernels.bench.run import run


def test_peers_take_turns_and_the_better_mode_is_compared():
    device = FakeDevice({OURS: 2.0, "slow": 3.0, "fast": 1.0, "bound": 0.5}, graphs=True)
    peers = [device.peer(OURS), device.peer("slow", graph=False), device.peer("fast"),
             device.peer("bound", scale=7.0, is_bound=True)]  # fmt: skip
    found = in_cell(device, peers)
    turn = [OURS, OURS, "slow", "fast", "fast", "bound", "bound"]
    assert device.order == turn * measure.LEAST_ROUNDS
    assert (found["best_peer"], found["ratio_to_best_peer"]) == ("fast", 0.5)
    mine = found["results"][0]
    assert mine["graph"]["median_s"] == mine["eager"]["median_s"] == 2.0
    assert mine["eager"]["n"] == measure.LEAST_ROUNDS
    assert mine["eager"]["of_roofline"] == pytest.approx(found["roofline"]["seconds"] / 2.0)
    assert "graph" not in found["results"][1]
    assert found["results"][1]["graph_reason"] == "waits for the host"


def test_more_rounds_when_there_is_time_and_never_too_many():
    device = FakeDevice({OURS: 1.0})
    rounds = 13 * 9.5  # seconds: 13 copies a pass
    assert in_cell(device, [device.peer(OURS)], budget_s=rounds)["results"][0]["eager"]["n"] == 10
    assert in_cell(device, [device.peer(OURS)], budget_s=1e9)["results"][0]["eager"]["n"] == measure.MOST_ROUNDS


def test_a_wrong_or_broken_peer_is_named_and_never_timed():
    device = FakeDevice({})

    def broken(weights, top_k):
        raise ModuleNotFoundError("No module named 'missing'")

    peers = [device.peer(OURS), device.peer("wrong", scale=1.001), device.peer("nan", scale=math.nan),
             Peer("absent", broken), device.peer("forward only")]  # fmt: skip
    found = in_cell(device, peers, a_cell("train"))
    reasons = {result["peer"]: result["reason"] for result in found["results"]}
    assert reasons[OURS] == "has no backward pass"
    found = in_cell(device, peers)
    reasons = {result["peer"]: result["reason"] for result in found["results"]}
    assert reasons[OURS] is None
    assert "relative error of output 1.0e-03 is over 1e-05" in reasons["wrong"]
    assert "output inf" in reasons["nan"]
    assert reasons["absent"] == "ModuleNotFoundError: No module named 'missing'"
    assert all("eager" not in result for result in found["results"][1:4])
    assert set(device.order) == {OURS, "forward only"}


def test_a_wrong_gradient_is_found():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    device = FakeDevice({})

    def prepare(weights, top_k):
        def layer(x, logits):
            return check.exact_layer(x, logits, weights.gate_up, Halved.apply(weights.down), top_k)

        return Prepared(layer, (weights.gate_up, weights.down))

    found = in_cell(device, [Peer("half", prepare, trains=True)], a_cell("train"))
    assert found["results"][0]["reason"].startswith("wrong: relative error of gradient of down 5.0e-01")


def test_a_gradient_that_is_wrong_for_many_tokens_alone_is_found():
    """As of a kernel that only the timed number of tokens reaches; and 256 tokens of more have the very gradients."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, tokens):
            ctx.many = tokens > check.TOKENS
            return weight.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2 if ctx.many else grad, None

    device = FakeDevice({})

    def prepare(weights, top_k):
        def layer(x, logits):
            down = Wrong.apply(weights.down, len(x))
            return check.exact_layer(x, logits, weights.gate_up, down, top_k)

        return Prepared(layer, (weights.gate_up, weights.down))

    (ours,) = (peer for peer in PEERS if peer.name == OURS)
    found = in_cell(device, [Peer("wrong", prepare, trains=True), ours], a_cell("train", tokens=check.TOKENS + 44))
    wrong, right = found["results"]
    assert wrong["reason"].startswith("wrong: relative error of gradient of down 5.0e-01")
    assert right["reason"] is None


def test_the_whole_run_keeps_its_time_and_says_what_it_left_out(monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: Roofline(1e9, 1e12))
    device = FakeDevice({OURS: 1.0, "other": 2.0})
    plan = [a_cell(tokens=t) for t in (4, 5, 6, 7)]
    heard = []
    peers = [device.peer(OURS), device.peer("other"), Peer("gone", lambda weights, k: importlib.import_module("gone"))]
    seconds = 13 * 3 * measure.LEAST_ROUNDS  # one cell at its least
    found = run(plan, device, torch.float32, 2.5 * seconds / 60, peers, lambda *seen: heard.append(seen), device.now)
    assert len(found["cells"]) == 2
    assert found["not_measured"] == [cell.label for cell in plan[2:]]
    assert found["geometric_mean"] == {"prefill": pytest.approx(2.0), "all": pytest.approx(2.0)}
    assert found["peers"] == {
        OURS: "measured",
        "other": "measured",
        "gone": "absent (ModuleNotFoundError: No module named 'gone')",
    }
    assert found["minutes"]["taken"] <= found["minutes"]["allowed"]
    assert heard[-1] == (4, "")
    empty = run([], device, torch.float32, 1, peers, now=device.now)
    assert empty["geometric_mean"] == {"all": None}


def test_the_result_so_far_is_kept_after_each_cell(monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: Roofline(1e9, 1e12))
    device, kept = FakeDevice({}), []
    plan = [a_cell(tokens=t) for t in (4, 5)]
    found = run(plan, device, torch.float32, 60, [device.peer(OURS)], now=device.now, keep=kept.append)
    assert [(len(k["cells"]), k["not_measured"], k["finished"]) for k in [*kept, found]] == [
        (1, [plan[1].label], False), (2, [], False), (2, [], True),
    ]  # fmt: skip
    assert kept[1].keys() == found.keys()


def test_too_little_memory_for_the_weights_costs_one_cell(monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: Roofline(1e9, 1e12))
    device, large = FakeDevice({}), Shape("large", 32, 24)

    def make(shape, *args):
        if shape is large:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_copies(shape, *args)

    monkeypatch.setattr("nmm_serve.kernels.bench.run.make_copies", make)
    plan = [a_cell(), Cell(large, "prefill", 4, 2, "multinomial"), a_cell(tokens=5)]
    found = run(plan, device, torch.float32, 60, [device.peer(OURS)], now=device.now)
    assert [cell["tokens"] for cell in found["cells"]] == [20, 5]
    assert found["not_measured"] == [f"{plan[1].label}: the device has too little memory"]


def test_a_cell_that_cannot_end_in_time_is_not_started(monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: Roofline(1e30, 1e12))
    device = FakeDevice({OURS: 1.0})
    plan = [a_cell(tokens=t) for t in (4, 400, 4)]
    one = 13 * measure.LEAST_ROUNDS  # seconds: what the first takes; the second is 100 times as much work
    found = run(plan, device, torch.float32, 9 * one / 60, [device.peer(OURS)], now=device.now)
    assert [cell["tokens"] for cell in found["cells"]] == [4, 4]
    (left_out,) = found["not_measured"]
    assert left_out.startswith(f"{plan[1].label}: would take over {100 * one} s")
