"""Models side by side: every size with every engine, one after the other, and what training costs.

What fails is named and left out; the rest goes on. A run whose models have all ended stays unfinished, for --resume; a
cell that ends them all again is then put in as failed. The document at `out` is up to date after each cell.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmm_serve.errors import EngineError, NMMError
from nmm_serve.evals.lab import ledger, resources
from nmm_serve.evals.lab.contenders import Contender, Group, check_equal
from nmm_serve.evals.lab.document import cell_name, keep, new_document, take_up, training_cell_name
from nmm_serve.evals.lab.interleave import Cell, cells, interleave
from nmm_serve.evals.lab.process import told
from nmm_serve.evals.lab.training import BATCH, Trainee, measure_steps
from nmm_serve.evals.lab.worker import Worker
from nmm_serve.evals.latency import UNSEEN, Load
from nmm_serve.server_options import on_gpu

ENGINES = ("torch", "vllm", "onnx")
TRAINING = "training"
"""In the place of an engine's name."""

Start = Callable[[str, int], Callable[[int], None]]


def settings(engine: str, load: Load, models: int) -> dict[str, Any]:
    """Engine options of a fair comparison: room for every request, no cache across requests, the encoder compiled. On
    a GPU also captured (vLLM's graphs of it were never run), and a cache for these requests instead of all memory: that
    would be the same peak for every model."""
    at_once = max(load.concurrencies)
    if engine != "vllm":
        return {"batch_size": at_once} | ({"compile_encoder": True} if engine == "torch" else {})
    options: dict[str, Any] = {
        "max_num_seqs": at_once,
        "prefix_caching": False,
        "image_cache": False,
        "enforce_eager": False,
    }
    if on_gpu():
        options["compilation_config"] = {"cudagraph_mm_encoder": True}
        options["fitted_cache"] = True
        options["gpu_memory_utilization"] = 0.9 / (models + 1)  # vLLM wants as much to be free; one counts operators
    return options


@dataclass(kw_only=True)
class Comparison:
    """One comparison on its way: what is measured, and the document that it fills."""

    document: dict[str, Any]
    load: Load
    out: Path
    folder: Path
    files: Sequence[Path]
    seed: int
    start_task: Start

    def keep(self) -> None:
        keep(self.document, self.out)

    def section(self, name: str, group: Group, engine: str) -> dict[str, Any]:
        """The run of a group with an engine: the one that is there already, or a new one, not yet in it."""
        for run in self.document[name]:
            if (run["group"], run["engine"]) == (group.label, engine):
                return run
        return {"group": group.label, "engine": engine, "final": False, "models": [], "cells": []}

    def fail(self, group: Group, engine: str, model: str, cell: str | None, error: str) -> None:
        failure = {"group": group.label, "engine": engine, "model": model, "cell": cell, "error": error}
        self.document["failures"].append(failure)
        self.keep()

    def open(
        self,
        stack: ExitStack,
        group: Group,
        engine: str,
        contenders: Sequence[Contender],
        start: Callable[[Contender], Any],
    ) -> list[Any]:
        """A process for each model; those that do not open are named and left out."""
        opened = []
        for contender in contenders:
            try:
                child = start(contender)
            except Exception as error:  # whatever one model does, the others go on
                self.fail(group, engine, contender.name, None, told(error))
                continue
            stack.callback(child.close)
            opened.append(child)
        return opened

    def go_through(
        self,
        section: str,
        run: dict[str, Any],
        group: Group,
        plan: Sequence[Any],
        start: Callable[[Contender], Any],
        measure: Callable[[list[Any], Any], dict[str, Any]],
        name: Callable[[dict[str, Any]], str],
        costs: Callable[[Any], dict[str, Any]],
    ) -> None:
        """Measure the cells of `plan` that the run lacks, all its models open at once."""
        contenders: Sequence[Contender] = group.contenders
        while True:
            put_in = False
            with ExitStack() as stack:
                models = self.open(stack, group, run["engine"], contenders, start)
                names = [model.name for model in models]
                for cell in plan[len(run["cells"]) :] if models else ():
                    measured = measure(models, cell)
                    put_in = self.close_cell(section, run, group, measured, name(measured), models)
                    if not models:
                        break
                self.close_run(run, group, models, costs)
            if models or not put_in:
                return
            contenders = [contender for contender in contenders if contender.name in names]  # anew, for what is left

    def close_cell(
        self, section: str, run: dict[str, Any], group: Group, cell: dict[str, Any], name: str, models: list[Any]
    ) -> bool:
        """Put a measured cell into the document; models whose process has ended leave `models`.

        False for a cell that is not put in: the first time that one gave nothing and ended all models, it waits, like
        those after it, to be taken up. Ended again, it is no accident, and stands there without results.
        """
        for failure in cell.pop("failures"):
            self.fail(group, run["engine"], failure["model"], name, failure["error"])
        models[:] = [model for model in models if model.alive]
        put_in = bool(cell["results"] or models or run.get("ended_in") == name)
        if put_in:
            run["cells"].append(cell)
            run.pop("ended_in", None)
        else:
            run["ended_in"] = name
        if not any(run is known for known in self.document[section]):
            self.document[section].append(run)
        self.keep()
        return put_in

    def close_run(
        self, run: dict[str, Any], group: Group, models: list[Any], costs: Callable[[Any], dict[str, Any]]
    ) -> None:
        """What each model took, now that all cells are measured. A run that no model came through is none."""
        if not models:
            return
        run["models"] = []
        for model in models:
            try:
                run["models"].append(costs(model))
            except NMMError as error:
                self.fail(group, run["engine"], model.name, "costs", str(error))
        run["final"] = True
        self.keep()

    def run(self, group: Group, engine: str) -> None:
        """One engine: all models of a group open at once, all cells."""
        run = self.section("runs", group, engine)
        plan = cells(self.load, group.image_size)
        progress = self.start_task(
            f"{group.label} {engine}", sum(cell.requests(self.load) for cell in plan) * len(group.contenders)
        )
        done = plan[: len(run["cells"])]
        progress(sum(cell.requests(self.load) for cell in done) * len(group.contenders))
        if run["final"]:
            return
        numbers = itertools.count(sum(cell.requests(self.load) * cell.workload.width for cell in done))
        exports: dict[str, float | None] = {}

        def start(contender: Contender) -> Worker:
            model, exports[contender.name] = for_engine(contender, engine, self.folder / group.label)
            options = settings(engine, self.load, len(group.contenders))
            return Worker(contender.name, str(model), engine, options, files=self.files, seed=self.seed)

        def measure(workers: list[Worker], cell: Cell) -> dict[str, Any]:
            return interleave(
                workers, cell, self.load, numbers, baseline=group.baseline, image_size=group.image_size,
                seed=self.seed, reason=UNSEEN.get(engine), progress=progress,
            )  # fmt: skip

        by_name = {contender.name: contender for contender in group.contenders}

        def costs(worker: Worker) -> dict[str, Any]:
            first, _, _ = (next(numbers) for _ in range(3))  # what it takes to count operator calls
            return measured_costs(by_name[worker.name], worker, exports[worker.name], self.load, first)

        self.go_through("runs", run, group, plan, start, measure, cell_name, costs)

    def train(self, group: Group) -> None:
        """Training steps of all models of a group, at every resolution of the load."""
        run = self.section("training", group, TRAINING)
        shapes = [cell.workload for cell in cells(self.load, group.image_size) if cell.varies == "resolution"]
        plan = [None, *(shape.resolution for shape in shapes)]
        rounds, warmup = self.load.requests, self.load.warmup
        each = (rounds + warmup) * len(group.contenders)
        progress = self.start_task(f"{group.label} {TRAINING}", each * len(plan))
        progress(each * len(run["cells"]))
        if run["final"]:
            return
        numbers = itertools.count(len(run["cells"]) * (rounds + warmup) * BATCH)

        def start(contender: Contender) -> Trainee:
            return Trainee(contender.name, contender.path, files=self.files, seed=self.seed)

        def measure(trainees: list[Trainee], resolution: int | None) -> dict[str, Any]:
            return measure_steps(
                trainees, resolution, rounds, warmup, numbers, baseline=group.baseline,
                image_size=group.image_size, seed=self.seed, progress=progress,
            )  # fmt: skip

        def costs(trainee: Trainee) -> dict[str, Any]:
            return {"model": trainee.name, "settings": trainee.about, "memory": trainee.memory()}

        self.go_through("training", run, group, plan, start, measure, training_cell_name, costs)


def compare(
    groups: Sequence[Group],
    engines: Sequence[str],
    load: Load,
    out: Path,
    folder: Path,
    *,
    training: bool = True,
    resume: bool = False,
    files: Sequence[Path] = (),
    seed: int = 0,
    start_task: Start = lambda _name, _total: lambda _: None,
) -> dict[str, Any]:
    """Measure every group with every engine, then its training steps, and give the document.

    Args:
        out: the document's file, brought up to date after each cell.
        folder: takes exported models.
        training: also time training steps.
        resume: go on with the document at `out`, if there is one.

    Raises DataError for models whose requests would differ, and for a document that was measured otherwise.
    """
    for group in groups:
        check_equal(group.contenders)
    document = new_document(groups, load, files, seed)
    if resume and out.exists():
        document = take_up(out, document)
    comparison = Comparison(
        document=document, load=load, out=out, folder=folder, files=files, seed=seed, start_task=start_task
    )
    for group in groups:
        for engine in engines:
            comparison.run(group, engine)
        if training:
            comparison.train(group)
    document["final"] = all(run["final"] for run in (*document["runs"], *document["training"]))
    comparison.keep()
    return document


def measured_costs(
    contender: Contender, worker: Worker, export_s: float | None, load: Load, number: int
) -> dict[str, Any]:
    """What one model takes with one engine, its row of the ledger included."""
    memory = worker.memory()
    calls = operator_calls(worker, load, number)
    return {
        "model": contender.name,
        "settings": worker.about,
        "startup_s": worker.startup_s,
        "export_s": export_s,
        "memory": memory,
        "artefact": resources.artefact(worker.model),
        "ledger": ledger.entry(worker.engine, Path(worker.model), contender.path, calls, worker.about),
    }


def operator_calls(worker: Worker, load: Load, number: int) -> dict[str, Any]:
    """Of the worker's model without compilation. vLLM's compiled code cannot be left out for a while, as torch's is, so
    its operators are counted in an engine of their own."""
    if not worker.about.get("compile_decoder"):
        return worker.operator_calls(load.workload, number)
    plain = worker.again(enforce_eager=True)
    try:
        return plain.operator_calls(load.workload, number)
    finally:
        plain.close()


def ledger_row(contender: Contender, engine: str, folder: Path) -> dict[str, Any]:
    """The ledger of one checkpoint and engine, with what a short run of it measures."""
    model, export_s = for_engine(contender, engine, folder)
    load = Load(concurrencies=(1,), requests=1, warmup=0, output_tokens=1)
    worker = Worker(contender.name, str(model), engine, settings(engine, load, 1))
    try:
        costs = measured_costs(contender, worker, export_s, load, 0)
    finally:
        worker.close()
    return costs.pop("ledger") | {name: value for name, value in costs.items() if name != "settings"}


def for_engine(contender: Contender, engine: str, folder: Path) -> tuple[Path, float | None]:
    """The directory that an engine opens: for ONNX Runtime an export, and the seconds it took.

    Raises EngineError for an engine that cannot be compared in a process of its own.
    """
    if engine not in ENGINES:
        raise EngineError(f"engine {engine!r} is not started from a checkpoint; compare {', '.join(ENGINES)}")
    if engine != "onnx":
        return contender.path, None
    from nmm_serve.onnx.export import export

    out = folder / f"{contender.name}-onnx"
    out.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    export(contender.path, out)
    return out, time.perf_counter() - begin
