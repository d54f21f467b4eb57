"""Runs and sweeps killed at random moments end as undisturbed ones: losses bit for bit, records but for times."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kills import Moment, command, live
from safetensors.torch import load_file
from tiny_sweep import sweep_once, write_plan
from tiny_training import write_recipe

from nmm_serve.train.resume import check_point, resume_points

KILLS = 20
STEPS, EVAL_EVERY = 24, 6
OPTIONS = [f"steps={STEPS}", "save_every=2", f"eval_every={EVAL_EVERY}"]


def lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def later(log: Path, more: int, delay: float) -> Callable[[], bool]:
    """Holds `delay` seconds after `more` lines were added to a log, or, in a run that has none, were begun."""
    due: list[float] = []

    def holds() -> bool:
        if not due and lines(log) >= goal:
            due.append(time.monotonic() + delay)
        return bool(due) and time.monotonic() >= due[0]

    goal = lines(log) + more
    return holds


def losses(out: Path) -> list[tuple]:
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(e["event"], e["step"], e.get("loss"), e.get("grad_norm"), e.get("loss_caption")) for e in events]


def record(out: Path) -> dict:
    """`run.json` but for the times in it."""
    told = json.loads((out / "final/run.json").read_text())
    del told["seconds"], told["hardware"]["gemm_flops"]
    return told


def moments(folder: Path, dice: random.Random) -> list[Moment | str]:
    """Spread over a run's life. Saves and publication are short, so most moments are aimed at their file operations."""
    start = [Moment(str(folder), dice.randint(1, 11)) for _ in range(KILLS // 5)]
    rest: list[Moment | str] = [Moment("step-", dice.randint(1, 90)) for _ in range(KILLS // 3)]
    rest += ["clock"] * (KILLS - len(start) - len(rest) - KILLS // 6)
    dice.shuffle(rest)
    return [*start, *rest, *(Moment(".final", dice.randint(1, 21)) for _ in range(KILLS // 6))]


@pytest.mark.slow
def test_a_run_killed_at_random_moments(tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml")
    options = [word for option in OPTIONS for word in ("--set", option)]
    folders = {name: tmp_path / name / "run" for name in ("whole", "killed")}
    args = {name: (["run", recipe, "--out", str(folder), *options],) for name, folder in folders.items()}
    assert live(command, args["whole"], tmp_path / "whole.txt") == 0
    whole, killed = folders["whole"], folders["killed"]
    log, said, dice = killed / "log.jsonl", tmp_path / "said.txt", random.Random(KILLS)
    died = 0
    for moment in moments(killed, dice):
        if moment == "clock":
            moment = Moment(after=later(log, dice.randint(1, 4), dice.uniform(0, 0.1)))
        code = live(command, args["killed"], said, moment)
        assert code in (0, -9), said.read_text()
        died += code == -9
        for point in resume_points(killed / "checkpoints"):
            check_point(point)
    assert died >= 0.8 * KILLS, f"{died} of {KILLS} moments came while the run was alive"
    assert live(command, args["killed"], said) == 0, said.read_text()
    assert losses(killed) == losses(whole)
    assert record(killed) == record(whole)
    ours, expected = (load_file(out / "final/model.safetensors") for out in (killed, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    left = [path.name for path in [*killed.iterdir(), *(killed / "checkpoints").iterdir()]]
    assert not [name for name in left if name.startswith(".") and name != ".lock"], "nothing half-written stays"


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_sweep_killed_at_random_moments(tmp_path):
    """Trained in the process itself; three of twenty times by the real command, whose workers are processes too."""
    plan, whole, out = write_plan(tmp_path / "p.yaml", workers=2), tmp_path / "whole", tmp_path / "killed"
    said, dice, died = tmp_path / "said.txt", random.Random(KILLS), 0
    assert live(sweep_once, (plan, str(whole)), said) == 0, said.read_text()
    for number in range(KILLS):
        # while the trunk trains, then its branches; every other time at a file operation
        name = (
            "early-atto" if number < 0.6 * KILLS else "early-atto-3.2k" if number < 0.7 * KILLS else "early-atto-6.4k"
        )
        moment = Moment(after=later(out / "runs" / name / "log.jsonl", 1, dice.uniform(0, 0.05)))
        if number % 4 == 1:
            moment = Moment(str(out), dice.randint(1, 30))
        elif number % 4 == 3:
            moment = Moment(
                "step-" if number % 8 == 3 else "records.jsonl", dice.randint(1, 80 if number % 8 == 3 else 2)
            )
        real = number % 6 == 2
        target = (command, (["sweep", plan, "--out", str(out)],)) if real else (sweep_once, (plan, str(out)))
        code = live(*target, said, moment)
        assert code in (0, -9), said.read_text()
        died += code == -9
    assert died >= KILLS / 2
    assert live(sweep_once, (plan, str(out)), said) == 0, said.read_text()
    assert records(out) == records(whole)
