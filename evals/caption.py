"""BLEU-1..4, METEOR, ROUGE-L and CIDEr-D of captions, through pycocoevalcap's scorers called one by one.

`COCOEvalCap.evaluate()` is not used: it builds every scorer, SPICE's download included, before it scores anything.
"""

import contextlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmm_serve.errors import DataError, EngineError, NMMError
from nmm_serve.evals import stats
from nmm_serve.evals.cider import CiderResampler
from nmm_serve.evals.datasets import CaptionedImage, Id
from nmm_serve.evals.meteor import meteor
from nmm_serve.evals.stats import Interval
from nmm_serve.evals.tokenizer import JAVA_HINT, FallbackTokenizer, PTBTokenizer, Tokenizer, find_java, open_tokenizer

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
_BLEU = METRICS[:4]

DEFINITIONS = {
    "Bleu_1": "corpus BLEU with n-grams up to 1, brevity penalty by the closest reference; 0 to 1",
    "Bleu_2": "corpus BLEU with n-grams up to 2, brevity penalty by the closest reference; 0 to 1",
    "Bleu_3": "corpus BLEU with n-grams up to 3, brevity penalty by the closest reference; 0 to 1",
    "Bleu_4": "corpus BLEU with n-grams up to 4, brevity penalty by the closest reference; 0 to 1",
    "METEOR": "METEOR 1.5, English, corpus score; 0 to 1",
    "ROUGE_L": "mean over images of ROUGE-L (beta 1.2, best precision and best recall over references); 0 to 1",
    "CIDEr": "CIDEr-D, document frequencies from the evaluated references (depends on the set); 0 to 10",
}


@dataclass(frozen=True)
class CaptionScore:
    """Scores on pycocoevalcap's scale. A metric that could not be had is None in `overall` with its `reasons` entry."""

    image_ids: tuple[Id, ...]
    overall: dict[str, float | None]
    reasons: dict[str, str]
    per_image: dict[str, list[float]]
    intervals: dict[str, Interval | None]
    tokenizer: str
    outside_fallback: int | None
    """With the fallback tokenizer: captions outside the range on which it is proven equal to PTBTokenizer."""


def score(
    images: Sequence[CaptionedImage],
    predictions: Mapping[Id, str],
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    resamples: int = stats.RESAMPLES,
) -> CaptionScore:
    """Score one caption for every image. `tokenizer=None` takes PTBTokenizer where Java runs, else the fallback.

    Raises DataError when a prediction is missing or belongs to no image, NMMError without pycocoevalcap.
    """
    missing = [image.image_id for image in images if image.image_id not in predictions]
    extra = set(predictions) - {image.image_id for image in images}
    if missing or extra:
        what = f"image_id {missing[0]!r} has no caption" if missing else f"{min(map(str, extra))} is no image"
        raise DataError(
            f"{len(predictions)} captions do not match {len(images)} images: {what}; give one caption for each image"
        )
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise NMMError("caption scores need pycocoevalcap; pip install 'nmm-serve[evals]'")
    tokenizer = tokenizer or open_tokenizer()
    # One list order throughout: pycocoevalcap's scorers compare keys as sets but answer in dict order.
    raw_hypotheses = [predictions[image.image_id] for image in images]
    raw_references = [reference for image in images for reference in image.references]
    tokens = tokenizer.tokenize(raw_hypotheses + raw_references)
    hypotheses, rest = tokens[: len(images)], iter(tokens[len(images) :])
    references = [[next(rest) for _ in image.references] for image in images]

    overall: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    per_image: dict[str, list[float]] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # the scorers print
        _score_bleu(hypotheses, references, overall, per_image)
        _score_mean("ROUGE_L", hypotheses, references, overall, per_image)
        _score_mean("CIDEr", hypotheses, references, overall, per_image)
        if not isinstance(tokenizer, PTBTokenizer) or find_java() is None:
            overall["METEOR"], reasons["METEOR"] = None, f"no Java on this machine; {JAVA_HINT}"
        else:
            try:
                overall["METEOR"], per_image["METEOR"] = meteor(hypotheses, references)
            except EngineError as error:
                overall["METEOR"], reasons["METEOR"] = None, str(error)
    outside = None
    if isinstance(tokenizer, FallbackTokenizer):
        outside = sum(not tokenizer.covers(caption) for caption in raw_hypotheses + raw_references)
    return CaptionScore(
        image_ids=tuple(image.image_id for image in images),
        overall={name: overall[name] for name in METRICS},
        reasons=reasons,
        per_image=per_image,
        intervals=_intervals(hypotheses, references, per_image["ROUGE_L"], seed, resamples),
        tokenizer=tokenizer.name,
        outside_fallback=outside,
    )


def _as_dicts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[int, Any], dict[int, Any]]:
    return {i: list(refs) for i, refs in enumerate(references)}, {i: [h] for i, h in enumerate(hypotheses)}


def _score_bleu(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    overall: dict[str, float | None],
    per_image: dict[str, list[float]],
) -> None:
    from pycocoevalcap.bleu.bleu import Bleu

    totals, lists = Bleu(4).compute_score(*_as_dicts(hypotheses, references), verbose=0)
    for name, total, values in zip(_BLEU, totals, lists, strict=True):
        overall[name], per_image[name] = float(total), [float(v) for v in values]


def _score_mean(
    name: str,
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    overall: dict[str, float | None],
    per_image: dict[str, list[float]],
) -> None:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = {"ROUGE_L": Rouge, "CIDEr": Cider}[name]()
    total, values = scorer.compute_score(*_as_dicts(hypotheses, references))
    overall[name], per_image[name] = float(total), [float(v) for v in values]


def _intervals(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], rouge: Sequence[float], seed: int, resamples: int
) -> dict[str, Interval | None]:
    """BLEU and CIDEr are recomputed for every resample of the images; ROUGE-L is a mean.

    METEOR has none: its corpus score comes out of Java and is not a mean of the per-image scores.
    """
    num_images = len(hypotheses)
    found: dict[str, Interval | None] = dict.fromkeys(METRICS)
    if num_images < 2:
        return found
    bleu_R4 = stats.bootstrap(_bleu_statistic(hypotheses, references), num_images, resamples, seed)
    for order, name in enumerate(_BLEU):
        found[name] = stats.percentile_interval(bleu_R4[:, order], num_images, "image")
    found["ROUGE_L"] = stats.mean_interval(rouge, range(num_images), seed=seed, resamples=resamples)
    cider_R = stats.bootstrap(CiderResampler(hypotheses, references).scores, num_images, resamples, seed)
    found["CIDEr"] = stats.percentile_interval(cider_R, num_images, "image")
    return found


def _bleu_statistic(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Any:
    """Corpus BLEU-1..4 of resamples from per-image counts: correct and possible n-grams, lengths."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, list(refs))
    rows = [
        [*c["correct"], *c["guess"], c["testlen"], min((abs(r - c["testlen"]), r) for r in c["reflen"])[1]]
        for c in scorer.ctest
    ]
    counts_I10 = np.array(rows, dtype=float)
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's

    def statistic(counts_RI: stats.Array) -> stats.Array:
        totals = counts_RI @ counts_I10
        precision_R4 = np.cumprod((totals[:, :4] + tiny) / (totals[:, 4:8] + small), axis=1)
        bleu_R4 = precision_R4 ** (1 / np.arange(1, 5))
        ratio_R = (totals[:, 8] + tiny) / (totals[:, 9] + small)
        with np.errstate(over="ignore"):
            penalty_R = np.where(ratio_R < 1, np.exp(1 - 1 / ratio_R), 1.0)
        return bleu_R4 * penalty_R[:, None]

    return statistic
