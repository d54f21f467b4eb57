"""Sweeps: what a plan expands to, branches that equal runs of their own, failures and retries."""

import copy
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_sweep import PLAN, InlinePool, sweep_once, write_plan

from nmm_serve.checkpoint import checkpoint_hash
from nmm_serve.errors import ConfigError, TrainingError
from nmm_serve.train.config import config_from
from nmm_serve.train.loop import train
from nmm_serve.train.sweep.estimate import count_all, estimate
from nmm_serve.train.sweep.plan import expand, load_plan, merged, plan_names
from nmm_serve.train.sweep.pools import LocalPool, RayPool, _train_in_ray
from nmm_serve.train.sweep.run import Sweep, check_plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    sweep_once(write_plan(folder / "plan.yaml"), str(folder / "out"))
    return folder / "out"


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def test_plan_expands_to_trunks_and_branches(tmp_path):
    plan = load_plan(
        write_plan(
            tmp_path / "p.yaml",
            families={"early": None, "moe": {"schedule": {"warmup_steps": 3}}},
            sizes={"atto": {"optimizer": {"lr": 1e-3}}, "nano": {"only": ["early"]}},
            mixtures={"half": {"caption": 1, "text": 1}, "words": {"text": 1}},
            seeds=[0, 1],
        )
    )
    runs = expand(plan)
    trunks = [run for run in runs if run.trunk is None]
    assert len(trunks) == 3 * 2 * 2
    assert len(runs) == 3 * len(trunks)
    assert len({run.name for run in runs}) == len(runs)
    trunk, short, long = (run.config for run in runs[:3])
    # 3200 and 6400 tokens in rows of 2 x 320: 5 and 10 steps, of which 2 and 4 cool down
    assert (short.steps, long.steps, trunk.steps, trunk.save_at) == (5, 10, 6, (3, 6))
    assert (trunk.schedule.cooldown, long.schedule.cooldown) == (0.0, 0.4)
    assert runs[2].own_steps == 4
    assert {run.config.optimizer.lr for run in runs if run.size == "atto"} == {1e-3}
    assert {run.config.schedule.warmup_steps for run in runs if run.family == "moe"} == {3}
    words = next(run for run in runs if run.mixture == "words")
    assert [source["name"] for source in words.config.data.sources] == ["text"]


def test_a_size_may_have_budgets_of_its_own(tmp_path):
    plan = load_plan(write_plan(tmp_path / "p.yaml", sizes={"atto": {"tokens": 12800}, "nano": {}}))
    budgets = {(run.size, run.config.steps) for run in expand(plan) if run.trunk is not None}
    assert budgets == {("atto", 20), ("nano", 5), ("nano", 10)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"familes": ["early"]}, "Did you mean families"),
        ({"families": ["erly"]}, "Did you mean 'early'"),
        ({"sizes": ["gigantic"]}, "unknown model preset 'gigantic'"),
        ({"tokens": []}, "lacks tokens"),
        ({"tokens": ["many"]}, "tokens must be numbers"),
        ({"tokens": [-1]}, "tokens must be positive"),
        ({"tokens": [640]}, "do not fit"),
        ({"sizes": {"atto": {"tokens": ["few"]}}}, "sizes: atto: tokens must be numbers"),
        ({"sizes": {"atto": {"tokens": 0}}}, "sizes: atto: tokens must be positive"),
        ({"sizes": {"atto": {"tokens": []}}}, "sizes: atto: tokens must be positive"),
        ({"seeds": [0.5]}, "seeds"),
        ({"cooldown": 1.5}, "cooldown"),
        ({"workers": 0}, "workers"),
        ({"utilisation": 2}, "utilisation"),
        ({"mixtures": {"m": {"captions": 1}}}, "Did you mean 'caption'"),
        ({"base": {"rowz": 1}}, "Did you mean rows"),
        ({"sizes": {"atto": {"only": ["late"]}}}, "leaves no run"),
        ({"sizes": {"atto": {"only": "late"}}}, "leaves no run"),
        ({"sizes": {"atto": {"only": ["erly"]}}}, "sizes: atto: only: unknown family 'erly'. Did you mean 'early'"),
        ({"sizes": {"atto": {"only": 3}}}, "sizes: atto: only: unknown family '3'"),
        ({"sizes": {"atto": {"model": None}}}, "sizes: atto: model must be a section of keys, not None"),
        ({"base": PLAN["base"] | {"tokenizer": None}}, "base: tokenizer must be a section"),
        ({"tokens": [6400, 6500]}, "budgets 6400.0 and 6500.0 cannot be told apart: 10 and 10 steps"),
        ({"tokens": [1.0001e7, 1.0002e7]}, "budgets .* cannot be told apart: 15627 and 15628 .*named 10M and 10M"),
        ({"seeds": [0, 1, 0]}, "seeds names a seed twice"),
        ({"seeds": [0, 1], "mixtures": {"": {}, "s1": {}}}, "two runs of the plan would be named 'early-atto-s1'"),
        ({"base": merged(PLAN["base"], {"data": {"validation": []}})}, "data.validation names no source"),
        ({"base": merged(PLAN["base"], {"data": {"validation_documents": 0}})}, "must be at least 1, not 0"),
        ({"base": PLAN["base"] | {"init_from": "x"}}, "init_from has no place in a plan"),
        ({"families": {"early": {"lora": {}}}}, "lora has no place in a plan"),
        ({"sizes": {"atto": {"soft_token": True}}}, "soft_token has no place in a plan"),
    ],
)  # fmt: skip
def test_faulty_plans_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        expand(load_plan(write_plan(tmp_path / "p.yaml", **changes)))


def test_a_size_may_be_limited_to_one_family_by_name(tmp_path):
    sizes = {"atto": {"only": "late-moe"}, "femto": None}
    runs = expand(load_plan(write_plan(tmp_path / "p.yaml", families=["late", "late-moe"], sizes=sizes)))
    assert {(run.size, run.family) for run in runs} == {("atto", "late-moe"), ("femto", "late"), ("femto", "late-moe")}


def test_a_tokenizer_that_no_sweep_made_is_left_alone(tmp_path, swept):
    """A plan's own is made anew until the first run; one without a plan beside it is the user's."""
    own = tmp_path / "out/tokenizer"
    shutil.copytree(swept / "tokenizer", own)
    making = load_plan(write_plan(tmp_path / "p.yaml"))
    with pytest.raises(ConfigError, match="tokenizer was not made by a sweep.*base.tokenizer.path"):
        Sweep(making, tmp_path / "out")
    base = merged(PLAN["base"], {"tokenizer": {"path": str(own)}})
    Sweep(load_plan(write_plan(tmp_path / "q.yaml", base=base)), tmp_path / "out")
    with pytest.raises(ConfigError, match="tokenizer was not made by a sweep"):  # beside the plan that only read it
        check_plan(making, tmp_path / "out")
    assert (own / "tokenizer.json").is_file()


def test_shipped_plans_expand():
    assert plan_names() == ["compact", "gpu-20min", "paper"]
    for name in plan_names():
        plan = load_plan(name)
        runs = expand(plan)
        assert {run.family for run in runs} >= {"early", "late", "moe"}
        assert all(run.config.data.validation for run in runs)
    with pytest.raises(ConfigError, match="Did you mean 'compact'"):
        load_plan("compct")


def test_the_papers_plan_has_its_sizes_and_budgets():
    branches = [run for run in expand(load_plan("paper")) if run.trunk is not None]
    assert {run.size for run in branches if run.family == "late"} >= {"late-289m", "late-3.7b"}
    config = branches[0].config
    assert config.rows * config.accumulate * config.context_length == 2 * 1024 * 1024
    tokens = [run.config.steps * 2 * 1024 * 1024 for run in branches]
    assert max(tokens) == pytest.approx(6e11, rel=0.01)


def test_a_branch_is_the_run_trained_alone(swept, tmp_path):
    """One trunk serves both budgets, and neither can tell: weights equal those of a run of that budget alone."""
    plan = load_plan(write_plan(tmp_path / "p.yaml"))
    for run in expand(plan, str(swept / "tokenizer"))[1:]:
        alone = train(run.config, tmp_path / run.name)
        assert checkpoint_hash(alone) == checkpoint_hash(swept / "runs" / run.name / "final")


def test_a_plan_may_change_until_its_first_run(tmp_path):
    """Estimates of one plan after another, each with its own tokenizer."""
    sizes = []
    for vocabulary in (300, 320):
        base = merged(PLAN["base"], {"tokenizer": {"vocab_size": vocabulary}})
        sweep = Sweep(load_plan(write_plan(tmp_path / f"{vocabulary}.yaml", base=base)), tmp_path / "out")
        sizes.append(len(sweep.processor.tokenizer))
    assert sizes[0] < sizes[1]


def test_records_are_what_fit_reads(swept):
    from nmm_serve.evals.scaling.records import load_records

    short, long = records(swept)
    assert (short["family"], short["trunk"], short["steps"], long["steps"]) == ("early", "early-atto", 5, 10)
    assert short["loss"] == pytest.approx(short["losses"]["text"])
    assert short["flops"] == 6 * short["n_params"] * short["tokens"]
    assert len(load_records(swept / "records.jsonl").runs) == 2


def test_a_finished_sweep_is_left_alone_and_another_plan_refused(swept, tmp_path):
    pool = InlinePool()
    Sweep(load_plan(write_plan(tmp_path / "p.yaml")), swept).train(pool)
    assert pool.order == []
    base = merged(PLAN["base"], {"log_every": 2})
    with pytest.raises(ConfigError, match="another base"):
        Sweep(load_plan(write_plan(tmp_path / "q.yaml", base=base)), swept)
    more = {run.name for run in expand(load_plan(write_plan(tmp_path / "s.yaml", seeds=[0, 1])))}
    assert more >= {run.name for run in expand(load_plan(write_plan(tmp_path / "p.yaml")))}, "added, not renamed"
    with pytest.raises(ConfigError, match="another first seed"):
        Sweep(load_plan(write_plan(tmp_path / "t.yaml", seeds=[1, 0])), swept)
    with pytest.raises(ConfigError, match="another size atto"):
        Sweep(load_plan(write_plan(tmp_path / "r.yaml", sizes={"atto": {"tokens": 12800}})), swept)
    with pytest.raises(ConfigError, match="another family early"):
        Sweep(load_plan(write_plan(tmp_path / "u.yaml", families={"early": {"optimizer": {"lr": 1.0}}})), swept)
    added = load_plan(write_plan(tmp_path / "v.yaml", families=["late", "early"], mixtures={"": {}, "m": {"text": 1}}))
    check_plan(added, swept)
    shutil.copytree(swept, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "copy/plan.yaml").write_text(yaml.safe_dump(added.__dict__))
    other = load_plan(write_plan(tmp_path / "w.yaml", mixtures={"m": {"text": 1, "caption": 99}}))
    with pytest.raises(ConfigError, match="another mixture m"):
        check_plan(other, tmp_path / "copy")


@pytest.mark.parametrize(
    ("meanwhile", "back", "key"),
    [
        ({"families": ["late"]}, {"families": {"early": {"optimizer": {"lr": 1.0}}}}, "optimizer.lr: None -> 1.0"),
        ({"sizes": ["femto"]}, {"sizes": {"atto": {"optimizer": {"lr": 1.0}}}}, "optimizer.lr: None -> 1.0"),
        ({"sizes": ["femto"]}, {"sizes": {"atto": {"tokens": [12800]}}}, "steps: 6 -> 12"),
        ({"mixtures": {"m": {"text": 1}}}, {"mixtures": {"": {"text": 1}}}, "data.sources: "),
    ],
)
def test_what_a_plan_left_out_comes_back_unchanged_or_not_at_all(tmp_path, swept, meanwhile, back, key):
    """The last plan does not hold it, but its runs are there and would be taken for this plan's."""
    out = tmp_path / "out"
    shutil.copytree(swept, out, ignore=shutil.ignore_patterns("checkpoints"))
    Sweep(load_plan(write_plan(tmp_path / "without.yaml", **meanwhile)), out)
    with pytest.raises(ConfigError, match=f"runs/early-atto holds a run of an earlier plan.*{re.escape(key)}"):
        Sweep(load_plan(write_plan(tmp_path / "other.yaml", **back)), out)
    again = Sweep(load_plan(write_plan(tmp_path / "same.yaml")), out)
    assert all(again.is_done(name) for name in again.runs)
    (out / "plan.yaml").unlink()
    with pytest.raises(ConfigError, match="holds a run of an earlier plan"):
        check_plan(load_plan(str(tmp_path / "other.yaml")), out)


def test_a_failed_run_is_tried_again_and_then_named(tmp_path):
    plan = load_plan(write_plan(tmp_path / "p.yaml", retries=1))
    pool = InlinePool({"early-atto": 1, "early-atto-6.4k": 5})
    sweep = Sweep(plan, tmp_path / "out")
    with pytest.raises(TrainingError, match="1 of 3 runs did not end: early-atto-6.4k: no space left on device"):
        sweep.train(pool)
    assert pool.order == ["early-atto", "early-atto", "early-atto-3.2k", "early-atto-6.4k", "early-atto-6.4k"]
    assert [record["name"] for record in records(tmp_path / "out")] == ["early-atto-3.2k"]
    again = InlinePool()
    Sweep(plan, tmp_path / "out").train(again)
    assert again.order == ["early-atto-6.4k"]
    assert len(records(tmp_path / "out")) == 2


def test_a_worker_that_dies_is_replaced_and_the_job_told(tmp_path):
    values = config_from(merged(copy.deepcopy(PLAN["base"]), {"steps": 400, "model": {"preset": "atto"}})).to_dict()
    pool = LocalPool(workers=1, threads=1)
    try:
        pool.submit("long", values, tmp_path / "long")
        deadline = time.monotonic() + 120
        while not (tmp_path / "long/log.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        pool._busy["long"].process.kill()
        assert pool.results(60) == [("long", "its process died with exit code -9")]
        pool.submit("bad", merged(values, {"data": {"sources": [{"name": "x", "kind": "nothing"}]}}), tmp_path / "bad")
        ((name, problem),) = pool.results(120)
        assert name == "bad"
        assert "nothing" in problem
        pool.submit("fed", merged(values, {"steps": 4, "data": {"workers": 1}}), tmp_path / "fed")
        assert pool.results(120) == [("fed", None)]
        assert pool.free == 1
    finally:
        pool.close()


def test_estimate_counts_shared_trunks_once(tmp_path, swept):
    plan = load_plan(write_plan(tmp_path / "p.yaml"))
    sweep = Sweep(plan, swept)
    runs = list(sweep.runs.values())
    cost = estimate(plan, runs, count_all(runs, sweep.processor), rate=1e9)
    assert (cost.runs, cost.trunks) == (2, 1)
    # 6 steps of the trunk, 2 + 4 of cool-downs; alone 5 + 10
    assert cost.flops / cost.flops_alone == pytest.approx(12 / 15)
    assert cost.seconds == pytest.approx(cost.flops / (0.25 * 1e9))


def test_a_worker_of_rays_trains_in_the_folder_that_the_sweep_was_started_in(tmp_path, monkeypatch):
    """Else relative paths, the sweep's own tokenizer first, would lead to nothing: it begins where Ray was started."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = Sweep(load_plan(write_plan(tmp_path / "p.yaml")), Path("out")).runs["early-atto"]
    job = (run.config.to_dict(), str(tmp_path / "run"), 1)
    monkeypatch.chdir(tmp_path)
    problem = _train_in_ray(*job, str(tmp_path / "gone"))
    assert "out/tokenizer" in problem
    assert f"has no folder {tmp_path}/gone" in problem
    assert _train_in_ray(*job, str(tmp_path / "here")) is None
    assert (tmp_path / "run/final").is_dir()


def test_ray_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"pip install 'nmm-serve\[sweep\]'"):
        RayPool("auto", 1, 1, 0)
