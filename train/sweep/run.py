"""Runs a sweep: trunks, then the branches off them; restartable at any point, since every run is."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nmm_serve import __version__
from nmm_serve.checkpoint import atomic_directory, checkpoint_hash, clear_leftovers, read_run
from nmm_serve.errors import CheckpointError, ConfigError, TrainingError
from nmm_serve.processor import NMMProcessor
from nmm_serve.train.build import build_processor
from nmm_serve.train.data.mixture import parse_mixture
from nmm_serve.train.log import progress
from nmm_serve.train.resume import branch_off
from nmm_serve.train.run_folder import changes, locked, read_yaml, write_whole
from nmm_serve.train.sweep.plan import Plan, Run, expand
from nmm_serve.train.sweep.pools import Pool

Report = Callable[["Sweep"], None]


@dataclass
class State:
    """How a run stands: waiting, running, done or failed. `problems` are those of every try."""

    status: str = "waiting"
    problems: list[str] = field(default_factory=list)


def _makes_tokenizer(base: dict[str, Any]) -> bool:
    return "path" not in (base.get("tokenizer") or {})


def check_plan(plan: Plan, out: Path) -> None:
    """A folder belongs to one training set-up, once a run was begun in it; sizes, families, mixtures and seeds may be
    added to it later. Changes nothing.

    Raises ConfigError with what is another in this plan, or when a tokenizer that no sweep made is in the way.
    """
    path, tokenizer = out / "plan.yaml", out / "tokenizer"
    old = read_yaml(path) if path.is_file() else None
    if not (out / "runs").is_dir():
        made = old is not None and _makes_tokenizer(old.get("base") or {})
        if tokenizer.exists() and not made and _makes_tokenizer(plan.base):
            raise ConfigError(
                f"{tokenizer} was not made by a sweep, and this one would make its own there; give another --out, or "
                "name it under base.tokenizer.path to train with it"
            )
        return
    if old is not None:
        _check_last(plan, old, out)
    for run in expand(plan):
        _check_begun(run, out, makes_tokenizer=_makes_tokenizer(plan.base))


def _check_last(plan: Plan, old: dict[str, Any], out: Path) -> None:
    """Against the plan that was used last, run or not."""
    first = plan.seeds[0]  # its runs are named without it
    shared = {"base": plan.base, "cooldown": plan.cooldown, "tokens": plan.tokens}
    changed = [key for key, value in shared.items() if old.get(key) != value]
    changed += ["first seed"] if old.get("seeds", [first])[0] != first else []
    for what, key, now in (
        ("family", "families", plan.families),
        ("size", "sizes", plan.sizes),
        ("mixture", "mixtures", plan.mixtures),
    ):
        before = (old.get(key) or {}).items()
        changed += [f"{what} {name}" for name, keys in before if name in now and now[name] != keys]
    if changed:
        raise ConfigError(
            f"{out} holds a sweep with another {' and '.join(changed)}; use the same plan to go on, "
            "or another --out to start anew"
        )


def _check_begun(run: Run, out: Path, makes_tokenizer: bool) -> None:
    """Against the run of its name that an earlier plan may have trained: one with a mixture, say, that the last plan
    left out and this one has as another. Its record would be taken for this plan's."""
    folder = out / "runs" / run.name
    changed = changes(folder, run.config) or {}
    # the sweep's own has its place from the sweep, not from the plan
    told = [words for key, words in changed.items() if not (makes_tokenizer and key == "tokenizer.path")]
    if told:
        raise ConfigError(
            f"{folder} holds a run of an earlier plan with another configuration ({', '.join(told)}); give the family, "
            "size or mixture that was changed another name, or give another --out to start anew"
        )


class Sweep:
    """A plan in a folder: `runs/NAME` for each run, `records.jsonl` with a line for each budget that is done."""

    def __init__(self, plan: Plan, out: Path) -> None:
        """Builds what all runs share, the tokenizer. Raises ConfigError for another plan in the folder, TrainingError
        while another sweep works there."""
        self.plan, self.out = plan, out
        tokenizer = str(out / "tokenizer") if _makes_tokenizer(plan.base) else None
        self.runs = {run.name: run for run in expand(plan, tokenizer)}
        self.states = {name: State() for name in self.runs}
        with locked(out):
            self._keep_plan()
            self.processor = self._processor(tokenizer)

    def _keep_plan(self) -> None:
        check_plan(self.plan, self.out)
        if not (self.out / "runs").is_dir() and _makes_tokenizer(self.plan.base):
            shutil.rmtree(self.out / "tokenizer", ignore_errors=True)  # it may be another plan's
        write_whole(self.out / "plan.yaml", yaml.safe_dump(self.plan.__dict__, sort_keys=False))

    def _processor(self, tokenizer: str | None) -> NMMProcessor:
        """One tokenizer for all runs: losses under different ones cannot be compared."""
        config = next(iter(self.runs.values())).config
        if tokenizer is not None and not Path(tokenizer).is_dir():
            config = next(iter(expand(self.plan))).config
            mixture = parse_mixture({"sources": config.data.sources}, Path(config.data.root))
            processor = build_processor(config, mixture)
            clear_leftovers(Path(tokenizer))
            with atomic_directory(tokenizer) as staging:
                processor.tokenizer.save_pretrained(staging)
            config = next(iter(self.runs.values())).config
        return build_processor(config, parse_mixture({"sources": config.data.sources}, Path(config.data.root)))

    def folder(self, name: str) -> Path:
        return self.out / "runs" / name

    def is_done(self, name: str) -> bool:
        return (self.folder(name) / "final" / "run.json").is_file()

    def train(self, pool: Pool, report: Report = lambda sweep: None) -> Path:
        """Train what is left, `pool.free` runs at a time. Returns the records' path.

        A run that fails is tried again where its last checkpoint stands, `plan.retries` times. Raises TrainingError
        naming the runs that failed in the end; the others are trained all the same.
        """
        with locked(self.out):
            for name, state in self.states.items():
                state.status = "done" if self.is_done(name) else "waiting"
            self.write_records()
            while True:
                self._submit(pool)
                report(self)
                if not any(state.status == "running" for state in self.states.values()):
                    break
                for name, problem in pool.results(1.0):
                    self._settle(name, problem)
            report(self)
        failed = {name: state for name, state in self.states.items() if state.status != "done"}
        if failed:
            named = "; ".join(f"{name}: {state.problems[-1]}" for name, state in failed.items() if state.problems)
            raise TrainingError(
                f"{len(failed)} of {len(self.runs)} runs did not end: {named}. The records of the others are in "
                f"{self.records_path}; run the same command to try again"
            )
        return self.records_path

    def _submit(self, pool: Pool) -> None:
        for name, run in self.runs.items():
            if pool.free <= 0:
                return
            if self.states[name].status != "waiting" or not self._ready(run):
                continue
            if run.trunk is not None:
                try:
                    branch_off(self._branch_point(run), self.folder(name))
                except CheckpointError as error:
                    self._settle(name, f"{error} Or delete {self.folder(run.trunk)}, to train it again")
                    continue
            pool.submit(name, run.config.to_dict(), self.folder(name))
            self.states[name].status = "running"

    def _branch_point(self, run: Run) -> Path:
        assert run.trunk is not None
        return self.folder(run.trunk) / "checkpoints" / f"step-{run.at:08d}"

    def _ready(self, run: Run) -> bool:
        """A branch can start as soon as its trunk has passed the step."""
        return run.trunk is None or self._branch_point(run).is_dir() or any(self.folder(run.name).glob("checkpoints/*"))

    def _settle(self, name: str, problem: str | None) -> None:
        state = self.states[name]
        if problem is None and self.is_done(name):
            state.status = "done"
            self.write_records()
            return
        state.problems.append(problem or "it ended without a checkpoint")
        state.status = "waiting" if len(state.problems) <= self.plan.retries else "failed"

    @property
    def records_path(self) -> Path:
        return self.out / "records.jsonl"

    def write_records(self) -> None:
        """One line for each finished budget, in the plan's order, whatever order they ended in."""
        lines = [
            json.dumps(self.record(run))
            for run in self.runs.values()
            if run.trunk is not None and self.is_done(run.name)
        ]
        write_whole(self.records_path, "".join(line + "\n" for line in lines))

    def record(self, run: Run) -> dict[str, Any]:
        """What `nmm-train fit` reads of a run. Nothing that depends on the clock: the same sweep, the same records."""
        final = self.folder(run.name) / "final"
        told = read_run(final)
        losses = {k.removeprefix("loss_"): v for k, v in told["losses"].items() if k != "loss_avg"}
        if not losses:
            raise TrainingError(f"{final} has no validation losses; name sources under base.data.validation")
        config = told["config"]
        config["tokenizer"]["path"] = None  # where the sweep's folder lies does not matter
        record = {
            "family": told["family"],
            "n_params": told["params"]["paper"],
            "tokens": told["tokens"],
            "flops": told["paper_flops"],
            "loss": told["losses"]["loss_avg"],
            "losses": losses,
            "name": run.name,
            "size": run.size,
            "mixture": run.mixture,
            "seed": run.seed,
            "trunk": run.trunk,
            "steps": told["steps"],
            "image_tokens": told["image_tokens"],
            "n_params_total": told["params"]["total"],
            "flops_with_attention": told["flops"],
            "bad_steps": told["bad_steps"],
            "checkpoint": checkpoint_hash(final),
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "version": __version__,
        }
        if told["family"].endswith("moe"):
            model = config["model"]
            record |= {"num_experts": model["num_experts"], "num_experts_per_tok": model["num_experts_per_tok"]}
        return record

    def steps_done(self, name: str) -> int:
        """Steps that a run has made itself."""
        run = self.runs[name]
        if self.states[name].status == "done":
            return run.own_steps
        state = progress(self.folder(name)) if self.states[name].status == "running" else None
        return max(0, state.step - run.at) if state is not None else 0
