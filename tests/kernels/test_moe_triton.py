"""The MoE kernels: numbers through Triton's interpreter and on a GPU; what they compile to for Hopper without one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moe_cases import CASES, check

from nmm_serve.kernels import moe_configs, moe_ops
from nmm_serve.kernels.moe import moe_mlp

pytest.importorskip("triton", reason="Triton is not installed")

import triton_aot

from nmm_serve.kernels import decode_triton, grouped_triton, moe_triton, route_triton, slices_triton

MODULES = route_triton, grouped_triton, decode_triton, slices_triton
CONFIGS = list(moe_configs.every_config())
OPERATOR_OF = {"up": "up_proj", "down": "down_proj", "slices": "decode_layer", "sum_parts": "decode_layer"}
DECODE = "decode_up", "decode_down", "slices", "sum_parts"
SMALL = "route", "route_backward", "count_experts", "sort_slots", "combine", "sum_parts"


def test_numbers_in_the_interpreter():
    script = Path(__file__).with_name("moe_in_interpreter.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1] / "support")
    run = subprocess.run([sys.executable, "-P", str(script)], env=environment, capture_output=True, text=True)
    assert run.stdout == "ok\n", run.stderr[-3000:]


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(operator: str, dtype=torch.bfloat16, T=4096, D=2048, F=5632, E=8, K=2):
    """Of an operator, as the layer would give them."""
    N = T * K
    x, act, pre = meta(T, D, dtype=dtype), meta(N, F, dtype=dtype), meta(N, 2 * F, dtype=dtype)
    gate_up, down = meta(E, 2 * F, D, dtype=dtype), meta(E, D, F, dtype=dtype)
    weight, expert = meta(T, K, dtype=torch.float32), meta(T, K, dtype=torch.int32)
    order, offset = meta(N, dtype=torch.int32), meta(E + 1, dtype=torch.int32)
    logits, count = meta(T, E, dtype=dtype), meta(-(-T // 256), E, dtype=torch.int32)
    stat = meta(-(-T // 256), 2 * E + 2, dtype=torch.float32)
    return {
        "route": (logits, meta(T, dtype=torch.bool), K, False, True),
        "route_backward": (weight, stat, logits, expert, meta(T, dtype=torch.bool), True, True),
        "count_experts": (expert, E),
        "sort_slots": (expert, count),
        "combine": (act, K),
        "decode_up": (x, gate_up, expert, weight),
        "decode_down": (act, down, expert),
        "decode_layer": (x, logits.float(), None, gate_up, down, K, False, False),
        "up_proj": (x, gate_up, order, offset, K, True),
        "down_proj": (act, down, order, offset, weight),
        "down_backward": (x, down, pre, order, offset, weight),
        "up_backward": (pre, gate_up, order, offset),
        "up_weight_grad": (pre, x, order, offset, K),
        "down_weight_grad": (x, act, order, offset, K),
    }[operator]


def launch(kernel: str, **sizes) -> triton_aot.Launch:
    operator = OPERATOR_OF.get(kernel, kernel)
    with triton_aot.recorded(*MODULES) as launches:
        getattr(moe_triton, operator)(*arguments(operator, **sizes))
    assert len(launches) == (2 if operator == "decode_layer" else 1)
    return launches[kernel == "sum_parts"]


@pytest.fixture
def tools():
    if not (triton_aot.TOOLS / "ptxas").exists() or not (triton_aot.TOOLS / "cuobjdump").exists():
        pytest.skip("this Triton comes without NVIDIA's assembler")


def assert_fits(compiled: triton_aot.Compiled) -> None:
    assert compiled.stack_bytes == 0, "registers are spilled"
    assert compiled.count("STL") == compiled.count("LDL") == 0, "registers are spilled"
    assert compiled.shared_bytes <= triton_aot.HOPPER_SHARED_BYTES


@pytest.mark.parametrize(
    ("kernel", "regime", "config"),
    CONFIGS,
    ids=[f"{kernel}-{regime}-{i}" for i, (kernel, regime, _) in enumerate(CONFIGS)],
)
def test_every_configuration_compiles_for_hopper(kernel, regime, config, tools, tmp_path, monkeypatch):
    """No register is spilled; weights come by TMA; the tensor cores are used (fp32 products have none), with as many
    steps of a tile under way as the table says: one that is read into registers first needs no place for itself."""
    monkeypatch.setattr(moe_configs, "config", lambda *wanted: config)
    compiled = triton_aot.compile_ahead(
        launch(kernel, dtype=torch.float32 if regime == "fp32" else torch.bfloat16), tmp_path
    )
    assert_fits(compiled)
    assert compiled.shared_bytes >= moe_configs.least_shared_bytes(kernel, regime, config)
    assert "UTMALDG" in compiled.sass
    if regime != "fp32":
        wide = config["BM"] >= 64
        assert compiled.count("HGMMA" if wide else "HMMA") > 0, "no tensor-core instruction"
        steps = config["num_stages"] - (not wide)
        assert compiled.shared_bytes >= steps * moe_configs.stage_bytes(kernel, regime, config), "a shorter pipeline"
        assert "serialized" not in triton_aot.assembler_says(compiled, tmp_path), (
            "each product waits for the one before"
        )


@pytest.mark.parametrize("kernel", SMALL)
def test_small_kernels_compile_ahead(kernel, tools, tmp_path):
    assert_fits(triton_aot.compile_ahead(launch(kernel), tmp_path))


KERNELS = sorted({kernel for kernel, _, _ in CONFIGS} | set(SMALL))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_number_of_tokens_never_means_a_new_compilation(kernel):
    lengths = (17, 32, 48, 64) if kernel in DECODE else (2047, 2048, 4099, 65536)
    launches = [launch(kernel, T=T) for T in lengths]
    assert all(one == launches[0] for one in launches[1:])


def test_odd_sizes_do_without_tma():
    assert "tensordesc" in str(launch("up").signature)
    assert "tensordesc" not in str(launch("up", D=1001).signature)


@pytest.mark.parametrize(("slots", "regime"), [(1, "few"), (8 * 128, "few"), (8 * 128 + 1, "many"), (10**6, "many")])
def test_regimes(slots, regime):
    assert moe_configs.grouped_regime(slots, 8, torch.bfloat16) == regime
    assert moe_configs.grouped_regime(slots, 8, torch.float32) == "fp32"


def test_a_few_tokens_go_in_slices_where_the_parts_of_their_sums_are_few(monkeypatch):
    monkeypatch.setattr(moe_triton, "_device", lambda index: GPU)

    def takes(T, D, F, E=8, K=2):
        return moe_triton.takes_slices(meta(T, D), meta(E, 2 * F, D), K)

    assert takes(1, 512, 1024)
    assert takes(64, 512, 1024)
    assert takes(8, 1024, 2816)
    assert not takes(64, 1024, 2816)
    assert not takes(8, 4096, 14336)
    assert takes(16, 64, 64, E=128)
    assert not takes(17, 64, 64, E=128), "its routing has more than one block"


GPU = moe_configs.Device("GPU", processors=132, shared_bytes=232448, tma=True)
OTHER = moe_configs.Device("other", processors=128, shared_bytes=101376, tma=False)


@pytest.mark.parametrize("kernel", sorted({kernel for kernel, _, _ in CONFIGS}))
def test_smaller_gpus_get_fewer_stages(kernel, tools, tmp_path, monkeypatch):
    """Ada: less than half the shared memory, and no TMA. Spills are its own affair, but it must run."""
    monkeypatch.setattr(moe_triton, "_device", lambda index: OTHER)
    compiled = triton_aot.compile_ahead(launch(kernel), tmp_path, capability=89)
    assert compiled.shared_bytes <= OTHER.shared_bytes
    assert "UTMALDG" not in compiled.sass
    assert compiled.count("HMMA") > 0
    assert compiled.count("LDGSTS") > 0, "no loads under way while the tensor cores work"
    assert compiled.count(r"LDG\.E\.U16") == 0, "tiles are read number by number"


@pytest.mark.parametrize(
    ("capability", "tma"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), True)]
)
def test_tma_from_hopper_on(capability, tma, monkeypatch):
    properties = SimpleNamespace(name="GPU", multi_processor_count=100, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": 101376})
    monkeypatch.setattr(moe_triton.triton.runtime.driver, "_active", SimpleNamespace(utils=utils))
    assert moe_triton._device.__wrapped__(0) == moe_configs.Device("GPU", 100, 101376, tma)


def test_fp32_follows_every_switch_of_torch():
    code = (
        "import torch; from nmm_serve.kernels.moe_triton import _precision as p; f = torch.float32; print(p(f)); "
        "torch.set_float32_matmul_precision('high'); print(p(f), p(torch.bfloat16)); "
        "torch.set_float32_matmul_precision('highest'); print(p(f)); "
        "torch.backends.cuda.matmul.fp32_precision = 'none'; torch.backends.fp32_precision = 'tf32'; print(p(f))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["ieee", "tf32", "ieee", "ieee", "tf32"], run.stderr[-2000:]


def test_a_measured_tile_is_used_for_just_what_was_measured(monkeypatch):
    measured = {"device": GPU.name, "kernel": "up", "hidden": 512, "intermediate": 1024, "regime": "many"}
    table = moe_configs.table() | {"tuned": [measured | {"config": {"BM": 256}}]}
    monkeypatch.setattr(moe_configs, "table", lambda: table)
    moe_configs.config.cache_clear()
    assert moe_configs.config("up", 512, 1024, "many", GPU) == {"BM": 256}
    assert (
        moe_configs.config("up", 512, 1024, "many", OTHER)["num_stages"] < table["default"]["up"]["many"]["num_stages"]
    )
    assert moe_configs.config("up", 512, 1024, "few", GPU) == table["default"]["up"]["few"]
    moe_configs.config.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_on_a_gpu(case, dtype):
    check(case, dtype, "cuda")


@pytest.fixture(params=["in slices", "in four launches"])
def way_of_decoding(request, monkeypatch):
    if request.param == "in four launches":
        monkeypatch.setattr(moe_configs, "in_slices", lambda *wanted: False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_of_a_few_tokens_on_a_gpu(dtype, way_of_decoding):
    for case in CASES:
        if case.tokens <= moe_ops.DECODE_TOKENS:
            check(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_programs_that_take_several_tiles_each_on_a_gpu(dtype, monkeypatch):
    real = moe_triton._device
    monkeypatch.setattr(moe_triton, "_device", lambda index: replace(real(index), processors=2))
    for case in CASES:
        if case.pattern == "skewed":
            check(case, dtype, "cuda")


def gpu_layer(T=200, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = (T, 256), (T, 8), (8, 512, 256), (8, 256, 256)
    return [(torch.randn(s, device="cuda") / 8).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.gpu
def test_the_same_bits_every_time_on_a_gpu():
    leaves = gpu_layer(3000)
    runs = []
    for _ in range(3):
        y, _ = moe_mlp(*leaves, top_k=2)
        runs.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 64, 65, 2000])
def test_cuda_graphs_replay_with_other_routing(T, way_of_decoding):
    leaves = [t.detach() for t in gpu_layer(T)]
    with torch.no_grad():
        for _ in range(2):
            moe_mlp(*leaves, top_k=2)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = moe_mlp(*leaves, top_k=2)
        leaves[0].normal_()
        leaves[1].normal_()
        graph.replay()
        expected, _ = moe_mlp(*leaves, top_k=2)
    assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_torch_compile_on_a_gpu():
    leaves = gpu_layer()

    def step(*tensors):
        y, stats = moe_mlp(*tensors, top_k=2)
        return y, stats.load_balancing_loss()

    y, loss = torch.compile(step, fullgraph=True)(*leaves)
    expected, expected_loss = step(*leaves)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(loss, expected_loss)
