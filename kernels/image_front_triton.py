"""The Triton kernels of the image front (see `image_front`), and how they are launched.

A byte b stands for b / 127.5 - 1 = (2b - 255) / 255. The odd number 2b - 255 is exact in bfloat16 and float16, so the
kernels multiply those and divide once by 255 at the end: nothing is lost to rounding before the product.

Legend: P patches of all images, K = 3p^2 numbers in a patch, D width, I images, R and C rows of the position tables;
M, N, L tile sizes over P, D, K; G images looked at together.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def find_patches(grid, num_images, patch_M, PATCH: tl.constexpr, G: tl.constexpr):
    """Where patches are: first byte, bytes from one line of pixels to the next, row and column. A patch of no image
    has line 0."""
    start_M = patch_M * 0
    cols_M = patch_M * 0
    done = 0
    for first in range(0, num_images, G):
        image_G = first + tl.arange(0, G)
        real_G = image_G < num_images
        rows_G = tl.load(grid + 2 * image_G, mask=real_G, other=0).to(tl.int32)
        cols_G = tl.load(grid + 2 * image_G + 1, mask=real_G, other=0).to(tl.int32)
        length_G = rows_G * cols_G
        end_G = done + tl.cumsum(length_G, 0)
        begin_G = end_G - length_G
        inside_MG = (patch_M[:, None] >= begin_G[None, :]) & (patch_M[:, None] < end_G[None, :])
        start_M += tl.sum(tl.where(inside_MG, begin_G[None, :], 0), 1)
        cols_M += tl.sum(tl.where(inside_MG, cols_G[None, :], 0), 1)
        done += tl.sum(length_G, 0)
    divisor_M = tl.maximum(cols_M, 1)
    index_M = patch_M - start_M
    row_M = index_M // divisor_M
    col_M = index_M % divisor_M
    line_M = cols_M * (3 * PATCH)
    above_M = (start_M + row_M * cols_M).to(tl.int64) * (3 * PATCH * PATCH)
    return above_M + col_M * (3 * PATCH), line_M, row_M, col_M


@triton.jit
def load_pixels(pixels, byte_M, line_M, k_L, PATCH: tl.constexpr):
    """A tile of patches as the odd integers 2b - 255, float32; outside the patch 0."""
    y_L = k_L // (3 * PATCH)
    x_L = k_L % (3 * PATCH)
    real_ML = (line_M > 0)[:, None] & (k_L < 3 * PATCH * PATCH)[None, :]
    address_ML = byte_M[:, None] + (y_L[None, :] * line_M[:, None] + x_L[None, :])
    b_ML = tl.load(pixels + address_ML, mask=real_ML, other=0).to(tl.float32)
    return tl.where(real_ML, 2.0 * b_ML - 255.0, 0.0)


@triton.jit(do_not_specialize=["num_patches", "num_images"])
def forward_kernel(
    pixels, grid, weight, row_embed, col_embed, out, num_patches, num_images, width, num_rows, num_cols,
    PATCH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, L: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 3 * PATCH * PATCH
    patch_M = tl.program_id(0) * M + tl.arange(0, M)
    n_N = tl.program_id(1) * N + tl.arange(0, N)
    byte_M, line_M, row_M, col_M = find_patches(grid, num_images, patch_M, PATCH, G)
    # a patch beyond the last one may still lie in an image when the grid promises more than there is
    line_M = tl.where(patch_M < num_patches, line_M, 0)
    weight_N = weight + n_N.to(tl.int64) * K
    acc_MN = tl.zeros((M, N), tl.float32)
    for k in range(0, K, L):
        k_L = k + tl.arange(0, L)
        x_ML = load_pixels(pixels, byte_M, line_M, k_L, PATCH)
        w_LN = tl.load(weight_N[None, :] + k_L[:, None], mask=(k_L < K)[:, None] & (n_N < width)[None, :], other=0.0)
        acc_MN = tl.dot(x_ML.to(w_LN.dtype), w_LN, acc_MN, input_precision="ieee")
    # Without an image, or past the tables, there is no right answer: NaN, which every engine refuses.
    good_MN = ((line_M > 0) & (row_M < num_rows) & (col_M < num_cols))[:, None] & (n_N < width)[None, :]
    row_MN = tl.load(row_embed + row_M[:, None] * width + n_N[None, :], mask=good_MN, other=float("nan"))
    col_MN = tl.load(col_embed + col_M[:, None] * width + n_N[None, :], mask=good_MN, other=float("nan"))
    y_MN = acc_MN * (1.0 / 255.0) + (row_MN.to(tl.float32) + col_MN.to(tl.float32))
    stored_MN = (patch_M < num_patches)[:, None] & (n_N < width)[None, :]
    out_MN = out + patch_M[:, None].to(tl.int64) * width + n_N[None, :]
    tl.store(out_MN, y_MN.to(out.dtype.element_ty), mask=stored_MN)


@triton.jit(do_not_specialize=["num_patches", "num_images"])
def weight_grad_kernel(
    grad, pixels, grid, out, num_patches, num_images, width,
    PATCH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, L: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """dW = dY^T X, one tile of the weight a program; the patches are added up in order, so it is deterministic."""
    K: tl.constexpr = 3 * PATCH * PATCH
    n_N = tl.program_id(0) * N + tl.arange(0, N)
    k_L = tl.program_id(1) * L + tl.arange(0, L)
    acc_NL = tl.zeros((N, L), tl.float32)
    for first in range(0, num_patches, M):
        patch_M = first + tl.arange(0, M)
        real_M = patch_M < num_patches
        byte_M, line_M, _, _ = find_patches(grid, num_images, patch_M, PATCH, G)
        x_ML = load_pixels(pixels, byte_M, tl.where(real_M, line_M, 0), k_L, PATCH)
        grad_NM = tl.load(
            grad + patch_M[None, :].to(tl.int64) * width + n_N[:, None],
            mask=real_M[None, :] & (n_N < width)[:, None],
            other=0.0,
        )
        acc_NL = tl.dot(grad_NM, x_ML.to(grad_NM.dtype), acc_NL, input_precision="ieee")
    stored_NL = (n_N < width)[:, None] & (k_L < K)[None, :]
    address_NL = out + n_N[:, None].to(tl.int64) * K + k_L[None, :]
    tl.store(address_NL, (acc_NL * (1.0 / 255.0)).to(out.dtype.element_ty), mask=stored_NL)


def patch_side(patch_dim: int) -> int:
    """p of K = 3p^2."""
    p = math.isqrt(patch_dim // 3)
    assert 3 * p * p == patch_dim, f"{patch_dim} numbers are no square RGB patch"
    return p


IMAGES_PER_LOOK = 32
"""Images whose sizes a program reads at a time."""

SMALL = {"M": 64, "N": 64, "L": 64, "num_warps": 4, "num_stages": 3}
LARGE = {"M": 128, "N": 128, "L": 64, "num_warps": 8, "num_stages": 3}
"""Tiles. Not yet tuned on a GPU."""


def forward_config(num_patches: int, dtype: torch.dtype) -> dict[str, int]:
    """A few images would leave most of a GPU idle in large tiles, and float32 (no tensor cores) spills in them."""
    return LARGE if num_patches > 512 and dtype != torch.float32 else SMALL


def launch_forward(pixels_PK, grid_I2, weight_DK, row_embed_RD, col_embed_CD) -> torch.Tensor:
    """One launch, whatever the sizes of the images."""
    P, D = pixels_PK.shape[0], weight_DK.shape[0]
    out_PD = pixels_PK.new_empty((P, D), dtype=torch.promote_types(weight_DK.dtype, row_embed_RD.dtype))
    if P:
        config = forward_config(P, weight_DK.dtype)
        forward_kernel[triton.cdiv(P, config["M"]), triton.cdiv(D, config["N"])](
            pixels_PK.contiguous(), grid_I2.contiguous(), weight_DK.contiguous(),
            row_embed_RD.contiguous(), col_embed_CD.contiguous(), out_PD,
            P, grid_I2.shape[0], D, row_embed_RD.shape[0], col_embed_CD.shape[0],
            PATCH=patch_side(pixels_PK.shape[1]), G=IMAGES_PER_LOOK, **config,
        )  # fmt: skip
    return out_PD


def launch_weight_grad(grad_PD, pixels_PK, grid_I2) -> torch.Tensor:
    (P, K), D = pixels_PK.shape, grad_PD.shape[1]
    out_DK = grad_PD.new_empty((D, K))
    config = SMALL
    weight_grad_kernel[triton.cdiv(D, config["N"]), triton.cdiv(K, config["L"])](
        grad_PD.contiguous(), pixels_PK.contiguous(), grid_I2.contiguous(), out_DK, P, grid_I2.shape[0], D,
        PATCH=patch_side(K), G=IMAGES_PER_LOOK, **config,
    )  # fmt: skip
    return out_DK
