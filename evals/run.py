"""Run an evaluation: ask the engine, score, and put everything into one record.

An item that failed is never scored as an answer. When any item failed, the task's numbers are null with the reason, and
the numbers over the items that did come back stand under `answered_only`, which says over how many.

Answers are kept on disk as they come (`evals/answers.py`): a run that was killed goes on when it is started again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nmm_serve.engines import default_engine, open_engine
from nmm_serve.engines.base import Engine, Output
from nmm_serve.errors import DataError
from nmm_serve.evals import caption, latency, text, vqa
from nmm_serve.evals.answers import Answers, identity
from nmm_serve.evals.asking import ask
from nmm_serve.evals.datasets import CaptionSet, Files, Id, Question, VQASet, load_captions, load_vqa
from nmm_serve.evals.lab.process import told
from nmm_serve.evals.latency import Load
from nmm_serve.evals.records import Record, check_place, new_record, publish, write_record
from nmm_serve.evals.samples import CARRIED, by_hash, thumbnail
from nmm_serve.evals.text import TextOptions, TextTasks

VQA_PROMPT = "{question}"
CAPTION_PROMPT = "Describe the image."
VQA_MAX_TOKENS = 16
CAPTION_MAX_TOKENS = 64
VQA_VERSION = CAPTION_VERSION = TEXT_VERSION = 1
"""Raised with a change in how a task asks that prompt and decoding do not show: kept answers are then asked again."""
_AT_ONCE = {"torch": "batch_size", "onnx": "batch_size", "vllm": "max_num_seqs", "openai": "concurrency"}
"""What each engine calls the number of requests that it runs at once."""
_LEAST_DEFAULT = 16
"""The smallest of their defaults."""

StartTask = Callable[[str, int], Callable[[int], None]]
"""Called with a task's name and its number of items; gives back what to call with each count of finished ones."""


def _no_progress(_name: str, _total: int) -> Callable[[int], None]:
    return lambda _: None


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to evaluate, on what, and where the record goes."""

    tasks: tuple[str, ...]
    files: Files
    out: Path
    name: str | None = None
    """How the model is called in tables; its folder's name by default."""
    limit: int | None = None
    at_once: int | None = None
    """Requests that the engine runs at once; None leaves it to the engine."""
    chunk_size: int | None = None
    """Requests of a text task handed to the engine in one call; a kill loses no more than these.
    Default: 8 x `at_once`, or 128."""
    seed: int = 0
    load: Load = field(default_factory=Load)
    text: TextOptions = field(default_factory=TextOptions)

    @property
    def chunk(self) -> int:
        return self.chunk_size or 8 * (self.at_once or _LEAST_DEFAULT)


@dataclass(frozen=True)
class Data:
    """What the tasks of an evaluation need; None or empty for a task that is not run."""

    vqa: VQASet | None
    captions: CaptionSet | None
    latency_images: tuple[Path, ...]
    text: TextTasks | None = None


def load_data(options: Options) -> Data:
    """Read and check everything, without a model, so that a wrong path does not cost the time to load one.

    Raises DataError for data that do not fit, and for a place where the record cannot be written.
    """
    check_place(options.out)
    questions = load_vqa(options.files, options.limit) if "vqa" in options.tasks else None
    images = load_captions(options.files, options.limit) if "caption" in options.tasks else None
    latency_images = _latency_images(options.files, questions, images) if "latency" in options.tasks else ()
    text_tasks = text.load_tasks(options.text) if "text" in options.tasks else None
    return Data(questions, images, latency_images, text_tasks)


def open_for(options: Options, model: str, engine: str | None) -> Engine:
    """Open the model so that `options.at_once` requests, and as many as the latency tasks need, run at once.

    Raises EngineError for an unknown engine or one that does not fit the model.
    """
    kind = engine or default_engine(model)
    needed = max(options.load.concurrencies) if "latency" in options.tasks else 1
    settings = {}
    if kind in _AT_ONCE and (options.at_once or needed > _LEAST_DEFAULT):
        settings[_AT_ONCE[kind]] = max(options.at_once or 1, needed)
    return open_engine(model, engine, **settings)


def evaluate(
    engine: Engine,
    data: Data,
    options: Options,
    start_task: StartTask = _no_progress,
    measured: Mapping[str, dict[str, Any]] | None = None,
    startup_s: float | None = None,
) -> Record:
    """Run the tasks, write the record to `options.out` and return it. `measured`: sections that are there already;
    `startup_s`: how long opening the engine took.

    A request that fails does not raise but is counted and named in the record. When a task breaks off, by whatever
    error (a GPU that runs out of memory is torch's own), what was finished before it is written, and the record names
    under `unfinished` that task with the reason, and those after it. Raises that error when nothing was finished.
    """
    record = new_record(engine, name=options.name, seed=options.seed)
    items: list[dict[str, Any]] = []
    record["unfinished"] = {}
    steps = _steps(engine, data, options, items, start_task, startup_s, record["model"]["name"])
    for position, (task, step) in enumerate(steps.items()):
        before = len(items)
        try:
            record["tasks"][task] = step()
        except Exception as error:
            if not record["tasks"] and not measured:
                raise
            del items[before:]
            later = dict.fromkeys(list(steps)[position + 1 :], f"not begun, since {task} broke off")
            record["unfinished"] = {task: told(error), **later}
            break
    record["tasks"] |= measured or {}
    complete = all(section.get("complete", True) for section in record["tasks"].values())
    record["final"] = complete and not record["unfinished"]
    record["samples"] = _samples(items)
    write_record(record, items, options.out)
    return record


def _steps(
    engine: Engine,
    data: Data,
    options: Options,
    items: list[dict[str, Any]],
    start_task: StartTask,
    startup_s: float | None,
    name: str,
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What makes each task's section, in the order in which they run."""
    folder, who = options.out.parent, identity(engine, options.seed)

    def run_vqa(questions: VQASet) -> dict[str, Any]:
        with Answers(folder, "vqa", VQA_VERSION, who) as kept:
            return _run_vqa(engine, questions, options, kept, items, start_task)

    def run_caption(images: CaptionSet) -> dict[str, Any]:
        with Answers(folder, "caption", CAPTION_VERSION, who) as kept:
            return _run_caption(engine, images, options, kept, items, start_task)

    def run_latency(images: tuple[Path, ...]) -> dict[str, Any]:
        load, progress = options.load, start_task("latency", options.load.total)
        return latency.measure(engine, images, load, progress=progress, seed=options.seed, startup_s=startup_s)

    def run_text(tasks: TextTasks) -> dict[str, Any]:
        with Answers(folder, "text", TEXT_VERSION, who) as kept:
            return text.run(
                engine, tasks, options.text, name=name, limit=options.limit, seed=options.seed, kept=kept,
                chunk_size=options.chunk, items=items, start_task=start_task,
            )  # fmt: skip

    steps: dict[str, Callable[[], dict[str, Any]]] = {}
    if data.vqa is not None:
        steps["vqa"] = partial(run_vqa, data.vqa)
    if data.captions is not None:
        steps["caption"] = partial(run_caption, data.captions)
    if data.latency_images:
        steps["latency"] = partial(run_latency, data.latency_images)
    if data.text is not None:
        steps["text"] = partial(run_text, data.text)
    return steps


def failures(record: Record) -> list[str]:
    """One line per failed item of the record, and per task that was not finished, naming it."""
    lines = [f"{task}: not finished: {reason}" for task, reason in record.get("unfinished", {}).items()]
    for task, section in record["tasks"].items():
        for error in section.get("errors", ()):
            lines.append(f"{task}: {error['id']}: {error['error']}")
        for what, cell in latency.cells(section):
            if cell["failed"]:
                lines.append(
                    f"{task}: {cell['failed']} of {cell['n']} requests at {what}: " + "; ".join(cell["errors"])
                )
    return lines


def _run_vqa(
    engine: Engine, data: VQASet, options: Options, kept: Answers, items: list[dict[str, Any]], start_task: StartTask
) -> dict[str, Any]:
    progress = start_task("vqa", len(data.questions))
    samples = [(q.question_id, q.image, VQA_PROMPT.format(question=q.text)) for q in data.questions]
    answers, speed = ask(engine, samples, VQA_MAX_TOKENS, progress, kept)
    good = [q for q in data.questions if answers[q.question_id].error is None]
    scored = vqa.score(good, {q.question_id: answers[q.question_id].text.strip() for q in good}) if good else None
    per_question = {item["question_id"]: item for item in scored.items()} if scored else {}
    for q in data.questions:
        output = answers[q.question_id]
        scores = per_question.get(q.question_id, {})
        items.append(
            {
                "task": "vqa",
                "question_id": q.question_id,
                "image_id": q.image_id,
                "image": str(q.image),
                "question": q.text,
                "question_type": q.question_type,
                "answer_type": q.answer_type,
                "answers": list(q.answers),
                "prediction": output.text.strip() if output.error is None else None,
                "accuracy": scores.get("score"),
                "exact_match": scores.get("exact_match"),
                "relaxed_match": scores.get("relaxed_match"),
                "finish_reason": output.finish_reason,
                "error": output.error,
            }
        )
    section = {
        "definitions": vqa.DEFINITIONS,
        "prompt": VQA_PROMPT,
        "decoding": {"max_tokens": VQA_MAX_TOKENS, "temperature": 0.0},
        "data": data.fingerprint,
        "complete": data.complete,
        "n": len(data.questions),
        "n_total": data.total,
        "images": len({q.image_id for q in data.questions}),
        "answers_reused": kept.reused,
        "speed": speed,
        **_failed((q.question_id, answers[q.question_id]) for q in data.questions),
        "cut_at_max_tokens": sum(o.finish_reason == "length" for o in answers.values()),
        "few_answers": vqa.few_answers(data.questions),
        **vqa.baselines(data.questions),
    }
    numbers = _vqa_numbers(good, scored, options.seed) if scored else None
    keys = ("accuracy", "interval", "exact_match", "relaxed_accuracy", "per_question_type", "per_answer_type")
    return publish(section, numbers, keys)


def _vqa_numbers(questions: Sequence[Question], scored: vqa.VQAScore, seed: int) -> dict[str, Any]:
    official = scored.official()

    def groups(name: str, field_name: str) -> dict[str, Any]:
        members: dict[str, int] = {}
        for q in questions:
            members[getattr(q, field_name)] = members.get(getattr(q, field_name), 0) + 1

        def in_group(group: str, question: Question) -> bool:
            return getattr(question, field_name) == group

        return {
            group: {
                "accuracy": value,
                "n": members[group],
                "interval": _as_dict(scored.interval(partial(in_group, group), seed)),
            }
            for group, value in official[name].items()
        }

    return {
        "accuracy": official["overall"],
        "interval": _as_dict(scored.interval(seed=seed)),
        "exact_match": scored.exact_match,
        "relaxed_accuracy": scored.relaxed_accuracy,
        "per_question_type": groups("per_question_type", "question_type"),
        "per_answer_type": groups("per_answer_type", "answer_type"),
    }


def _run_caption(
    engine: Engine,
    data: CaptionSet,
    options: Options,
    kept: Answers,
    items: list[dict[str, Any]],
    start_task: StartTask,
) -> dict[str, Any]:
    progress = start_task("caption", len(data.images))
    samples = [(i.image_id, i.image, CAPTION_PROMPT) for i in data.images]
    answers, speed = ask(engine, samples, CAPTION_MAX_TOKENS, progress, kept)
    good = [i for i in data.images if answers[i.image_id].error is None]
    scored = None
    if good:
        scored_all = start_task("caption scores", 1)  # Java and the bootstrap take a while
        scored = caption.score(good, {i.image_id: answers[i.image_id].text.strip() for i in good}, seed=options.seed)
        scored_all(1)
    position = {i.image_id: index for index, i in enumerate(good)}
    for i in data.images:
        output = answers[i.image_id]
        per_image = tokens = None
        if scored is not None and i.image_id in position:
            per_image = {name: values[position[i.image_id]] for name, values in scored.per_image.items()}
            hypothesis, references = scored.tokens[position[i.image_id]]
            tokens = {"prediction": hypothesis, "references": references}
        items.append(
            {
                "task": "caption",
                "image_id": i.image_id,
                "image": str(i.image),
                "references": list(i.references),
                "prediction": output.text.strip() if output.error is None else None,
                "scores": per_image,
                "tokens": tokens,
                "finish_reason": output.finish_reason,
                "error": output.error,
            }
        )
    section = {
        "definitions": caption.DEFINITIONS,
        "prompt": CAPTION_PROMPT,
        "decoding": {"max_tokens": CAPTION_MAX_TOKENS, "temperature": 0.0},
        "data": data.fingerprint,
        "complete": data.complete,
        "n": len(data.images),
        "n_total": data.total,
        "answers_reused": kept.reused,
        "speed": speed,
        **_failed((i.image_id, answers[i.image_id]) for i in data.images),
        "cut_at_max_tokens": sum(o.finish_reason == "length" for o in answers.values()),
        "tokenizer": scored.tokenizer if scored else None,
        "captions_outside_fallback": scored.outside_fallback if scored else None,
    }
    numbers = None
    if scored is not None:
        numbers = {
            "metrics": scored.overall,
            "metric_reasons": scored.reasons,
            "intervals": {name: _as_dict(interval) for name, interval in scored.intervals.items()},
        }
    return publish(section, numbers, ("metrics", "metric_reasons", "intervals"))


def _failed(outputs: Iterable[tuple[Id, Output]]) -> dict[str, Any]:
    errors = [{"id": sample_id, "error": output.error} for sample_id, output in outputs if output.error is not None]
    return {"failed": len(errors), "errors": errors}


def _as_dict(interval: Any) -> dict[str, Any] | None:
    return None if interval is None else interval.as_dict()


def _latency_images(files: Files, questions: VQASet | None, images: CaptionSet | None) -> tuple[Path, ...]:
    """Distinct image files in a fixed order."""
    if images is not None:
        paths = [i.image for i in images.images]
    elif questions is not None:
        paths = [q.image for q in questions.questions]
    elif files.captions is not None:
        paths = [i.image for i in load_captions(files).images]
    elif files.questions is None:
        raise DataError(
            "requests need pictures: give --data, a folder with captions or questions, or time checkpoints with "
            "--compare, which makes pictures up"
        )
    else:
        paths = [q.image for q in load_vqa(files).questions]
    return tuple(dict.fromkeys(paths))


def _samples(items: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Thumbnails of a few images, the same for every model, so that a report needs no other file."""
    files = {str(item["image_id"]): item["image"] for item in items if "image" in item and item["error"] is None}
    return {image_id: thumbnail(Path(files[image_id])) for image_id in by_hash(files)[:CARRIED]}
