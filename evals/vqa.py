"""The official VQA v2 accuracy, quirks included.

Rules and tables follow `vqaEval.py` of GT-Vision-Lab/VQA at a013f00 (March 2021, BSD-2-Clause), which scores VQA v2.
They are kept to the letter (as Python 3 runs them) where they look wrong, because every published number carries them:

- Answers and prediction are normalised only if the answers are not all equal; a unanimous question compares raw text.
- The period rule was meant to spare decimals on both sides but drops every period that no digit follows, and only the
  first 32 of them (a regex flag is passed as a count).
- Contractions with capitals never match (the text is lower-case by then); `somebody'd` is mapped the wrong way round.
- The score is not min(n/3, 1) but its mean over leaving out one annotator at a time: 0, .3, .6, .9, 1.

One thing differs: "the other nine" are told apart by position. The official code compares whole dictionaries, so
annotations without distinct `answer_id` lose all equal answers at once.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nmm_serve.errors import DataError
from nmm_serve.evals.annotations import AnsweredQuestion, Id
from nmm_serve.evals.stats import Interval, mean_interval

DEFINITIONS = {
    "accuracy": (
        "official VQA v2 accuracy in percent: for each of the 10 annotators min(1, matches among the other 9 / 3), "
        "averaged; texts normalised by the official rules unless all 10 answers are equal; rounded to 2 decimals"
    ),
    "exact_match": (
        "percent of questions whose prediction, stripped, equals the most frequent answer to the letter "
        "(first in file order on a tie); not the official accuracy"
    ),
    "relaxed_accuracy": (
        "percent of questions whose prediction is within 5 % of the most frequent answer where both are numbers "
        "(`12%` is 0.12), and else equals it but for capitals: ChartQA's relaxed accuracy; not the official accuracy"
    ),
    "best_constant": (
        "accuracy of always giving, for each question type, the one answer that scores best on this very set: "
        "what can be had without image and question"
    ),
    "question_only": (
        "accuracy of giving, for each question text, the answer that scores best on that text in four fifths of the "
        "images, on the remaining fifth, in turn (a text that is new there: the best constant of its question type): "
        "what reading the questions without looking at the images is worth"
    ),
}

_PUNCTUATION = tuple(""";/[]"{}()=+\\_-><@`,?!""")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
# Pairs "as written > as meant".
_CONTRACTION_PAIRS = """
aint>ain't arent>aren't cant>can't couldve>could've couldnt>couldn't couldn'tve>couldn't've couldnt've>couldn't've
didnt>didn't doesnt>doesn't dont>don't hadnt>hadn't hadnt've>hadn't've hadn'tve>hadn't've hasnt>hasn't
havent>haven't hed>he'd hed've>he'd've he'dve>he'd've hes>he's howd>how'd howll>how'll hows>how's Id've>I'd've
I'dve>I'd've Im>I'm Ive>I've isnt>isn't itd>it'd itd've>it'd've it'dve>it'd've itll>it'll let's>let's maam>ma'am
mightnt>mightn't mightnt've>mightn't've mightn'tve>mightn't've mightve>might've mustnt>mustn't mustve>must've
neednt>needn't notve>not've oclock>o'clock oughtnt>oughtn't ow's'at>'ow's'at 'ows'at>'ow's'at 'ow'sat>'ow's'at
shant>shan't shed've>she'd've she'dve>she'd've she's>she's shouldve>should've shouldnt>shouldn't
shouldnt've>shouldn't've shouldn'tve>shouldn't've somebody'd>somebodyd somebodyd've>somebody'd've
somebody'dve>somebody'd've somebodyll>somebody'll somebodys>somebody's someoned>someone'd someoned've>someone'd've
someone'dve>someone'd've someonell>someone'll someones>someone's somethingd>something'd somethingd've>something'd've
something'dve>something'd've somethingll>something'll thats>that's thered>there'd thered've>there'd've
there'dve>there'd've therere>there're theres>there's theyd>they'd theyd've>they'd've they'dve>they'd've
theyll>they'll theyre>they're theyve>they've twas>'twas wasnt>wasn't wed've>we'd've we'dve>we'd've weve>we've
werent>weren't whatll>what'll whatre>what're whats>what's whatve>what've whens>when's whered>where'd wheres>where's
whereve>where've whod>who'd whod've>who'd've who'dve>who'd've wholl>who'll whos>who's whove>who've whyll>why'll
whyre>why're whys>why's wont>won't wouldve>would've wouldnt>wouldn't wouldnt've>wouldn't've wouldn'tve>wouldn't've
yall>y'all yall'll>y'all'll y'allll>y'all'll yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've
youd>you'd youd've>you'd've you'dve>you'd've youll>you'll youre>you're youve>you've
"""
_CONTRACTIONS = dict(pair.split(">") for pair in _CONTRACTION_PAIRS.split())


def strip(text: str) -> str:
    """Line breaks and tabs become spaces, then the ends are stripped. Always done, on answers and prediction."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=200_000)
def normalise(text: str) -> str:
    """The official normalisation of a stripped text: marks, periods, case, number words, articles, contractions."""
    digit_comma_digit = _DIGIT_COMMA_DIGIT.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        delete = digit_comma_digit or mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if delete else " ")
    out = _PERIOD.sub("", out, count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answers: Sequence[str], prediction: str) -> float:
    """Official accuracy of one prediction, 0 to 1."""
    compared, form = _comparison(answers)
    predicted = form(strip(prediction))
    hits = [answer == predicted for answer in compared]
    total = sum(hits)
    shares = [min(1, float(total - hit) / 3) for hit in hits]
    return float(sum(shares)) / len(shares)


def exact_match(answers: Sequence[str], prediction: str) -> bool:
    """Does the stripped prediction equal the most frequent answer to the letter?"""
    return strip(prediction) == _most_frequent(answers)


RELAXED_TOLERANCE = 0.05


def relaxed_match(answers: Sequence[str], prediction: str) -> bool:
    """Does the prediction come within 5 % of the most frequent answer, or equal it where they are no numbers?

    After ChartQA (Masry et al. 2022), in the variant of Pix2Struct's code: the tolerance is relative to the answer, a
    percent sign divides by 100, and an answer of 0 is compared as text.
    """
    wanted, given = _most_frequent(answers), strip(prediction)
    wanted_number, given_number = _number(wanted), _number(given)
    if wanted_number and given_number is not None:
        return abs(given_number - wanted_number) / abs(wanted_number) <= RELAXED_TOLERANCE
    return given.lower() == wanted.lower()


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _most_frequent(answers: Sequence[str]) -> str:
    """After stripping; the first in file order on a tie."""
    return Counter(map(strip, answers)).most_common(1)[0][0]


def _comparison(answers: Sequence[str]) -> tuple[list[str], Callable[[str], str]]:
    """The answers in the form in which they are compared, and the function that brings a prediction into it."""
    stripped = [strip(answer) for answer in answers]
    if len(set(stripped)) > 1:
        return [normalise(answer) for answer in stripped], normalise
    return stripped, lambda text: text


@dataclass(frozen=True)
class VQAScore:
    """Per-question accuracies (0 to 1) in the order of `questions`, and what is drawn from them."""

    questions: tuple[AnsweredQuestion, ...]
    accuracies: tuple[float, ...]
    exact: tuple[bool, ...]
    relaxed: tuple[bool, ...]

    def official(self) -> dict[str, Any]:
        """The official evaluator's percents, rounded as it rounds."""
        return {
            "overall": percent(self.accuracies),
            "per_question_type": self.by(lambda q: q.question_type),
            "per_answer_type": self.by(lambda q: q.answer_type),
        }

    def items(self) -> list[dict[str, Any]]:
        """The official percent of each question, and whether the other two count it as right."""
        return [
            {
                "question_id": question.question_id,
                "score": percent([accuracy]),
                "exact_match": exact,
                "relaxed_match": relaxed,
            }
            for question, accuracy, exact, relaxed in zip(
                self.questions, self.accuracies, self.exact, self.relaxed, strict=True
            )
        ]

    def by(self, key: Callable[[AnsweredQuestion], str]) -> dict[str, float]:
        """Percent per group, groups in order of first appearance."""
        groups: dict[str, list[float]] = {}
        for question, value in zip(self.questions, self.accuracies, strict=True):
            groups.setdefault(key(question), []).append(value)
        return {name: percent(values) for name, values in groups.items()}

    @property
    def exact_match(self) -> float:
        return percent([float(hit) for hit in self.exact])

    @property
    def relaxed_accuracy(self) -> float:
        return percent([float(hit) for hit in self.relaxed])

    def interval(self, key: Callable[[AnsweredQuestion], bool] = lambda _: True, seed: int = 0) -> Interval | None:
        """Interval of the accuracy in percent over the questions that `key` picks, drawing whole images."""
        picked = [(100 * a, q.image_id) for q, a in zip(self.questions, self.accuracies, strict=True) if key(q)]
        return mean_interval([value for value, _ in picked], [image for _, image in picked], seed=seed)


def score(questions: Sequence[AnsweredQuestion], predictions: Mapping[Id, str]) -> VQAScore:
    """Score one prediction for every question. Raises DataError when one is missing or belongs to no question."""
    missing = [q.question_id for q in questions if q.question_id not in predictions]
    extra = set(predictions) - {q.question_id for q in questions}
    if missing or extra:
        what = f"question_id {missing[0]!r} has no prediction" if missing else f"{min(map(str, extra))} is no question"
        raise DataError(
            f"{len(predictions)} predictions do not match {len(questions)} questions: {what}; give one for each"
        )
    return VQAScore(
        questions=tuple(questions),
        accuracies=tuple(accuracy(q.answers, predictions[q.question_id]) for q in questions),
        exact=tuple(exact_match(q.answers, predictions[q.question_id]) for q in questions),
        relaxed=tuple(relaxed_match(q.answers, predictions[q.question_id]) for q in questions),
    )


def percent(values: Sequence[float]) -> float:
    """Mean of accuracies (0 to 1) as the official code prints it: percent, two decimals."""
    return round(100 * float(sum(values)) / len(values), 2)


def best_constant(
    questions: Sequence[AnsweredQuestion], key: Callable[[AnsweredQuestion], Hashable] = lambda q: q.question_type
) -> dict[Hashable, tuple[str, list[float]]]:
    """For each group of questions the single answer that scores best on it, and its accuracy on each of them.

    Candidates are all answers that occur in the group.
    """
    groups: dict[Hashable, list[AnsweredQuestion]] = {}
    for question in questions:
        groups.setdefault(key(question), []).append(question)
    chosen = {}
    for name, members in groups.items():
        answer = _best_answer(members)
        chosen[name] = (answer, [accuracy(q.answers, answer) for q in members])
    return chosen


def _best_answer(questions: Iterable[AnsweredQuestion]) -> str:
    """One pass: what each raw text earns where a question is unanimous, and each normal form elsewhere."""
    raw: dict[str, float] = defaultdict(float)
    normal: dict[str, float] = defaultdict(float)
    candidates: dict[str, None] = {}
    for question in questions:
        stripped = [strip(answer) for answer in question.answers]
        candidates.update(dict.fromkeys(stripped))
        unanimous = len(set(stripped)) == 1
        forms = {answer if unanimous else normalise(answer): answer for answer in stripped}
        for form, answer in forms.items():
            (raw if unanimous else normal)[form] += accuracy(question.answers, answer)
    return max(candidates, key=lambda c: raw[c] + normal[normalise(c)])


ENOUGH_ANSWERS = 4
"""With fewer, leaving one of them out keeps every prediction below 100 %."""


def few_answers(questions: Sequence[AnsweredQuestion]) -> str | None:
    """What must be known of an accuracy over questions with too few answers; None where all have enough."""
    few = sum(len(q.answers) < ENOUGH_ANSWERS for q in questions)
    if not few:
        return None
    best = percent([max(accuracy(q.answers, answer) for answer in q.answers) for q in questions])
    return (
        f"{few} of {len(questions)} questions have fewer than {ENOUGH_ANSWERS} answers, and the official accuracy "
        f"leaves one out in turn: nothing can score above {best:.2f} % here; go by exact match, or repeat a single "
        "answer ten times in the annotations"
    )


FOLDS = 5


def question_only(questions: Sequence[AnsweredQuestion]) -> list[float]:
    """Accuracy of each question when it is answered by its text alone; see DEFINITIONS.

    Choosing and scoring on the same images would reward rare texts: one that occurs once is always answered right.
    """
    images = {image_id: n % FOLDS for n, image_id in enumerate(dict.fromkeys(q.image_id for q in questions))}
    values = {}
    for fold in range(FOLDS):
        others = [q for q in questions if images[q.image_id] != fold]
        by_text, by_type = best_constant(others, key=lambda q: q.text), best_constant(others)
        for question in questions:
            if images[question.image_id] == fold:
                answer, _ = by_text.get(question.text) or by_type.get(question.question_type) or ("", [])
                values[question.question_id] = accuracy(question.answers, answer)
    return [values[q.question_id] for q in questions]


def baselines(questions: Sequence[AnsweredQuestion]) -> dict[str, Any]:
    """What a result is judged against: the best constant per question type, and what the questions alone give away."""
    constants = best_constant(questions)
    return {
        "best_constant": {
            "overall": percent([value for _, values in constants.values() for value in values]),
            "per_question_type": {
                name: {"answer": answer, "accuracy": percent(values), "n": len(values)}
                for name, (answer, values) in constants.items()
            },
        },
        "question_only": {
            "overall": percent(question_only(questions)),
            "distinct_questions": len({q.text for q in questions}),
        },
    }
