"""Sweeps on Ray: a cluster of one machine, one of two (Ray's own imitation: two of its nodes on this one), workers and
machines that die, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_sweep import sweep_once, write_plan

from nmm_serve.errors import ConfigError
from nmm_serve.train.config import config_from
from nmm_serve.train.resume import resume_points, step_of
from nmm_serve.train.run_folder import locked
from nmm_serve.train.sweep.plan import expand, load_plan
from nmm_serve.train.sweep.pools import RayPool
from nmm_serve.train.sweep.run import Sweep

pytest.importorskip("ray", reason="needs Ray: pip install 'nmm-serve[sweep]'")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
LONGER = {"tokens": [32000, 64000]}


@pytest.fixture(autouse=True)
def _ray_by_itself(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token into the home directory
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


def workers(ancestor: int) -> list[int]:
    """Ray's workers with a run in hand, below a process."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, _ in rows}

    def below(pid: int) -> bool:
        while pid in parents and pid != ancestor:
            pid = parents[pid]
        return pid == ancestor

    return [int(pid) for pid, _, args in rows if args.startswith("ray::_train_in_ray") and below(int(pid))]


def test_a_sweep_whose_worker_dies_has_the_records_of_an_undisturbed_one(tmp_path):
    plan = write_plan(tmp_path / "plan.yaml", **LONGER)
    sweep_once(plan, str(tmp_path / "whole"))
    sweep = Sweep(load_plan(plan), tmp_path / "out")
    killed: list[int] = []

    def kill_one(sweep: Sweep) -> None:
        if not killed and any(resume_points(sweep.folder(name) / "checkpoints") for name in sweep.runs):
            for pid in workers(os.getpid()):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    pool = RayPool("local", workers=1, threads=1, gpu_share=0)
    results, pool.results = pool.results, lambda seconds: results(0.05)
    try:
        sweep.train(pool, kill_one)
    finally:
        pool.close()
    assert len(killed) == 1
    problems = [problem for state in sweep.states.values() for problem in state.problems]
    assert len(problems) == 1
    assert problems[0].startswith("its Ray task died: ")
    assert "\n" not in problems[0]
    assert records(tmp_path / "out") == records(tmp_path / "whole")


@pytest.fixture
def two_machines():
    """A cluster of two nodes with one CPU each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=100 << 20, include_dashboard=False)
    yield cluster
    cluster.shutdown()


def test_a_sweep_survives_one_of_its_machines(two_machines, tmp_path):
    """Two trunks, each on a machine of its own, until one of these goes down with its run."""
    plan = write_plan(tmp_path / "plan.yaml", **LONGER, families=["early", "late"], workers=2)
    sweep_once(plan, str(tmp_path / "whole"))
    sweep = Sweep(load_plan(plan), tmp_path / "out")
    pool = RayPool(two_machines.address, workers=2, threads=1, gpu_share=0)
    lost: list[str] = []

    def lose_one(sweep: Sweep) -> None:
        busy = [name for name in sweep.runs if resume_points(sweep.folder(name) / "checkpoints")]
        if not lost and len(busy) == 2:
            lost.extend(busy)
            two_machines.remove_node(two_machines.list_all_nodes()[-1], allow_graceful=False)

    results, pool.results = pool.results, lambda seconds: results(0.05)
    try:
        sweep.train(pool, lose_one)
    finally:
        pool.close()
    assert lost == ["early-atto", "late-atto"]
    problems = [problem for state in sweep.states.values() for problem in state.problems]
    assert problems
    assert all(problem.startswith("its Ray task died: ") for problem in problems), problems
    assert records(tmp_path / "out") == records(tmp_path / "whole")


def test_ctrl_c_ends_the_runs_with_resume_checkpoints(tmp_path):
    """As a terminal sends it, to every process; from the source folder, whose folders are named like libraries."""
    plan, out = write_plan(tmp_path / "plan.yaml", **LONGER), tmp_path / "out"
    args = ["sweep", plan, "--out", str(out), "--ray", "local", "--gpu-share", "0"]
    started = subprocess.Popen(
        [sys.executable, "-P", "-c", "from nmm_serve.cli.train import main; main()", *args],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    checkpoints = out / "runs/early-atto/checkpoints"
    while started.poll() is None and not resume_points(checkpoints):
        time.sleep(0.02)
    before = resume_points(checkpoints)[-1]
    (worker,) = workers(started.pid)
    os.killpg(started.pid, signal.SIGINT)
    said, _ = started.communicate(timeout=120)
    assert started.returncode == 130, said
    assert "Stopped." in said
    assert "Traceback" not in said
    assert step_of(resume_points(checkpoints)[-1]) > step_of(before)
    assert not Path(f"/proc/{worker}").exists()
    with locked(out / "runs/early-atto"):
        pass


def test_what_cannot_be_had_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"no machine of the Ray cluster has 1 CPUs and 64 GPUs.*--gpu-share"):
        RayPool("local", workers=1, threads=1, gpu_share=64)
    pool = RayPool("local", workers=1, threads=1, gpu_share=0)
    try:
        run = next(iter(expand(load_plan(write_plan(tmp_path / "plan.yaml")))))
        values = config_from(run.config.to_dict()).to_dict() | {"data": {"sources": [{"name": "x", "kind": "nothing"}]}}
        pool.submit("bad", values, tmp_path / "bad")
        ((name, problem),) = pool.results(120)
    finally:
        pool.close()
    assert name == "bad"
    assert "nothing" in problem
