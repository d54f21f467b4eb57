"""The image front's kernels against fp64. Run by test_image_front.py in a process where Triton interprets: it decides
that when it is imported."""

import torch

from nmm_serve.kernels.image_front import image_front, image_front_weight_grad
from nmm_serve.kernels.image_front_triton import SMALL, forward_config, launch_forward, launch_weight_grad

BOUND = {torch.float32: 2e-6, torch.float16: 1e-3}
"""Largest error as a share of the largest value: a few roundings of the type."""


def close(actual: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= BOUND[actual.dtype], (what, actual.dtype, error)


def tensors(sizes, p, width, dtype):
    generator = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    grid = torch.tensor(sizes)
    pixels = torch.randint(0, 256, (int(grid.prod(-1).sum()), 3 * p * p), dtype=torch.uint8, generator=generator)
    return pixels, grid, normal(width, 3 * p * p) / p, normal(5, width), normal(34, width)


def check(sizes, p, width, dtype):
    pixels, grid, weight, row, col = tensors(sizes, p, width, dtype)
    exact = image_front(pixels, grid, weight.double(), row.double(), col.double())
    close(launch_forward(pixels, grid, weight, row, col), exact, (sizes, p, width))
    grad = torch.randn(len(pixels), width, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = image_front_weight_grad(grad.double(), pixels, grid)
    close(launch_weight_grad(grad, pixels, grid), exact, ("gradient", sizes, p, width))


assert forward_config(1, torch.float16) is SMALL
for dtype in BOUND:
    check([(1, 1)], 2, 1, dtype)
    check([(3, 2), (1, 7), (5, 1)], 2, 70, dtype)  # images of several shapes in one tile, width past a tile's end
    check([(5, 13)], 3, 16, dtype)  # one image over two tiles
    check([(1, 2)] * 34, 1, 8, dtype)  # more images than are looked at together
    check([(2, 3), (1, 1)], 14, 24, dtype)  # the models' own patches: 588 numbers, many steps

# a wide batch takes large tiles
pixels, grid, weight, row, col = tensors([(5, 34)] * 4, 2, 20, torch.float16)
exact = image_front(pixels, grid, weight.double(), row.double(), col.double())
close(launch_forward(pixels, grid, weight, row, col), exact, "large tiles")

# an empty batch; one row for the trainer that has no images
nothing = launch_forward(pixels[:0], grid[:0], weight, row, col)
assert nothing.shape == (0, 20)
assert launch_weight_grad(nothing, pixels[:0], grid[:0]).abs().sum() == 0

# a grid that promises more, or less, or a longer image than the tables hold: NaN, and only there
pixels, grid, weight, row, col = tensors([(2, 2), (1, 3)], 2, 6, torch.float32)
exact = launch_forward(pixels, grid, weight, row, col)
short = launch_forward(pixels, grid[:1], weight, row, col)
assert torch.equal(short[:4], exact[:4])
assert short[4:].isnan().all()
low = launch_forward(pixels, grid, weight, row[:1], col)
assert torch.equal(low.isnan().any(1), torch.tensor([False, False, True, True, False, False, False]))
print("ok")
