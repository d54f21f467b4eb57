"""nmm-eval score: score result files in the official formats, without a model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Group
from nmm_serve.cli.render import note, print_json, print_table, quiet_stdout

_FILE = click.Path(path_type=Path)


@click.group(cls=Group)
def score() -> None:
    """Score result files in the official formats, without a model."""


@score.command()
@click.option("--questions", type=_FILE, required=True, help="VQA v2 questions JSON.")
@click.option("--annotations", type=_FILE, required=True, help="VQA v2 annotations JSON.")
@click.option("--results", type=_FILE, required=True, help='Answers: [{"question_id": 1, "answer": "yes"}, ...].')
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout.")
def vqa(questions: Path, annotations: Path, results: Path, as_json: bool) -> None:
    """Official VQA v2 accuracy; exact match and relaxed accuracy beside it."""
    from nmm_serve.evals import vqa
    from nmm_serve.evals.annotations import read_answers, read_questions

    asked = read_questions(questions, annotations)
    scored = vqa.score(asked, read_answers(results, asked))
    official = scored.official()
    if (few := vqa.few_answers(asked)) is not None:
        note(few)
    if as_json:
        others = {"exact_match": scored.exact_match, "relaxed_accuracy": scored.relaxed_accuracy}
        items = [{"question_id": item["question_id"], "score": item["score"]} for item in scored.items()]
        print_json({**official, **others, "items": items})
        return
    rows = [_vqa_row("overall", official["overall"], scored.interval(), len(asked))]
    for group, name in (("question_type", "per_question_type"), ("answer_type", "per_answer_type")):
        for kind, value in official[name].items():
            of_kind = _of_kind(group, kind)
            n = sum(map(of_kind, asked))
            rows.append(_vqa_row(f"{group.replace('_', ' ')}: {kind}", value, scored.interval(of_kind), n))
    print_table("Official VQA v2 accuracy", ["questions", "accuracy %", "95 % interval", "n"], rows)
    print_table(
        "Not the official accuracy", ["metric", "%"],
        [["exact match", f"{scored.exact_match:.2f}"], ["relaxed accuracy", f"{scored.relaxed_accuracy:.2f}"]],
    )  # fmt: skip


@score.command()
@click.option("--annotations", type=_FILE, required=True, help="COCO captions JSON.")
@click.option("--results", type=_FILE, required=True, help='Captions: [{"image_id": 1, "caption": "a dog"}, ...].')
@click.option("--metrics", help="Only these, separated by commas: Bleu_1 to Bleu_4, METEOR, ROUGE_L, CIDEr, SPICE.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout.")
def caption(annotations: Path, results: Path, metrics: str | None, as_json: bool) -> None:
    """BLEU, METEOR, ROUGE-L and CIDEr of captions, on pycocoevalcap's scale; SPICE where its models are on disk."""
    from nmm_serve.evals import caption, stats
    from nmm_serve.evals.annotations import read_captions, read_references

    chosen = caption.chosen_metrics(metrics.split(",")) if metrics is not None else None
    images = read_references(annotations)
    predictions = read_captions(results, images)
    with quiet_stdout():
        scored = caption.score(images, predictions, metrics=chosen, resamples=0 if as_json else stats.RESAMPLES)
    for line in caption.remarks(scored):
        note(line)
    if as_json:
        document: dict[str, Any] = {"overall": scored.overall, "items": scored.items()}
        if scored.reasons:
            document["reasons"] = scored.reasons
        print_json(document)
        return
    rows = []
    for name, value in scored.overall.items():
        shown = "–" if value is None else f"{value:.4f}"
        rows.append([name, shown, _brackets(scored.intervals[name], 4)])
    print_table(f"Captions of {len(images)} images", ["metric", "score", "95 % interval"], rows)


def _of_kind(group: str, kind: str) -> Callable[[Any], bool]:
    return lambda question: getattr(question, group) == kind


def _vqa_row(name: str, value: float, interval: Any, n: int) -> Sequence[str]:
    return [name, f"{value:.2f}", _brackets(interval, 2), str(n)]


def _brackets(interval: Any, digits: int) -> str:
    return "" if interval is None else f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"
