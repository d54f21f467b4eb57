"""Whose expert kernels vLLM uses. The figures are made up."""

import json
from dataclasses import asdict, replace

import pytest

from nmm_serve.vllm_plugin.moe_choice import (
    OURS,
    TABLE,
    THEIRS,
    VARIABLE,
    ExpertsLayer,
    choose,
    merged,
    read_table,
    rows_of,
)

LAYER = ExpertsLayer(gpu="GPU X", dtype="bfloat16", hidden=512, intermediate=1024, experts=8, top_k=2)


def a_record(*cells, created="2026-01-01"):
    """cells: (regime, our seconds or None where ours failed, vLLM's seconds or None, mode)."""
    found = []
    for regime, ours, theirs, mode in cells:
        results = [{"peer": OURS} | ({} if ours is None else {"eager": {"median_s": 9.0}, mode: {"median_s": ours}})]
        results.append({"peer": THEIRS} | ({} if theirs is None else {mode: {"median_s": theirs}}))
        numbers = {name: value for name, value in asdict(LAYER).items() if name not in ("gpu", "dtype")}
        found.append({"regime": regime, "results": results, **numbers})
    return {"device": {"name": "GPU X"}, "dtype": "bfloat16", "created": created, "cells": found}


WON = a_record(("decode", 1.0, 2.0, "graph"), ("prefill", 1.0, 2.0, "graph"))


def a_table(tmp_path, rows):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": rows}))
    return path


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def test_nothing_measured_means_vllm():
    assert read_table() == []
    assert TABLE.is_file()
    assert choose(LAYER) == "vllm"


def test_ours_where_they_were_nowhere_slower(tmp_path):
    won = rows_of([a_record(("decode", 1.0, 1.2, "graph"), ("prefill", 1.0, 1.01, "graph"))])
    assert [(row["cells"], row["worst_ratio"], row["faster"]) for row in won] == [(2, 1.01, True)]
    assert choose(LAYER, table=a_table(tmp_path, won)) == "nmm-serve"
    lost = rows_of([a_record(("decode", 1.0, 5.0, "graph"), ("prefill", 1.0, 0.99, "graph"))])
    assert choose(LAYER, table=a_table(tmp_path, lost)) == "vllm"


def test_a_cell_in_which_ours_failed_is_lost():
    (row,) = rows_of([WON, a_record(("prefill", None, 2.0, "graph"))])
    assert (row["faster"], row["worst_ratio"], row["cells"]) == (False, 2.0, 3)
    assert row["reason"] == "cells in which ours failed: 1"
    without_graph = a_record(("decode", 1.0, 2.0, "eager"), ("prefill", 1.0, 2.0, "eager"))
    without_graph["cells"][0]["results"][1]["graph"] = {"median_s": 3.0}  # vLLM would capture ours too
    assert [row["faster"] for row in rows_of([without_graph])] == [False]


@pytest.mark.parametrize(("regime", "missing"), [("decode", "prefill"), ("prefill", "decode")])
def test_half_of_what_serving_does_is_not_enough(regime, missing):
    (row,) = rows_of([a_record((regime, 1.0, 2.0, "graph"))])
    assert (row["faster"], row["reason"]) == (False, f"not compared in {missing}")


def test_records_are_taken_together():
    lost, won = a_record(("decode", 2.0, 1.0, "graph")), a_record(("prefill", 1.0, 2.0, "graph"), created="2026-02-01")
    (row,) = rows_of([lost, won])
    assert (row["faster"], row["worst_ratio"], row["measured"]) == (False, 0.5, "2026-02-01")
    decode, prefill = (a_record((regime, 1.0, 2.0, "graph")) for regime in ("decode", "prefill"))
    assert [row["faster"] for row in rows_of([decode, prefill])] == [True]


@pytest.mark.parametrize("field", ["gpu", "dtype", "hidden", "intermediate", "experts", "top_k"])
def test_a_measurement_holds_for_its_own_layer_only(tmp_path, field):
    table = a_table(tmp_path, rows_of([WON]))
    assert choose(LAYER, table=table) == "nmm-serve"
    other = replace(LAYER, **{field: "other" if field in ("gpu", "dtype") else 7})
    assert choose(other, table=table) == "vllm"


def test_training_and_cells_without_both_say_nothing():
    assert rows_of([a_record(("train", 1.0, 2.0, "graph"), ("decode", 1.0, None, "eager"))]) == []
    (row,) = rows_of([a_record(("decode", 1.0, 2.0, "eager"))])
    assert row["worst_ratio"] == 2.0


def test_setting_insists_either_way(tmp_path, monkeypatch):
    table = a_table(tmp_path, rows_of([WON]))
    monkeypatch.setenv(VARIABLE, "vllm")
    assert choose(LAYER, table=table) == "vllm"
    monkeypatch.setenv(VARIABLE, "nmm-serve")
    assert choose(replace(LAYER, gpu=None)) == "nmm-serve"
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match="NMM_SERVE_MOE is 'fast'; set it to one of auto, vllm, nmm-serve"):
        choose(LAYER)


def test_what_our_kernels_cannot_do_is_left_to_vllm_or_refused(tmp_path, monkeypatch):
    table = a_table(tmp_path, rows_of([WON]))
    assert choose(LAYER, "quantization", table) == "vllm"
    monkeypatch.setenv(VARIABLE, "nmm-serve")
    with pytest.raises(ValueError, match="cannot be had with quantization"):
        choose(LAYER, "quantization", table)


def test_newer_measurements_replace_older_ones():
    old = rows_of([WON])
    new = rows_of([a_record(("decode", 1.0, 0.5, "graph"), created="2026-02-01")])
    assert merged(old, new) == merged(new, old) == new
