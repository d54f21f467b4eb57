"""Weights in fewer bits, in the layouts of ONNX Runtime's operators.

Legend: O out, I in, N blocks of one row.
"""

from typing import Literal

import numpy as np

Quantization = Literal["none", "int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "int8", "int4")

BLOCK = 32
"""Neighbouring weights that share a scale in `MatMulNBits`."""


def per_channel_int8(weight_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one scale an output: (int8 [I, O], scale [O]) for `DynamicQuantizeMatMul`."""
    scale_O = _not_zero(np.abs(weight_OI).max(axis=1) / 127).astype(np.float32)
    return np.ascontiguousarray(np.round(weight_OI / scale_O[:, None]).astype(np.int8).T), scale_O


def per_block(weight_OI: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 4 or 8 bits with one scale a block: (packed uint8 [O, N, BLOCK * bits / 8], scale [O, N]) for
    `MatMulNBits`, whose zero point is half of the range."""
    num_out, num_in = weight_OI.shape
    padded_OI = np.pad(weight_OI, ((0, 0), (0, -num_in % BLOCK)))
    block_ONB = padded_OI.reshape(num_out, -1, BLOCK)
    zero_point = 1 << (bits - 1)
    # the largest weight, with its sign, becomes the end of the range that reaches one step further
    index = np.abs(block_ONB).argmax(-1)[..., None]
    scale_ON = _not_zero(np.take_along_axis(block_ONB, index, -1)[..., 0] / -zero_point).astype(np.float32)
    rounded_ONB = np.round(block_ONB / scale_ON[..., None]) + zero_point
    code_ONB: np.ndarray = rounded_ONB.clip(0, 2 * zero_point - 1).astype(np.uint8)
    if bits == 4:
        code_ONB = code_ONB[..., 0::2] | (code_ONB[..., 1::2] << 4)
    return code_ONB, scale_ON


def per_row_int8(table_OI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An embedding table with one scale a row: (int8 [O, I], scale [O, 1])."""
    scale_O1 = _not_zero(np.abs(table_OI).max(axis=1, keepdims=True) / 127).astype(np.float32)
    return np.round(table_OI / scale_O1).astype(np.int8), scale_O1


def _not_zero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, 1.0, scale)
