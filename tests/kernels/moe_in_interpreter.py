"""The MoE kernels against fp64. Run by test_moe_triton.py in a process where Triton interprets: it decides that when it
is imported. No bf16 here: the interpreter computes it wrong."""

from dataclasses import replace

import torch
from moe_cases import CASES, check
from torch._subclasses.fake_tensor import FakeTensorMode

from nmm_serve.kernels import moe_configs, moe_ops, moe_triton
from nmm_serve.kernels.moe import expert_mlp, moe_mlp, route

assert moe_ops.INTERPRETED

# programs that take several tiles each, one after the other
rounds = set()
programs = moe_triton._programs


def noted(tiles, config, device):
    grid = programs(tiles, config, device)
    rounds.add((config["per_sm"] > 0, tiles // grid[0]))
    return grid


moe_triton._programs = noted

# a few tokens go through small experts in slices; with parts that are too many, as in large experts, they do not
layers = []
decode_layer = moe_triton.decode_layer
moe_triton.decode_layer = lambda *args: layers.append(len(args[0])) or decode_layer(*args)
few = [case for case in CASES if 0 < case.tokens <= moe_ops.DECODE_TOKENS]
for dtype in (torch.float32, torch.float16):
    for case in CASES:
        check(case, dtype, "cpu")
assert layers == 2 * [case.tokens for case in few], layers
in_slices = moe_configs.in_slices
moe_configs.in_slices = lambda *wanted: False
for case in few:
    check(case, torch.float16, "cpu")
assert len(layers) == 2 * len(few)
moe_configs.in_slices = in_slices

assert max(tiles for persistent, tiles in rounds if persistent) > 1

# tuning may make every kernel persistent, those of the weights' gradients too
table, device = moe_configs.config, moe_triton._device(None)
moe_configs.config = lambda *wanted: {key: 1 if key == "per_sm" else n for key, n in table(*wanted).items()}
moe_triton._device = lambda index: replace(device, processors=1)
rounds.clear()
(skewed,) = (case for case in CASES if case.pattern == "skewed")
check(skewed, torch.float16, "cpu")
assert all(persistent and tiles > 1 for persistent, tiles in rounds), rounds

# a router that has gone wrong gives wrong numbers, not wild addresses, and says so by NaN
logits = torch.full((3, 4), float("nan"))
routing = route(logits, 2)
assert ((routing.expert_TK >= 0) & (routing.expert_TK < 4)).all()
assert routing.weight_TK.isnan().all()
x, gate_up, down = torch.ones(3, 8), torch.ones(4, 6, 8), torch.ones(4, 8, 3)
for top_k in (1, 2):
    assert moe_mlp(x, logits, gate_up, down, top_k=top_k)[0].isnan().all()

# experts that something else has chosen are counted by a kernel of their own
torch.manual_seed(0)
logits, x = torch.randn(70, 4), torch.randn(70, 8)
routing = route(logits, 3)
assert torch.equal(
    expert_mlp(x, routing.weight_TK, routing.expert_TK, gate_up, down),
    expert_mlp(x, routing.weight_TK, routing.expert_TK, gate_up, down, count_BE=routing.count_BE),
)

# a mask may be a view
counted = torch.zeros(70, 2, dtype=torch.bool)
counted[:, 0] = True
assert int(route(logits, 2, counted_T=counted[:, 0]).stats.num_tokens) == 70
assert int(route(logits, 2, counted_T=counted[:1, 0].expand(70)).stats.num_tokens) == 70

# what torch.compile expects of fp64 logits is what the kernels give
with FakeTensorMode():
    expected = route(torch.empty(70, 4, dtype=torch.float64), 2).weight_TK.dtype
assert route(logits.double(), 2).weight_TK.dtype == expected == torch.float32
print("ok")
