"""The mixture's graph alone, against the eager layer."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")

import onnxruntime

from nmm_serve.kernels.moe import moe_mlp
from nmm_serve.onnx.graph import FLOAT, Graph
from nmm_serve.onnx.moe import experts, learned_routing

NUM_EXPERTS, WIDTH, HIDDEN = 5, 64, 96


@cache
def weights() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = ((NUM_EXPERTS, WIDTH), (NUM_EXPERTS, 2 * HIDDEN, WIDTH), (NUM_EXPERTS, WIDTH, HIDDEN))
    router_ED, gate_up_E2FD, down_EDF = (
        random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32) for shape in shapes
    )
    return router_ED, gate_up_E2FD, down_EDF


def session_of(folder: Path, graph: Graph, output: str):
    graph.op("Identity", output, out=["y"])
    rows = (FLOAT, ["N", WIDTH])
    graph.save(folder / "graph.onnx", {"x": rows}, {"y": rows}, "graph")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "graph.onnx", options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    @cache
    def made(quantization: str, top_k: int, renormalize: bool):
        graph, (router_ED, gate_up_E2FD, down_EDF) = Graph(), weights()
        routing = learned_routing(graph, "x", router_ED, top_k=top_k, renormalize=renormalize, hint="0")
        y_ND = experts(graph, "x", routing, gate_up_E2FD, down_EDF, quantization, "0")
        return session_of(tmp_path_factory.mktemp("moe"), graph, y_ND)

    return made


def eager(x_ND: np.ndarray, top_k: int, renormalize: bool) -> np.ndarray:
    router_ED, gate_up_E2FD, down_EDF = map(torch.from_numpy, weights())
    x = torch.from_numpy(x_ND)
    return moe_mlp(x, x @ router_ED.T, gate_up_E2FD, down_EDF, top_k=top_k, renormalize=renormalize)[0].numpy()


@settings(deadline=None)  # the first of each kind writes its graph
@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, NUM_EXPERTS), st.integers(1, 3), st.booleans())
def test_equals_the_eager_layer(mixture, tokens, seed, near, top_k, renormalize):
    """Also where most experts get no token: all tokens lie near `near` points."""
    random = np.random.default_rng(seed)
    point_PD = random.normal(size=(near, WIDTH))
    x_ND = point_PD[random.integers(0, near, tokens)] + 1e-3 * random.normal(size=(tokens, WIDTH))
    x_ND = x_ND.astype(np.float32)
    (y_ND,) = mixture("none", top_k, renormalize).run(None, {"x": x_ND})
    np.testing.assert_allclose(y_ND, eager(x_ND, top_k, renormalize), atol=2e-5)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_fewer_bits_are_those_of_a_dense_layer(mixture, quantization, tmp_path):
    """One token at a time: int8 has one scale for all rows of a product."""
    router_ED, gate_up_E2FD, down_EDF = weights()
    dense = []
    for e in range(NUM_EXPERTS):
        graph, folder = Graph(), tmp_path / str(e)
        folder.mkdir()
        output = graph.swiglu("x", gate_up_E2FD[e], down_EDF[e], quantization, "dense")
        dense.append(session_of(folder, graph, output))
    x_ND = np.random.default_rng(1).normal(size=(20, WIDTH)).astype(np.float32)
    probs_NE = torch.from_numpy(x_ND @ router_ED.T).softmax(-1).numpy()
    session, met = mixture(quantization, 1, False), probs_NE.argmax(-1)
    assert set(met) == set(range(NUM_EXPERTS))
    for n, e in enumerate(met):
        (y_1D,) = session.run(None, {"x": x_ND[n : n + 1]})
        (expected_1D,) = dense[e].run(None, {"x": x_ND[n : n + 1]})
        np.testing.assert_allclose(y_1D, probs_NE[n, e] * expected_1D, rtol=1e-5, atol=1e-6)


def test_rows_in_4_bits_do_not_meet(mixture):
    x_ND = np.random.default_rng(2).normal(size=(20, WIDTH)).astype(np.float32)
    session = mixture("int4", 2, False)
    (together_ND,) = session.run(None, {"x": x_ND})
    alone_ND = np.concatenate([session.run(None, {"x": row_1D})[0] for row_1D in x_ND[:, None]])
    np.testing.assert_allclose(together_ND, alone_ND, rtol=1e-5, atol=1e-6)
