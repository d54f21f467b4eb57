import copy
import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nmm_serve.kernels import moe_configs
from nmm_serve.kernels.bench import check, measure, roofline, tune
from nmm_serve.kernels.bench.device import CpuDevice, CudaDevice
from nmm_serve.kernels.bench.measure import make_copies, measure_cell
from nmm_serve.kernels.bench.peers import OURS, PEERS, Peer, Prepared, Weights
from nmm_serve.kernels.bench.plan import REGIMES, ROUTINGS, SHAPES, Cell, Shape, cells, router_logits, step_bytes, work
from nmm_serve.kernels.bench.roofline import Roofline, Work
from nmm_serve.kernels.bench.run import run

TINY = Shape("tiny", 16, 24)


def a_cell(regime="prefill", tokens=20, top_k=2, routing="multinomial") -> Cell:
    return Cell(TINY, regime, tokens, top_k, routing)


class FakeDevice(CpuDevice):
    """Tells the time that the peer in `seconds` was said to take; its clock stands still otherwise."""

    name, cache_bytes = "fake", 3 * 8 * TINY.weights * 4

    def __init__(self, seconds, graphs=False):
        self.seconds, self.graphs, self.time, self.order = seconds, graphs, 0.0, []
        self.seen: list[str] = []

    def elapsed(self, function):
        self.seen.clear()
        function()
        name = self.seen[0] if self.seen else "roofline"
        self.order.append(name)
        seconds = self.seconds.get(name, 1e-3) * max(1, len(self.seen))
        self.time += seconds
        return seconds

    def capture(self, function):
        return function if self.graphs else None

    def now(self):
        return self.time

    def peer(self, name, scale=1.0, **options):
        """The exact layer under a name, times `scale`."""

        def prepare(weights, top_k):
            def layer(x, logits):
                self.seen.append(name)
                return check.exact_layer(x, logits, weights.gate_up, weights.down, top_k) * scale

            return Prepared(layer, (weights.gate_up, weights.down))

        return Peer(name, prepare, **options)


def in_cell(device, peers, cell=None, budget_s=0.0):
    cell = cell or a_cell()
    copies = make_copies(TINY, device, torch.float32, cell.regime == "train")
    return measure_cell(cell, peers, copies, device, Roofline(1e9, 1e12), budget_s, device.now)


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


def test_bound_runs_for_any_number_of_tokens():
    (peer,) = (peer for peer in PEERS if peer.is_bound)
    weights = Weights(torch.randn(8, 48, 16), torch.randn(8, 16, 24))
    for tokens in (1, 3, 64):
        out = peer.prepare(weights, 2).layer(torch.randn(tokens, 16), torch.randn(tokens, 8))
        assert out.shape == (8, math.ceil(tokens * 2 / 8), 16)


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


class FragileDevice(FakeDevice):
    """Dead from `die` on, as whoever asks it next finds out."""

    dead = False

    def die(self, error):
        self.dead = True
        raise error

    def synchronize(self):
        if self.dead:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


NO_IMAGE = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")


def test_a_peer_built_for_another_gpu_leaves_the_others_alone():
    device = FragileDevice({})

    def unfit(weights, top_k):
        raise NO_IMAGE

    def later(weights, top_k):  # runs in the check and the warm-up, not when it is timed
        prepared = device.peer("later").prepare(weights, top_k)

        def layer(*args):
            if device.order:
                raise NO_IMAGE
            return prepared.layer(*args)

        return Prepared(layer, prepared.parameters)

    found = in_cell(device, [Peer("unfit", unfit), device.peer(OURS), Peer("later", later)])
    unfit_, mine, later_ = found["results"]
    assert unfit_["reason"] == later_["reason"] == f"AcceleratorError: {NO_IMAGE}"
    assert "eager" not in later_
    assert mine["eager"]["n"] == measure.LEAST_ROUNDS


@pytest.mark.parametrize("when", ["prepare", "capture", "timing"])
def test_the_peer_that_took_the_device_down_is_named_whatever_it_raised(when):
    device = FragileDevice({}, graphs=True)
    crash = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    def prepare(weights, top_k):
        if when == "prepare":
            device.die(crash)
        return device.peer("culprit").prepare(weights, top_k)

    def elapsed(function):
        device.die(crash)

    if when == "capture":
        device.capture = elapsed
    elif when == "timing":
        device.elapsed = elapsed
    with pytest.raises(measure.DeviceLost, match=r"^culprit took the device down: RuntimeError: Triton Error"):
        in_cell(device, [Peer("culprit", prepare), device.peer("innocent")])


def test_tuning_goes_on_after_a_tile_that_fails_and_ends_with_the_device(monkeypatch):
    table = copy.deepcopy(moe_configs.table())
    monkeypatch.setattr(moe_configs, "table", lambda: table)
    device = FragileDevice({})
    where = {"device": "fake", "kernel": "up", "hidden": 16, "intermediate": 24, "regime": "fp32"}
    seconds_of = tune.timer(where, a_cell(), make_copies(TINY, device, torch.float32, False), device)

    def failing(error):
        def elapsed(function):
            raise error

        return elapsed

    device.elapsed = failing(NO_IMAGE)
    assert seconds_of(table["default"]["up"]["fp32"]) is None
    device.dead = True
    with pytest.raises(measure.DeviceLost, match=OURS):
        seconds_of(table["default"]["up"]["fp32"])
    moe_configs.config.cache_clear()


def test_a_failed_capture_does_not_leave_its_stream_in_place(monkeypatch):
    class Graph:
        """As torch's: the stream comes back last, and not at all when ending the capture fails."""

        def __init__(self, graph): ...

        def __enter__(self):
            streams.append("capture")

        def __exit__(self, *args):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    streams = ["default"]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with pytest.raises(RuntimeError, match="during capture"):
        CudaDevice.__new__(CudaDevice).capture(lambda: None)
    assert streams == ["default", "capture", "default"]


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


def test_a_lost_device_ends_the_run_but_keeps_what_was_measured(monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda device, dtype: Roofline(1e9, 1e12))
    device = FragileDevice({})
    plan = [a_cell(tokens=t) for t in (4, 5, 6)]

    def prepare(weights, top_k):
        if device.order:  # the first cell is done
            device.die(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
        return device.peer(OURS).prepare(weights, top_k)

    found = run(plan, device, torch.float32, 60, [Peer(OURS, prepare)], now=device.now)
    assert len(found["cells"]) == 1
    first, second = found["not_measured"]
    assert first.startswith(plan[1].label)
    assert f"{OURS} took the device down: AcceleratorError: CUDA error: an illegal memory access" in first
    assert second == plan[2].label


def test_roofline_of_this_cpu_is_finite():
    ceiling = roofline.measure(CpuDevice(), torch.float32, repeats=1)
    assert 0 < ceiling.bandwidth < math.inf
    assert 0 < ceiling.flop_rate < math.inf


def test_search_finds_a_better_tile_one_number_at_a_time():
    asked = []

    def seconds_of(config):
        asked.append(config)
        if config["BN"] == 256:
            return None  # does not fit
        return 10.0 - config["BN"] / 64 + abs(config["num_stages"] - 4)

    start = {"BM": 64, "BN": 32, "BK": 64, "num_warps": 4, "num_stages": 2}
    best, before, after, tried = tune.search(start, tune.AXES, seconds_of, lambda: True)
    assert best == start | {"BN": 128, "num_stages": 4}
    assert (before, after) == (11.5, 8.0)
    assert tried == len(asked) == len({tuple(sorted(config.items())) for config in asked})
    assert all("GROUP_M" not in config for config in asked)


def test_search_takes_no_noise_for_a_gain_and_stops_in_time():
    start = {"BN": 64, "BK": 64}
    assert tune.search(start, tune.AXES, lambda config: 1.0 - config["BN"] / 1e5, lambda: True)[0] == start
    looks = iter([True, True, False, False, False, False, False])
    assert tune.search(start, tune.AXES, lambda config: 1.0 / config["BN"], lambda: next(looks, False))[3] == 2
    assert tune.search(start, tune.AXES, lambda config: None, lambda: True)[1:3] == (None, None)


def test_tuned_tiles_are_used_and_written_and_those_that_lose_are_not(monkeypatch, tmp_path):
    table = copy.deepcopy(moe_configs.table())
    monkeypatch.setattr(moe_configs, "table", lambda: table)
    device = FakeDevice({})
    default = table["default"]["decode_up"]["fp32"]
    better = default | {"num_stages": default["num_stages"] + 1}

    def seconds(where, cell, copies, device):
        def seconds_of(config):
            tune.install(where, config)
            return 0.5 if where["kernel"] == "decode_up" and config == better else 1.0

        return seconds_of

    monkeypatch.setattr(tune, "timer", seconds)
    path = tmp_path / "table.json"
    found = tune.tune(tune.jobs([TINY], ["decode"]), device, torch.float32, 1, path, now=device.now)
    assert [(f["kernel"], f["config"] == better, f["after_s"]) for f in found[:2]] == [
        ("decode_up", True, 0.5), ("decode_down", False, 1.0),
    ]  # fmt: skip
    assert json.loads(path.read_text()) == table
    (entry,) = table["tuned"]
    assert entry["config"] == better
    fake = moe_configs.Device("fake", processors=1, shared_bytes=1 << 20, tma=True)
    assert moe_configs.config("decode_up", 16, 24, "fp32", fake) == better
    assert moe_configs.config("decode_up", 16, 25, "fp32", fake) == default
    moe_configs.config.cache_clear()


def test_timer_measures_the_layer_with_the_tile_in_place(monkeypatch):
    table = copy.deepcopy(moe_configs.table())
    monkeypatch.setattr(moe_configs, "table", lambda: table)
    device = FakeDevice({"roofline": 13.0})  # what has no name: our own layer, over 13 copies
    copies = make_copies(TINY, device, torch.float32, False)
    where = {"device": "fake", "kernel": "up", "hidden": 16, "intermediate": 24, "regime": "fp32"}
    seconds_of = tune.timer(where, a_cell(), copies, device)
    config = table["default"]["up"]["fp32"]
    assert seconds_of(config) == 1.0
    assert table["tuned"] == [{**where, "config": config}]
    moe_configs.config.cache_clear()
