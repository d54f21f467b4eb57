"""The early-fusion front in one launch: uint8 pixels -> normalise -> patchify -> projection -> position.

The pixels of a batch lie one image after the other, each [rows * p, cols * p, 3] in reading order. An image of n
patches holds exactly n * 3p^2 bytes, so the batch is a [P, K] tensor whose row borders are image borders too: it is
concatenated and split like patches are, and the kernel finds the pixels of each patch by itself.

Legend: P patches of all images, K = 3p^2 numbers in a patch, D width, I images, R and C rows of the position
tables.
"""

import math

import torch
import torch.nn.functional as F


def cut_image(pixels_HWC: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[H, W, 3] -> [rows*cols, patch_size*patch_size*3], patches in reading order, dtype kept."""
    H, W, C = pixels_HWC.shape
    p = patch_size
    return pixels_HWC.view(H // p, p, W // p, p, C).permute(0, 2, 1, 3, 4).reshape(-1, p * p * C)


def normalise(patches_PK: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return patches_PK.float() / 127.5 - 1.0


def cut_patches(pixels_PK: torch.Tensor, grid_I2: torch.Tensor) -> torch.Tensor:
    """The batch's pixels, still uint8, with each row one patch instead of a run of pixels."""
    p = math.isqrt(pixels_PK.shape[1] // 3)
    sizes = grid_I2.tolist()
    images = pixels_PK.split([rows * cols for rows, cols in sizes])
    patches = [cut_image(x.reshape(r * p, c * p, 3), p) for x, (r, c) in zip(images, sizes, strict=True)]
    return torch.cat(patches) if patches else pixels_PK


def patch_positions(grid_I2: torch.Tensor, num_patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every patch in its image, each [P] int64, on the grid's device and without a host sync."""
    length_I = grid_I2.prod(-1)
    start_I = length_I.cumsum(0) - length_I
    start_P, cols_P = (x.repeat_interleave(length_I, output_size=num_patches) for x in (start_I, grid_I2[:, 1]))
    index_P = torch.arange(num_patches, device=grid_I2.device) - start_P
    return index_P // cols_P, index_P % cols_P


@torch.library.custom_op("nmm_serve::image_front", mutates_args=())
def image_front(
    pixels_PK: torch.Tensor,
    grid_I2: torch.Tensor,
    weight_DK: torch.Tensor,
    row_embed_RD: torch.Tensor,
    col_embed_CD: torch.Tensor,
) -> torch.Tensor:
    """Project the patches of a batch of images of any sizes and add their positions. This body is the CPU's path.

    Args:
        pixels_PK: uint8, the images' pixels one after the other (see the top of this file).
        grid_I2: int64 rows and columns of patches of each image, with sum(rows * cols) = P.
        weight_DK: the projection; a patch is [p, p, 3] in reading order.
        row_embed_RD, col_embed_CD: learned positions, at least as long as any image has rows and columns.

    Returns:
        [P, D] in the wider dtype of weight and positions. The Triton kernel gives NaN where the grid does not fit.
    """
    row_P, col_P = patch_positions(grid_I2, pixels_PK.shape[0])
    patches_PK = normalise(cut_patches(pixels_PK, grid_I2)).to(weight_DK.dtype)
    return F.linear(patches_PK, weight_DK) + (F.embedding(row_P, row_embed_RD) + F.embedding(col_P, col_embed_CD))


@image_front.register_kernel("cuda")
def _(pixels_PK, grid_I2, weight_DK, row_embed_RD, col_embed_CD):
    from nmm_serve.kernels.image_front_triton import launch_forward  # Triton comes with CUDA builds of torch only

    with torch.cuda.device_of(pixels_PK):  # Triton launches on the current device, whatever the tensors'
        return launch_forward(pixels_PK, grid_I2, weight_DK, row_embed_RD, col_embed_CD)


@image_front.register_fake
def _(pixels_PK, grid_I2, weight_DK, row_embed_RD, col_embed_CD):
    dtype = torch.promote_types(weight_DK.dtype, row_embed_RD.dtype)
    return pixels_PK.new_empty((pixels_PK.shape[0], weight_DK.shape[0]), dtype=dtype)


@torch.library.custom_op("nmm_serve::image_front_weight_grad", mutates_args=())
def image_front_weight_grad(grad_PD: torch.Tensor, pixels_PK: torch.Tensor, grid_I2: torch.Tensor) -> torch.Tensor:
    """Gradient of the projection's weight, [D, K] in the dtype of `grad_PD`."""
    return grad_PD.t() @ normalise(cut_patches(pixels_PK, grid_I2)).to(grad_PD.dtype)


@image_front_weight_grad.register_kernel("cuda")
def _(grad_PD, pixels_PK, grid_I2):
    from nmm_serve.kernels.image_front_triton import launch_weight_grad

    with torch.cuda.device_of(grad_PD):
        return launch_weight_grad(grad_PD, pixels_PK, grid_I2)


@image_front_weight_grad.register_fake
def _(grad_PD, pixels_PK, grid_I2):
    return grad_PD.new_empty((grad_PD.shape[1], pixels_PK.shape[1]))


def _save(ctx, inputs, output) -> None:
    pixels_PK, grid_I2, weight_DK, row_embed_RD, col_embed_CD = inputs
    ctx.save_for_backward(pixels_PK, grid_I2)
    ctx.weight_dtype = weight_DK.dtype
    ctx.table_sizes = (row_embed_RD.shape[0], col_embed_CD.shape[0])
    ctx.table_dtypes = (row_embed_RD.dtype, col_embed_CD.dtype)


def _backward(ctx, grad_PD):
    pixels_PK, grid_I2 = ctx.saved_tensors
    _, _, needs_weight, *needs_tables = ctx.needs_input_grad
    grads: list[torch.Tensor | None] = [None, None]
    # the product runs in the weight's dtype, like a linear layer's own backward under autocast
    grads.append(image_front_weight_grad(grad_PD.to(ctx.weight_dtype), pixels_PK, grid_I2) if needs_weight else None)
    positions = patch_positions(grid_I2, pixels_PK.shape[0]) if any(needs_tables) else (None, None)
    for needed, position_P, size, dtype in zip(needs_tables, positions, ctx.table_sizes, ctx.table_dtypes, strict=True):
        if needed:
            # this one, and not index_add: it is deterministic on a GPU
            grads.append(torch.ops.aten.embedding_dense_backward(grad_PD.to(dtype), position_P, size, -1, False))
        else:
            grads.append(None)
    return tuple(grads)


image_front.register_autograd(_backward, setup_context=_save)
