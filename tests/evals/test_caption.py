"""Caption scores: equal to pycocoevalcap's own, whatever the order, and alive when Java is not."""

import random

import numpy as np
import pytest
from eval_fakes import put_java

pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")

from nmm_serve.errors import DataError, EngineError
from nmm_serve.evals import caption, meteor, stats
from nmm_serve.evals.annotations import References
from nmm_serve.evals.cider import CiderResampler
from nmm_serve.evals.meteor import Meteor
from nmm_serve.evals.tokenizer import FallbackTokenizer

WORD_LIST = "a the dog cat man woman red blue on under near grass table sits runs two three big small and with"
VOCABULARY = WORD_LIST.split()


def make(images: int, seed: int = 0) -> tuple[list[References], dict[int, str]]:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choice(VOCABULARY) for _ in range(rng.randint(3, 10))).capitalize() + "."

    listed = [
        References(image_id=i, references=tuple(sentence() for _ in range(rng.randint(1, 6)))) for i in range(images)
    ]
    predictions = {
        image.image_id: rng.choice(
            [rng.choice(image.references), sentence(), image.references[0].replace(".", " today.")]
        )
        for image in listed
    }
    return listed, predictions


def tokens_of(images, predictions):
    fallback = FallbackTokenizer()
    hypotheses = fallback.tokenize([predictions[i.image_id] for i in images])
    return hypotheses, [fallback.tokenize(i.references) for i in images]


def test_cider_resampler_equals_pycocoevalcap():
    from pycocoevalcap.cider.cider import Cider

    hypotheses, references = tokens_of(*make(60))
    hypotheses[3] = ""
    resampler = CiderResampler(hypotheses, references)
    draws = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=5)
    for counts in [np.ones(60, dtype=int), *draws]:
        drawn = [i for i, count in enumerate(counts) for _ in range(count)]
        expected, _ = Cider().compute_score(
            {k: references[i] for k, i in enumerate(drawn)}, {k: [hypotheses[i]] for k, i in enumerate(drawn)}
        )
        (found,) = resampler.scores(counts[None])
        assert found == pytest.approx(expected, abs=1e-9)


def test_interval_of_cider_holds_the_mean_over_sets():
    """Images of rare words, each drawn twice in some resamples: plain percentiles lie too low."""
    rng = np.random.default_rng(0)

    def caption_of(words):
        return " ".join(f"w{w}" for w in np.where(rng.random(8) < 0.6, words, rng.integers(2000, size=8)))

    scores, plain, ours = [], [], []
    for _ in range(60):
        topics = rng.integers(2000, size=(20, 8))
        resampler = CiderResampler(
            *zip(*[(caption_of(t), [caption_of(t) for _ in range(3)]) for t in topics], strict=True)
        )
        scores.append(resampler.scores(np.ones((1, 20), int))[0])
        drawn = stats.bootstrap(resampler.scores, 20, 100)
        for found, values in ((plain, drawn), (ours, stats.centred(drawn, scores[-1]))):
            interval = stats.percentile_interval(values, 20, "image")
            assert interval is not None
            found.append(interval)
    held_plain, held_ours = (sum(i.low <= np.mean(scores) <= i.high for i in found) for found in (plain, ours))
    assert held_plain < 48 <= held_ours, "of 60 that should hold it in 57"


def test_the_interval_of_cider_is_centred():
    images, predictions = make(20)
    scored = caption.score(images, predictions, tokenizer=FallbackTokenizer(), resamples=200)
    resampler = CiderResampler(*tokens_of(images, predictions))
    drawn = stats.centred(stats.bootstrap(resampler.scores, 20, 200), resampler.scores(np.ones((1, 20), int))[0])
    interval = scored.intervals["CIDEr"]
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))


def test_captions_that_match_nothing_score_zero():
    images, predictions = make(4)
    scored = caption.score(images, dict.fromkeys(predictions, "zebra"), tokenizer=FallbackTokenizer(), resamples=10)
    assert scored.overall["CIDEr"] == 0
    interval = scored.intervals["CIDEr"]
    assert interval is not None
    assert (interval.low, interval.high) == (0, 0)


def test_bleu_of_resamples_equals_pycocoevalcap():
    from pycocoevalcap.bleu.bleu import Bleu

    hypotheses, references = tokens_of(*make(40))
    statistic = caption.bleu_statistic(hypotheses, references)
    for counts in [np.ones(40, dtype=int), *np.random.default_rng(0).multinomial(40, np.full(40, 1 / 40), size=5)]:
        drawn = [i for i, count in enumerate(counts) for _ in range(count)]
        expected, _ = Bleu(4).compute_score(
            {k: references[i] for k, i in enumerate(drawn)},
            {k: [hypotheses[i]] for k, i in enumerate(drawn)},
            verbose=0,
        )
        assert statistic(counts[None])[0] == pytest.approx(expected, abs=1e-9)


def test_order_of_the_images_does_not_matter():
    images, predictions = make(30)
    straight = caption.score(images, predictions, tokenizer=FallbackTokenizer(), resamples=10)
    turned = caption.score(
        images[::-1], dict(reversed(predictions.items())), tokenizer=FallbackTokenizer(), resamples=10
    )
    for metric in ("Bleu_4", "ROUGE_L", "CIDEr"):
        assert turned.overall[metric] == pytest.approx(straight.overall[metric], abs=1e-12)
        by_id = dict(zip(turned.image_ids, turned.per_image[metric], strict=True))
        assert [by_id[i] for i in straight.image_ids] == pytest.approx(straight.per_image[metric], abs=1e-12)


def test_intervals_hold_the_scores():
    images, predictions = make(80)
    scored = caption.score(images, predictions, tokenizer=FallbackTokenizer(), resamples=300)
    for metric in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"):
        interval, value = scored.intervals[metric], scored.overall[metric]
        assert interval is not None
        assert value is not None
        assert interval.low < value < interval.high
        assert interval.clusters == 80


def test_without_java_meteor_is_null_with_a_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    images, predictions = make(5)
    scored = caption.score(images, predictions, resamples=10)
    assert scored.overall["METEOR"] is None
    assert "apt install" in scored.reasons["METEOR"]
    assert "fallback" in scored.tokenizer
    texts = [*predictions.values(), *(r for i in images for r in i.references)]
    assert scored.outside_fallback == sum(not FallbackTokenizer().covers(text) for text in texts)
    assert scored.overall["CIDEr"] is not None
    assert capsys.readouterr().out == ""


def test_predictions_must_match_the_images():
    images, predictions = make(3)
    with pytest.raises(DataError, match="image_id 0 has no caption"):
        caption.score(images, {k: v for k, v in predictions.items() if k})
    with pytest.raises(DataError, match="99 is no image"):
        caption.score(images, predictions | {99: "x"})


def test_one_image_has_no_interval():
    images, predictions = make(1)
    scored = caption.score(images, predictions, tokenizer=FallbackTokenizer())
    assert set(scored.intervals.values()) == {None}


@pytest.mark.java
def test_equals_pycocoevalcap_with_java(capsys):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    images, predictions = make(25)
    predictions[3] = ""
    predictions[4] = "A dog's bone (isn't) 3.5 — big!! red"
    scored = caption.score(images, predictions, resamples=10)
    assert capsys.readouterr().out == ""
    theirs = PTBTokenizer()
    gts = theirs.tokenize({i.image_id: [{"caption": r} for r in i.references] for i in images})
    res = theirs.tokenize({i.image_id: [{"caption": predictions[i.image_id]}] for i in images})
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    expected = dict(zip(["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4"], bleu, strict=True))
    for name, scorer in (("METEOR", Meteor()), ("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        expected[name], per_image = scorer.compute_score(gts, res)
        assert scored.per_image[name] == pytest.approx(list(per_image), abs=1e-9)
    assert scored.overall == pytest.approx(expected, abs=1e-9)
    assert scored.outside_fallback is None


@pytest.mark.java
def test_line_separators_do_not_shift_later_captions():
    images = [
        References(image_id=i, references=(text,)) for i, text in enumerate(["a dog on grass", "a cat", "a bird sings"])
    ]
    predictions = {0: "a dog\ron grass", 1: "a\u2028cat", 2: "a bird\x0bsings"}
    scored = caption.score(images, predictions, metrics=["ROUGE_L"], resamples=10)
    assert scored.per_image["ROUGE_L"] == pytest.approx([1, 1, 1])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no memory >&2; exit 3", "METEOR's Java ended with exit status 3: no memory"),
        ("echo nonsense; read line; sleep 600", "METEOR's Java said nothing"),
        ("sleep 600", "METEOR's Java said nothing"),  # a child of the script holds the pipes
        ("exec >&-; sleep 600", "METEOR's Java closed its output"),
        ("while read line; do echo nonsense; echo nonsense; done", "answered 'nonsense' where a score was expected"),
    ],
)
def test_meteor_survives_a_java_that_dies_hangs_or_raves(tmp_path, monkeypatch, script, message):
    """pycocoevalcap would hang for ever here, at the latest in its destructor."""
    if "sleep" in script:
        monkeypatch.setattr(meteor, "_SILENCE_S", 0.5)
    monkeypatch.setattr(meteor, "_ENDING_S", 0.5)
    java = put_java(tmp_path, monkeypatch, script)
    with pytest.raises(EngineError, match=message), Meteor(java, ["a dog"], [["a dog"]]) as running:
        running.scores()


def test_resampling_is_seeded():
    images, predictions = make(20)
    one = caption.score(images, predictions, tokenizer=FallbackTokenizer(), seed=1, resamples=50)
    two = caption.score(images, predictions, tokenizer=FallbackTokenizer(), seed=1, resamples=50)
    other = caption.score(images, predictions, tokenizer=FallbackTokenizer(), seed=2, resamples=50)
    assert one.intervals == two.intervals
    assert one.intervals != other.intervals
    assert stats.RESAMPLES >= 1000
