import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmm_serve.errors import DataError
from nmm_serve.evals.scaling.records import all_params, as_runs, load_records, parse_records, targets

GOOD = {"family": "early", "n_params": 1e6, "tokens": 1e8, "flops": 6e14, "loss": 3.0}


def parse(*records):
    return parse_records([r if isinstance(r, str) else json.dumps(r) for r in records], "runs.jsonl")


def test_a_mean_is_made_from_losses_by_type_and_extra_keys_are_kept():
    losses = {"text": 2.0, "caption": 4.0}
    read = parse("", {k: v for k, v in GOOD.items() if k != "loss"} | {"losses": losses, "note": "x"})
    assert read.runs[0].losses == {"loss": 3.0, "text": 2.0, "caption": 4.0}
    assert read.runs[0].values["note"] == "x"
    assert targets(read.runs) == ["loss", "text", "caption"]
    assert as_runs(read.runs, "text").loss_R.tolist() == [2.0]
    assert parse(GOOD | {"losses": losses, "loss": 2.5}).runs[0].losses["loss"] == 2.5


def test_missing_flops_are_6nd_and_said():
    read = parse(GOOD, {k: v for k, v in GOOD.items() if k != "flops"} | {"family": "late"})
    assert read.runs[1].flops == pytest.approx(6e14)
    assert len(read.warnings) == 1
    assert "late: flops missing in 1 records (first: line 2)" in read.warnings[0]


def test_experts_a_token_may_be_null():
    assert parse(GOOD | {"num_experts": 8, "num_experts_per_tok": None}).runs[0].sparsity == 7 / 8


def test_mixtures_may_be_numbers():
    read = parse(GOOD | {"mixture": 0}, GOOD | {"mixture": 1}, GOOD)
    assert read.mixtures() == ["0", "1"]
    assert [run.line for run in read.of_mixture("1").runs] == [2]


def test_records_that_stand_twice_are_named():
    losses = {"loss": 3.0, "losses": {"text": 2.5}}
    others = [{"seed": 1}, {"mixture": "half"}, {"tokens": 2e8}, {"family": "late"}, {"losses": {"text": 2.6}}]
    apart = [GOOD | losses | other for other in others]
    assert parse(GOOD | losses, *apart).warnings == []
    (warning,) = parse(GOOD | losses, *apart, apart[1], GOOD | losses | {"note": "copied"}).warnings
    assert warning.startswith("2 records repeat another")
    assert "line 7 of 3, 8 of 1" in warning


def test_several_totals_of_one_size_give_the_largest_in_any_order():
    told = [GOOD | {"n_params_total": n, "tokens": t} for n, t in ((3e6, 1e8), (12e6, 2e8), (6e6, 3e8))]
    for records in (told, told[::-1]):
        sizes, warning = all_params(parse(*records, GOOD | {"n_params": 4e6, "n_params_total": 9e6}).runs)
        assert sizes == [[1e6, 12e6], [4e6, 9e6]]
        assert "1 sizes have several numbers of all parameters, 1e+06 active ones from 3e+06 to 1.2e+07" in warning
    assert all_params(parse(told[0], told[0] | {"n_params_total": 3e6 * (1 + 1e-9)}).runs)[1] is None


def test_totals_that_could_not_be_had_may_be_null():
    told = GOOD | {"n_params_total": 3e6}
    assert all_params(parse(told, told | {"n_params_total": None}).runs) == (None, None)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "not a JSON object but a list"),
        (GOOD | {"family": 3}, "family must be a name"),
        ({k: v for k, v in GOOD.items() if k != "tokens"}, "line 2 lacks tokens"),
        ({k: v for k, v in GOOD.items() if k != "loss"}, "line 2 lacks loss and losses"),
        (GOOD | {"loss": float("nan")}, "loss must be a positive number, not nan"),
        (GOOD | {"loss": float("inf")}, "line 2: loss"),
        (GOOD | {"loss": -1}, "not -1"),
        (GOOD | {"n_params": 0}, "n_params"),
        (GOOD | {"tokens": "1e9"}, "not '1e9'"),
        (GOOD | {"tokens": True}, "not True"),
        (GOOD | {"tokens": 10**400}, "tokens must be"),
        (GOOD | {"flops": -1.0}, "flops"),
        (GOOD | {"losses": []}, "losses must map"),
        (GOOD | {"losses": {"text": None}}, "losses.text"),
        (GOOD | {"losses": {"loss": 1.0}}, "rename it"),
        (GOOD | {"losses": {"text": 1.0}}, "differ from those of line 1"),
        (json.dumps(GOOD).replace("1000000.0", "1" * 5000), "line 2: a number has more than 4300 digits"),
        (GOOD | {"sparsity": 1}, "share of idle experts"),
        (GOOD | {"sparsity": False}, "share of idle experts"),
        (GOOD | {"num_experts": True}, "num_experts must be a whole number, not True"),
        (GOOD | {"n_params_total": 0}, "n_params_total must be a positive number"),
        (GOOD | {"num_experts": 8, "num_experts_per_tok": 9}, "between 1 and num_experts"),
    ],
)  # fmt: skip
def test_faults_name_their_line(record, message):
    with pytest.raises(DataError, match="line 2") as error:
        parse(GOOD, record)
    assert message in str(error.value)


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError):
            load_records(path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no records"):
        load_records(tmp_path / "empty.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        load_records(tmp_path / "bytes.jsonl")


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from([*GOOD, "losses", "sparsity", "num_experts", "num_experts_per_tok"]), json_values)
)
def test_any_object_is_a_record_or_a_named_fault(changes):
    try:
        run = parse(GOOD | changes).runs[0]
    except DataError as error:
        assert "line 1" in str(error)  # noqa: PT017 (a record may also be good)
    else:
        assert min(run.n_params, run.tokens, run.flops, *run.losses.values()) > 0
        assert run.sparsity is None or 0 <= run.sparsity < 1
