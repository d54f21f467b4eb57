"""Text tasks through lm-eval 0.4.13: its own, the user's YAML files, and those that ship with the project.

lm-eval builds the prompts, filters the answers and takes the means. What it leaves open is done here: data sets are
read from this disk only, an item that failed takes the score of its task away instead of spoiling it, and every score
has an interval, its task's version and hash, and the seeds.
"""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nmm_serve.engines.base import Engine
from nmm_serve.errors import ConfigError, DataError, EngineError, NMMError, unknown_name
from nmm_serve.evals.answers import Answers
from nmm_serve.evals.text_scores import number, scores

SHIPPED = Path(__file__).parent / "text_tasks"
ALL_SHIPPED = "nmm"
"""The tag of the tasks that ship with the project."""
FEWSHOT_SEED = 1234
"""lm-eval's own, so that few-shot prompts are those of everyone else."""
BOOTSTRAP_ITERS = 1000
"""Resamples of lm-eval's standard errors that have no closed form; its own default of 100,000 takes minutes a task."""
INSTALL = "pip install 'nmm-serve[evals]'"
DEFINITIONS = {
    "metrics": "lm-eval's, under its own names; shares are 0 to 1",
    "stderr": "lm-eval's standard error; null where lm-eval gives none",
    "intervals": "95 % percentile bootstrap over documents, 1,000 resamples",
    "acc": "share of items whose right choice has the highest log-likelihood",
    "exact_match": "share of items whose answer, up to the stop string, equals the target",
    "bits_per_byte": "-log2 of the likelihood of all documents over their UTF-8 bytes",
    "byte_perplexity": "2 to the power of bits_per_byte",
    "word_perplexity": "exp of the negative log-likelihood over white-space separated words",
    "chance": "what an answer without knowledge scores; stated by tasks that ship with the project",
    "truncated": "items whose beginning was cut off to fit the model's context",
}

StartTask = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which tasks, and how they are asked."""

    tasks: tuple[str, ...] = (ALL_SHIPPED,)
    """Names of tasks, groups or tags, patterns like `nmm_*`, or paths of YAML files."""
    include_path: tuple[Path, ...] = ()
    """Folders with YAML files of the user's. They are programs: `!function` runs what they name."""
    num_fewshot: int | None = None
    chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    """Over those of the tasks."""
    output_dir: Path | None = None
    """Where results go in lm-eval's own format."""
    log_samples: bool = False
    """Every document with its answers too."""
    leave_out: bool = False
    """Leave out, and name, tasks that the engine cannot do, in place of an error."""


@dataclass(frozen=True)
class TextTasks:
    """Loaded tasks, their data read."""

    manager: Any
    loaded: dict[str, Any]
    specs: list[str]


_PYTHON = {"True": True, "False": False, "None": None}


def parse_gen_kwargs(text: str) -> dict[str, Any]:
    """`key=value,...` with JSON's or Python's values, or words. Raises ConfigError for anything else."""
    options = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not (key.strip() and equals):
            raise ConfigError(f"--gen-kwargs {text!r}: {pair!r} is not key=value; for example max_gen_toks=32")
        try:
            options[key.strip()] = json.loads(value)
        except ValueError:
            options[key.strip()] = _PYTHON.get(value.strip(), value)
    return options


def load_tasks(options: TextOptions) -> TextTasks:
    """Find the tasks and read their data, without a model.

    lm-eval's own tasks are looked through only for a name that is neither shipped nor in `include_path`: it takes half
    a minute. Raises DataError for an unknown name, for a task whose data are not on this disk, and for a task that
    lm-eval cannot load.
    """
    with _lm_eval():
        for folder in options.include_path:
            if not folder.is_dir():
                raise DataError(f"--include-path {folder} is not a folder; give the folder that holds the YAML files")
        include = [str(SHIPPED), *(str(folder.resolve()) for folder in options.include_path)]
        manager = _index(include, False)
        specs, unknown = _find(manager, options.tasks)
        if unknown:
            manager = _index(include, True)
            specs, unknown = _find(manager, options.tasks)
        if unknown:
            raise DataError(unknown_name("text task", unknown[0], _worth_naming(manager, unknown[0])))
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        from_file: dict[str, str] = {}
        for spec in specs:
            part = _load(manager, spec)
            if spec.endswith(".yaml"):
                if clash := [name for name in part["tasks"] if name in loaded["tasks"]]:
                    raise DataError(
                        f"{spec} and {from_file.get(clash[0], 'another of --tasks')} both hold a task {clash[0]!r}; "
                        "rename one, or evaluate them apart"
                    )
                from_file |= dict.fromkeys(part["tasks"], spec)
            elif clash := [name for name in part["tasks"] if name in from_file]:
                raise DataError(f"{from_file[clash[0]]} and {spec} both hold a task {clash[0]!r}; rename yours")
            for kind, entries in part.items():
                loaded[kind].update(entries)
        return TextTasks(manager, loaded, specs)


def _index(folders: list[str], defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folders, include_defaults=defaults)


def _find(manager: Any, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names that exist, each once, and those that do not."""
    found: dict[str, None] = {}
    unknown = []
    for name in names:
        if Path(name).suffix == ".yaml":
            if not Path(name).is_file():
                raise DataError(f"{name} does not exist; give the path of a task's YAML file, or a task's name")
            if all(Path(other).resolve() != Path(name).resolve() for other in found if other.endswith(".yaml")):
                found[name] = None
        elif matches := manager.match_tasks([name]):
            found.update(dict.fromkeys(sorted(matches)))
        else:
            unknown.append(name)
    return list(found), unknown


def _worth_naming(manager: Any, name: str) -> list[str]:
    """lm-eval has some 14,000 names: the shipped ones, and those near to the wrong one."""
    import difflib

    near = difflib.get_close_matches(name, manager.all_tasks, n=5)
    return sorted({*near, *(task for task in manager.all_tasks if task.startswith(f"{ALL_SHIPPED}_")), ALL_SHIPPED})


def _load(manager: Any, spec: str) -> dict[str, Any]:
    try:
        return manager.load([spec])
    except Exception as error:
        if isinstance(error, NMMError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise DataError(
                f"task {spec!r}: {text}. Relative data_files are looked up from the folder that the command runs in; "
                "write absolute paths"
            ) from error
        if isinstance(error, ConnectionError):
            raise DataError(
                f"task {spec!r}: its data set is not on this disk ({text}). Where there is a network, run the command "
                "once with HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0, then copy the folder HF_HOME here"
            ) from error
        raise DataError(f"task {spec!r} cannot be loaded: {type(error).__name__}: {text}") from error


@contextmanager
def _lm_eval(describe_machine: bool = False) -> Iterator[Any]:
    """lm-eval, quiet, and without a network unless the user says so."""
    try:
        import datasets.config
        import huggingface_hub.constants
        import lm_eval.api.task
        import lm_eval.evaluator
        import lm_eval.models  # before ours: see lm_eval_model
        import lm_eval.tasks
    except ImportError as error:
        raise DataError(f"text tasks need lm-eval ({error}); install it with: {INSTALL}") from None
    logger = logging.getLogger("lm_eval")
    level = logger.level
    changes: list[tuple[Any, str, Any]] = [
        (lm_eval.api.task, "tqdm", lambda documents, **_: documents),  # we have a bar of our own
        # the revision of whatever folder the command runs in, with git's complaint where that is no repository
        (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
    ]
    if not describe_machine:  # takes seconds, and stands in lm-eval's own results only
        changes.append((lm_eval.evaluator, "add_env_info", lambda _results: None))
    if not {"HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"} & set(os.environ):
        changes += [(module, "HF_HUB_OFFLINE", True) for module in (datasets.config, huggingface_hub.constants)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    bars_disabled = datasets.are_progress_bars_disabled()
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        yield lm_eval
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        logger.setLevel(level)
        if not bars_disabled:
            datasets.enable_progress_bars()


def run(
    engine: Engine,
    tasks: TextTasks,
    options: TextOptions,
    *,
    name: str,
    limit: int | None,
    seed: int,
    kept: Answers,
    chunk_size: int,
    items: list[dict[str, Any]],
    start_task: StartTask,
) -> dict[str, Any]:
    """Evaluate and give the record's section; one entry a document is added to `items`.

    What `kept` holds from an earlier run is not asked again; new answers are on disk before the next `chunk_size` are
    asked.

    Raises EngineError when the engine breaks or cannot do what a task needs, OSError when results cannot be saved.
    """
    from nmm_serve.evals.lm_eval_model import NMM, Failure
    from nmm_serve.evals.text_results import ResultsFolder

    failures: list[Failure] = []
    with _lm_eval(describe_machine=options.output_dir is not None) as lm_eval:
        versions = {task_name: task.VERSION for task_name, task in tasks.loaded["tasks"].items()}
        model = NMM(
            engine, seed=seed, failures=failures, start_task=start_task, kept=kept, versions=versions,
            chunk_size=chunk_size,
        )  # fmt: skip
        left_out = _impossible(model, tasks, options)
        folder = ResultsFolder(options.output_dir, name, engine) if options.output_dir else None
        results = lm_eval.simple_evaluate(
            model,
            model_args={"model": folder.name if folder else name},
            tasks=[
                *tasks.loaded["groups"].values(),
                *(task for task in _outside_groups(tasks.loaded) if task.task_name not in left_out),
            ],
            task_manager=tasks.manager,
            num_fewshot=options.num_fewshot,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            evaluation_tracker=folder.tracker if folder else None,
            system_instruction=options.system_instruction,
            apply_chat_template=options.chat_template,
            gen_kwargs=options.gen_kwargs or None,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=FEWSHOT_SEED,
        )
        assert results is not None
        samples = results.pop("samples")
        failed: dict[str, dict[int, str]] = defaultdict(dict)
        for failure in failures:
            failed[failure.task].setdefault(failure.doc_id, failure.error)
        section = _section(results, samples, failed, model, tasks, options, seed) | {"left_out": left_out}
        items.extend(_items(samples, failed))
        if folder:
            section["saved"] = folder.save(_without_failed(results, failed), samples, failed, options.log_samples)
    return section


def _impossible(model: Any, tasks: TextTasks, options: TextOptions) -> dict[str, str]:
    """Reasons by task. Raises EngineError unless tasks are to be left out."""
    reasons = {name: model.cannot(task, options.chat_template) for name, task in tasks.loaded["tasks"].items()}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if left_out and not options.leave_out:
        name, reason = next(iter(left_out.items()))
        raise EngineError(f"{model.engine.model} cannot do task {name!r}: {reason}; evaluate the checkpoint itself")
    return left_out


def _outside_groups(loaded: dict[str, Any]) -> list[Any]:
    inside = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    return [task for task_name, task in loaded["tasks"].items() if task_name not in inside]


# ---- the record


def _section(
    results: dict[str, Any],
    samples: dict[str, list[dict[str, Any]]],
    failed: dict[str, dict[int, str]],
    model: Any,
    tasks: TextTasks,
    options: TextOptions,
    seed: int,
) -> dict[str, Any]:
    from nmm_serve.evals.text_results import task_hash

    described = {}
    for task_name, counts in results["n-samples"].items():
        task, documents = tasks.loaded["tasks"][task_name], samples[task_name]
        broken = failed.get(task_name, {})
        kept = [sample for sample in documents if sample["doc_id"] not in broken]
        described[task_name] = {
            "version": results["versions"][task_name],
            "output_type": task.OUTPUT_TYPE,
            "hash": task_hash(documents),
            "n": counts["effective"],
            "n_total": counts["original"],
            "num_fewshot": results["n-shot"][task_name],
            "chance": (task.get_config("metadata") or {}).get("chance"),
            "higher_is_better": results["higher_is_better"].get(task_name, {}),
            "truncated": len(model.truncated.get(task_name, ())),
            "failed": len(broken),
            **scores(task, results["results"][task_name], documents, kept, seed),
        }
    groups = {
        group: None if any(failed.get(t.task_name) for t in tasks.loaded["groups"][group].get_all_tasks())
        else {key: number(value) for key, value in found.items() if isinstance(value, int | float)}
        for group, found in results.get("groups", {}).items()
    }  # fmt: skip
    errors = [
        {"id": f"{task_name}/{doc_id}", "error": error}
        for task_name, broken in failed.items()
        for doc_id, error in sorted(broken.items())
    ]
    return {
        "definitions": DEFINITIONS,
        "lm_eval": version("lm-eval"),
        "chat_template": options.chat_template,
        "system_instruction": options.system_instruction,
        "gen_kwargs": options.gen_kwargs,
        "default_new_tokens": model.max_gen_toks,
        "seeds": {"python": seed, "numpy": seed, "torch": seed, "bootstrap": seed, "fewshot": FEWSHOT_SEED},
        "complete": all(task["n"] == task["n_total"] for task in described.values()),
        "n": sum(task["n"] for task in described.values()),
        "n_total": sum(task["n_total"] for task in described.values()),
        "requests": model.ask.requests,
        "answers_reused": model.ask.kept.reused,
        "failed": len(errors),
        "errors": errors,
        "tasks": described,
        "groups": groups,
    }


def _items(samples: dict[str, list[dict[str, Any]]], failed: dict[str, dict[int, str]]) -> Iterator[dict[str, Any]]:
    """One entry a document and filter, to compare models document by document."""
    for task_name, documents in samples.items():
        for sample in documents:
            error = failed.get(task_name, {}).get(sample["doc_id"])
            numbers = {metric: sample[metric] for metric in sample["metrics"]}
            yield {
                "task": "text",
                "text_task": task_name,
                "id": f"{task_name}/{sample['doc_id']}",
                "filter": sample["filter"],
                "doc_hash": sample["doc_hash"],
                "target": str(sample["target"]),
                "scores": None if error else {m: v for m, v in numbers.items() if number(v) is not None},
                "error": error,
            }


def _without_failed(results: dict[str, Any], failed: dict[str, dict[int, str]]) -> dict[str, Any]:
    """Results as lm-eval saves them, with null for the metrics of tasks with failed items, and of their groups."""
    spoiled = {task for task, broken in failed.items() if broken}
    changed = True
    while changed:  # groups of groups
        above = {group for group, inner in results.get("group_subtasks", {}).items() if spoiled & set(inner)} - spoiled
        changed = bool(above)
        spoiled |= above

    def cleaned(found: dict[str, Any]) -> dict[str, Any]:
        return {key: None if "," in key else value for key, value in found.items()}

    for kind in ("results", "groups"):
        if kind in results:
            results[kind] = {t: cleaned(found) if t in spoiled else found for t, found in results[kind].items()}
    for task, broken in failed.items():
        results["results"][task]["failed"] = len(broken)
    return results
