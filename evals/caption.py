"""BLEU-1..4, METEOR, ROUGE-L and CIDEr-D of captions, through pycocoevalcap's scorers called one by one.

`COCOEvalCap.evaluate()` is not used: it builds every scorer, SPICE's download included, before it scores anything.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmm_serve.errors import ConfigError, DataError, EngineError, NMMError, unknown_name
from nmm_serve.evals import spice, stats
from nmm_serve.evals.annotations import Id, References
from nmm_serve.evals.cider import CiderResampler
from nmm_serve.evals.meteor import Meteor
from nmm_serve.evals.stats import Interval
from nmm_serve.evals.tokenizer import FallbackTokenizer, PTBTokenizer, Tokenizer, open_tokenizer

BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
METRICS = (*BLEU, "METEOR", "ROUGE_L", "CIDEr")
"""Those that are always asked for. SPICE joins them where its models are on disk."""

DEFINITIONS = {
    "Bleu_1": "corpus BLEU with n-grams up to 1, brevity penalty by the closest reference; 0 to 1",
    "Bleu_2": "corpus BLEU with n-grams up to 2, brevity penalty by the closest reference; 0 to 1",
    "Bleu_3": "corpus BLEU with n-grams up to 3, brevity penalty by the closest reference; 0 to 1",
    "Bleu_4": "corpus BLEU with n-grams up to 4, brevity penalty by the closest reference; 0 to 1",
    "METEOR": "METEOR 1.5, English, corpus score; 0 to 1",
    "ROUGE_L": "mean over images of ROUGE-L (beta 1.2, best precision and best recall over references); 0 to 1",
    "CIDEr": (
        "CIDEr-D, document frequencies from the evaluated references (depends on the set); 0 to 10; its interval is "
        "moved by the bootstrap's own bias, since an image drawn twice makes its n-grams less rare"
    ),
    "SPICE": "mean over images of SPICE's F-score of scene graph tuples; 0 to 1",
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
    tokens: tuple[tuple[str, tuple[str, ...]], ...]
    """Of each image the caption and its references as they were compared: tokens, separated by spaces."""
    no_java: str | None
    """Why Java's tokenizer was not used."""
    outside_fallback: int | None
    """With the fallback tokenizer: captions outside the range on which it is proven equal to PTBTokenizer."""

    def items(self) -> list[dict[str, Any]]:
        """The scores of each image."""
        return [
            {"image_id": image_id, **{name: values[index] for name, values in self.per_image.items()}}
            for index, image_id in enumerate(self.image_ids)
        ]


def default_metrics() -> tuple[str, ...]:
    return METRICS if spice.missing() else (*METRICS, "SPICE")


def chosen_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The metrics that a user named, in whatever case, in their usual order.

    Raises ConfigError for an unknown one, EngineError for SPICE without its models.
    """
    by_low = {name.lower(): name for name in (*METRICS, "SPICE")}
    for name in names:
        if name.strip().lower() not in by_low:
            raise ConfigError(unknown_name("caption metric", name.strip(), by_low.values()))
    chosen = {by_low[name.strip().lower()] for name in names}
    if "SPICE" in chosen and (reason := spice.missing()):
        raise EngineError(reason)
    return tuple(name for name in by_low.values() if name in chosen)


def remarks(scored: CaptionScore) -> list[str]:
    """What a reader of these scores must know."""
    lines = [f"{name} could not be had: {reason}" for name, reason in scored.reasons.items()]
    if scored.no_java is not None:
        total = sum(1 + len(references) for _, references in scored.tokens)
        lines.append(
            f"tokens come from the {scored.tokenizer} ({scored.no_java}); {scored.outside_fallback} of {total} texts "
            "lie outside the range on which the two are proven equal"
        )
    if set(scored.overall) == set(METRICS) and (reason := spice.missing()):
        lines.append(reason)
    return lines


def score(
    images: Sequence[References],
    predictions: Mapping[Id, str],
    *,
    metrics: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    resamples: int = stats.RESAMPLES,
) -> CaptionScore:
    """Score one caption for every image. `tokenizer=None` takes PTBTokenizer where Java runs, else the fallback.

    `metrics` default to `default_metrics()`; with `resamples=0` there are no intervals.

    Raises DataError when a prediction is missing or belongs to no image, EngineError when Java's tokenizer fails,
    NMMError without pycocoevalcap.
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
    metrics = default_metrics() if metrics is None else metrics
    tokenizer = tokenizer or open_tokenizer()
    # One list order throughout: pycocoevalcap's scorers compare keys as sets but answer in dict order. Captions and
    # references are tokenised apart, as it does: the tokenizer looks across line ends ("no." before "2 dogs").
    raw_hypotheses = [predictions[image.image_id] for image in images]
    raw_references = [reference for image in images for reference in image.references]
    hypotheses, rest = tokenizer.tokenize(raw_hypotheses), iter(tokenizer.tokenize(raw_references))
    references = [tuple(next(rest) for _ in image.references) for image in images]

    found = _Found(metrics, hypotheses, references)
    found.add(tokenizer)
    outside = None
    if isinstance(tokenizer, FallbackTokenizer):
        outside = sum(not tokenizer.covers(caption) for caption in raw_hypotheses + raw_references)
    return CaptionScore(
        image_ids=tuple(image.image_id for image in images),
        overall={name: found.overall[name] for name in metrics},
        reasons=found.reasons,
        per_image={name: found.per_image[name] for name in metrics if name in found.per_image},
        intervals=found.intervals(seed, resamples),
        tokenizer=tokenizer.name,
        tokens=tuple(zip(hypotheses, references, strict=True)),
        no_java=tokenizer.reason if isinstance(tokenizer, FallbackTokenizer) else None,
        outside_fallback=outside,
    )


class _Found:
    """The scores as they come, on tokenised captions."""

    def __init__(self, metrics: Sequence[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        self._metrics = metrics
        self._hypotheses, self._references = hypotheses, references
        self.overall: dict[str, float | None] = {}
        self.reasons: dict[str, str] = {}
        self.per_image: dict[str, list[float]] = {}

    def add(self, tokenizer: Tokenizer) -> None:
        """Everything asked for. Java loads METEOR's tables while the metrics in Python are computed."""
        java_path = tokenizer.java_path if isinstance(tokenizer, PTBTokenizer) else None
        for name in ("METEOR", "SPICE"):
            if name in self._metrics and java_path is None:
                self._refuse(name, tokenizer.reason if isinstance(tokenizer, FallbackTokenizer) else "it needs Java")
        with contextlib.ExitStack() as stack:
            running = None
            if "METEOR" in self._metrics and java_path is not None:
                try:
                    running = stack.enter_context(Meteor(java_path, self._hypotheses, self._references))
                except EngineError as error:
                    self._refuse("METEOR", str(error))
            self._add_python_metrics()
            if running is not None:
                try:
                    self._keep("METEOR", *running.scores())
                except EngineError as error:
                    self._refuse("METEOR", str(error))
        if "SPICE" in self._metrics and java_path is not None:
            try:
                self._keep("SPICE", *spice.spice(java_path, self._hypotheses, self._references))
            except EngineError as error:
                self._refuse("SPICE", str(error))

    def _add_python_metrics(self) -> None:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        gts = {i: list(refs) for i, refs in enumerate(self._references)}
        res = {i: [hypothesis] for i, hypothesis in enumerate(self._hypotheses)}
        with contextlib.redirect_stdout(io.StringIO()):  # they print
            if set(BLEU) & set(self._metrics):
                totals, lists = Bleu(4).compute_score(gts, res, verbose=0)
                for name, total, values in zip(BLEU, totals, lists, strict=True):
                    self._keep(name, total, values)
            for name, scorer in (("ROUGE_L", Rouge), ("CIDEr", Cider)):
                if name in self._metrics:
                    self._keep(name, *scorer().compute_score(gts, res))

    def _refuse(self, name: str, reason: str) -> None:
        self.overall[name], self.reasons[name] = None, reason

    def _keep(self, name: str, total: float, values: Sequence[float]) -> None:
        self.overall[name], self.per_image[name] = float(total), [float(value) for value in values]

    def intervals(self, seed: int, resamples: int) -> dict[str, Interval | None]:
        """BLEU and CIDEr are recomputed for every resample of the images; ROUGE-L and SPICE are means.

        METEOR has none: its corpus score comes out of Java and is not a mean of the per-image scores.
        """
        num_images = len(self._hypotheses)
        found: dict[str, Interval | None] = dict.fromkeys(self._metrics)
        if num_images < 2 or not resamples:
            return found
        if set(BLEU) & set(self._metrics):
            bleu_R4 = stats.bootstrap(bleu_statistic(self._hypotheses, self._references), num_images, resamples, seed)
            for order, name in enumerate(BLEU):
                if name in self._metrics:
                    found[name] = stats.percentile_interval(bleu_R4[:, order], num_images, "image")
        for name in ("ROUGE_L", "SPICE"):
            if name in self.per_image:
                found[name] = stats.mean_interval(
                    self.per_image[name], range(num_images), seed=seed, resamples=resamples
                )
        if "CIDEr" in self._metrics:
            cider = CiderResampler(self._hypotheses, self._references)
            cider_R = stats.bootstrap(cider.scores, num_images, resamples, seed)
            centred_R = stats.centred(cider_R, float(cider.scores(np.ones((1, num_images), dtype=np.int64))[0]))
            found["CIDEr"] = stats.percentile_interval(centred_R, num_images, "image")
        return found


def bleu_statistic(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Callable[[stats.Array], Any]:
    """Corpus BLEU-1..4 of resamples from per-image counts: correct and possible n-grams, lengths.

    The statistic maps counts_RI to values_R4, for `stats.bootstrap`.
    """
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
