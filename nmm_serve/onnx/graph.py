"""Write an ONNX graph node by node.

Legend: O out, I in.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nmm_serve.onnx.quantize import BLOCK, Quantization, per_block, per_channel_int8

OPSET, IR_VERSION = 21, 10
CONTRIB = "com.microsoft"
"""ONNX Runtime's own operators."""

Dims = Sequence[int | str]


class Graph:
    """A graph under construction; every method that adds a node returns the names of its outputs.

    Weights of a branch live in the outermost graph, which ONNX lets a branch see.
    """

    def __init__(self, outer: "Graph | None" = None):
        self.nodes: list[onnx.NodeProto] = []
        self.root: Graph = outer.root if outer else self
        self.weights: dict[str, onnx.TensorProto] = {}
        self.count = 0

    def name(self, hint: str) -> str:
        self.root.count += 1
        return f"{hint}_{self.root.count}"

    def op(self, kind: str, *inputs: str, out: Sequence[str] | None = None, domain: str = "", **attributes: Any) -> str:
        """Add a node; returns its first output. `out` names the outputs, "" leaves one out."""
        out = out or [self.name(kind)]
        self.nodes.append(helper.make_node(kind, list(inputs), list(out), domain=domain, **attributes))
        return next(name for name in out if name)

    def weight(self, array: np.ndarray, hint: str = "constant") -> str:
        name = self.name(hint)
        self.root.weights[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def ints(self, *values: int) -> str:
        return self.weight(np.array(values, np.int64))

    def scalar(self, value: int | float, dtype: Any = np.int64) -> str:
        return self.weight(np.array(value, dtype))

    def shape(self, x: str, axis: int) -> str:
        """The size of one axis, as [1] int64."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def linear(self, x: str, weight_OI: np.ndarray, quantization: Quantization, hint: str) -> str:
        """x @ weight.T, with the weight in the operator's own layout."""
        if quantization == "none":
            return self.op("MatMul", x, self.weight(weight_OI.T, hint))
        if quantization == "int8":
            code_IO, scale_O = per_channel_int8(weight_OI)
            return self.op(
                "DynamicQuantizeMatMul", x, self.weight(code_IO, hint), self.weight(scale_O, hint), domain=CONTRIB
            )
        return self.linear_blocks(x, weight_OI, 4, hint)

    def linear_blocks(self, x: str, weight_OI: np.ndarray, bits: int, hint: str) -> str:
        """x @ weight.T with 4 or 8 bits a weight; activations are cut to 8 bits block by block."""
        codes, scales = per_block(weight_OI, bits)
        num_out, num_in = weight_OI.shape
        return self.op(
            "MatMulNBits", x, self.weight(codes, hint), self.weight(scales, hint), domain=CONTRIB,
            K=num_in, N=num_out, bits=bits, block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip

    def rms_norm(self, x: str, gain: np.ndarray, eps: float) -> str:
        return self.op("SimplifiedLayerNormalization", x, self.weight(gain, "norm"), axis=-1, epsilon=eps, stash_type=1)

    def add_rms_norm(self, residual: str, x: str, gain: np.ndarray, eps: float) -> tuple[str, str]:
        """(norm(residual + x), residual + x)"""
        normed, total = self.name("normed"), self.name("residual")
        self.op(
            "SkipSimplifiedLayerNormalization", residual, x, self.weight(gain, "norm"),
            out=[normed, "", "", total], domain=CONTRIB, epsilon=eps,
        )  # fmt: skip
        return normed, total

    def swiglu(self, x: str, gate_up_OI: np.ndarray, down_OI: np.ndarray, quantization: Quantization, hint: str) -> str:
        hidden = self.gated(self.linear(x, gate_up_OI, quantization, f"{hint}.gate_up"))
        return self.linear(hidden, down_OI, quantization, f"{hint}.down")

    def gated(self, gate_up: str) -> str:
        """silu(gate) * up, of both side by side."""
        gate, up = self.name("gate"), self.name("up")
        self.op("Split", gate_up, out=[gate, up], axis=-1, num_outputs=2)
        return self.op("Mul", self.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)

    def branch(self, name: str, outputs: Sequence[str]) -> onnx.GraphProto:
        """This graph as the body of an `If`; its outputs must be its own, not outer values."""
        infos = [helper.make_empty_tensor_value_info(output) for output in outputs]
        return helper.make_graph(self.nodes, name, [], infos)

    def save(
        self, path: Path, inputs: dict[str, tuple[int, Dims]], outputs: dict[str, tuple[int, Dims]], title: str
    ) -> None:
        """Write `path` and, beside it, its weights as `path`.data."""
        taken, given = (
            [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in values.items()]
            for values in (inputs, outputs)
        )
        graph = helper.make_graph(self.nodes, title, taken, given, initializer=list(self.weights.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="nmm-serve")
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


FLOAT, INT32, INT64, UINT8 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8
