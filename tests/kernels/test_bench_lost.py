"""Peers that fail, and those that take the device down."""

import shutil
import subprocess

import pytest
import torch
from bench_fakes import NO_IMAGE, FragileDevice, a_cell, in_cell

from nmm_serve.kernels.bench import measure, roofline
from nmm_serve.kernels.bench.device import CudaDevice
from nmm_serve.kernels.bench.peers import OURS, Peer, Prepared
from nmm_serve.kernels.bench.roofline import Roofline
from nmm_serve.kernels.bench.run import run


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


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("nvidia-smi", 10), PermissionError("nvidia-smi")])
def test_a_clock_that_nobody_tells_does_not_end_the_run(monkeypatch, error):
    def run(*args, **kwargs):
        raise error

    device = CudaDevice.__new__(CudaDevice)
    device.uuid = "0"
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    assert device.clock_mhz() is None
