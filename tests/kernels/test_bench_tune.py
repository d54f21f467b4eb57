"""The search for better tiles."""

import copy
import json

import pytest
import torch
from bench_fakes import NO_IMAGE, TINY, FakeDevice, FragileDevice, a_cell

from nmm_serve.kernels import moe_configs
from nmm_serve.kernels.bench import measure, tune
from nmm_serve.kernels.bench.measure import make_copies
from nmm_serve.kernels.bench.peers import OURS
from nmm_serve.kernels.bench.plan import Shape


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
    assert [(f["kernel"], f["config"] == better, f["after_s"]) for f in found[:3]] == [
        ("decode_up", True, 0.5), ("decode_down", False, 1.0), ("slices", False, 1.0),
    ]  # fmt: skip
    assert json.loads(path.read_text()) == table
    (entry,) = table["tuned"]
    assert entry["config"] == better
    fake = moe_configs.Device("fake", processors=1, shared_bytes=1 << 20, tma=True)
    assert moe_configs.config("decode_up", 16, 24, "fp32", fake) == better
    assert moe_configs.config("decode_up", 16, 25, "fp32", fake) == default
    moe_configs.config.cache_clear()


def test_each_way_to_decode_is_tuned_where_the_layer_goes_it(monkeypatch, tmp_path):
    """And which way is better is itself measured: here the longer one, once it is tuned."""
    table = copy.deepcopy(moe_configs.table())
    monkeypatch.setattr(moe_configs, "table", lambda: table)
    device = FakeDevice({})
    fake = moe_configs.Device("fake", processors=1, shared_bytes=1 << 20, tma=True)
    ways = []

    def seconds(where, cell, copies, device):
        def seconds_of(config):
            tune.install(where, config)
            slices = moe_configs.config("slices", TINY.hidden, TINY.intermediate, "fp32", fake)
            way = moe_configs.in_slices(cell.tokens, cell.top_k, TINY.hidden, TINY.intermediate, slices)
            ways.append((where["kernel"], way))
            return 1.0 if way else 0.5

        return seconds_of

    monkeypatch.setattr(tune, "timer", seconds)
    tune.tune(tune.jobs([TINY], ["decode"]), device, torch.float32, 1, tmp_path / "table.json", now=device.now)
    assert {way for kernel, way in ways if kernel != "slices"} == {False}
    assert ("slices", True) in ways
    (entry,) = table["tuned"]
    assert (entry["kernel"], entry["config"]["most_mb"]) == ("slices", 0)
    moe_configs.config.cache_clear()


def test_tiles_that_cannot_fit_are_not_compiled(monkeypatch, tmp_path):
    table = copy.deepcopy(moe_configs.table())
    monkeypatch.setattr(moe_configs, "table", lambda: table)
    device, asked = FakeDevice({}), []
    device.shared_bytes = 232448
    monkeypatch.setattr(tune, "timer", lambda *args: lambda config: asked.append(config) or 1.0)
    todo = [(kernel, cell) for kernel, cell in tune.jobs([TINY], ["prefill"]) if (kernel, cell.tokens) == ("up", 8192)]
    tune.tune(todo, device, torch.bfloat16, 1, tmp_path / "table.json", now=device.now)
    start = table["default"]["up"]["many"]
    assert asked[0] == start
    assert start | {"BN": 64} in asked
    assert start | {"BN": 256} not in asked  # 4 x 80 KB
    assert start | {"BK": 128} not in asked  # 4 x 96 KB
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


def test_too_little_memory_costs_the_kernels_of_one_layer(monkeypatch, tmp_path):
    table = copy.deepcopy(moe_configs.table())
    monkeypatch.setattr(moe_configs, "table", lambda: table)
    large = Shape("large", 32, 24)

    def make(shape, *args):
        if shape is large:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_copies(shape, *args)

    monkeypatch.setattr(tune, "make_copies", make)
    monkeypatch.setattr(tune, "timer", lambda *args: lambda config: 1.0)
    device = FakeDevice({})
    todo = tune.jobs([large, TINY], ["decode"])
    found = tune.tune(todo, device, torch.float32, 1, tmp_path / "table.json", now=device.now)
    assert [(f["hidden"], f["kernel"]) for f in found] == [(c.shape.hidden, kernel) for kernel, c in todo]
    for entry in found:
        lost = entry["hidden"] == large.hidden
        assert entry["reason"] == ("the device has too little memory" if lost else None)
        assert (entry["config"] is None) == (entry["after_s"] is None) == (entry["tried"] == 0) == lost
    moe_configs.config.cache_clear()


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
