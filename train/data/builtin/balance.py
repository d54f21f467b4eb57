"""How far one gets in VQA without looking: the yardstick that a model which sees must clear."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def question_only_ceiling(train: Sequence[Record], test: Sequence[Record]) -> float:
    """Accuracy (0..1) on `test` of the answer that `train` gives most often to the same question string.

    A string that `train` does not have gets the best answer of its question type. Records have the fields
    of VQA v2 questions and annotations together, as `Example.questions`.
    """
    exact = _best(train, lambda r: r["question"])
    by_type = _best(train, lambda r: r["question_type"])
    right = sum(exact.get(r["question"], by_type.get(r["question_type"])) == r["multiple_choice_answer"] for r in test)
    return right / len(test)


def best_constant_by_type(records: Sequence[Record]) -> dict[str, float]:
    """For each question type the accuracy (0..1) of its most frequent answer."""
    best = _best(records, lambda r: r["question_type"])
    totals = Counter(r["question_type"] for r in records)
    hits = Counter(r["question_type"] for r in records if r["multiple_choice_answer"] == best[r["question_type"]])
    return {kind: hits[kind] / totals[kind] for kind in sorted(totals)}


def _best(records: Sequence[Record], key: Callable[[Record], str]) -> dict[str, str]:
    tallies: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        tallies[key(record)][record["multiple_choice_answer"]] += 1
    return {k: tally.most_common(1)[0][0] for k, tally in tallies.items()}
