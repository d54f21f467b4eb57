"""Bootstrap intervals: against plain loops, against theory, and their pairing."""

import numpy as np
import pytest

from nmm_serve.evals import stats


def test_draw_counts_adds_up_and_repeats():
    (counts,) = stats.draw_counts(7, 50, seed=3)
    assert counts.shape == (50, 7)
    assert (counts.sum(axis=1) == 7).all()
    (again,) = stats.draw_counts(7, 50, seed=3)
    assert (counts == again).all()
    (other,) = stats.draw_counts(7, 50, seed=4)
    assert (counts != other).any()


def test_chunks_join_to_all_resamples(monkeypatch):
    whole = np.concatenate(list(stats.draw_counts(5, 20, seed=0)))
    monkeypatch.setattr(stats, "_CHUNK_CELLS", 15)
    chunks = list(stats.draw_counts(5, 20, seed=0))
    assert [len(c) for c in chunks] == [3, 3, 3, 3, 3, 3, 2]
    assert (np.concatenate(chunks) == whole).all()


def test_mean_interval_equals_drawing_by_hand():
    values, clusters = [1.0, 0.0, 5.0, 2.0, 2.0], ["a", "a", "b", "c", "c"]
    interval = stats.mean_interval(values, clusters, resamples=200, seed=1)
    rng = np.random.default_rng(1)
    groups = [[1.0, 0.0], [5.0], [2.0, 2.0]]
    means = [np.mean(np.concatenate([groups[i] for i in row])) for row in rng.integers(0, 3, size=(200, 3))]
    low, high = np.quantile(means, [0.025, 0.975])
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((low, high))
    assert interval.clusters == 3


def test_interval_has_the_width_that_theory_says():
    values = np.random.default_rng(0).normal(size=2000)
    interval = stats.mean_interval(values, range(2000))
    assert interval is not None
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.1)


def test_clusters_widen_the_interval():
    """Ten equal answers about one image are one observation, not ten."""
    values = np.repeat(np.random.default_rng(0).integers(0, 2, size=50), 10).astype(float)
    alone = stats.mean_interval(values, range(500))
    clustered = stats.mean_interval(values, np.repeat(np.arange(50), 10).tolist())
    assert alone is not None
    assert clustered is not None
    ratio = (clustered.high - clustered.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.2)


def test_one_cluster_has_no_interval():
    assert stats.mean_interval([1.0, 2.0], ["a", "a"]) is None
    assert stats.paired_difference([1.0], [0.0], ["a"]).interval is None


def test_paired_difference_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, size=300)  # how hard each image is, for both models
    a, b = hard + 1 + rng.normal(0, 0.5, 300), hard
    found = stats.paired_difference(a, b, range(300))
    interval_a, interval_b = stats.mean_interval(a, range(300)), stats.mean_interval(b, range(300))
    assert interval_a is not None
    assert interval_b is not None
    assert interval_a.low < interval_b.high  # overlapping
    assert found.interval is not None
    assert found.interval.low > 0
    assert found.p_value is not None
    assert found.p_value < 0.01


def test_paired_difference_of_equal_models():
    found = stats.paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1, 2, 3])
    assert found.difference == 0
    assert found.p_value == 1


def test_quantile_intervals_hold_the_quantile():
    values = np.random.default_rng(0).exponential(size=400)
    (median,) = stats.quantile_intervals(values, [0.5])
    assert median is not None
    assert median.low < np.median(values) < median.high
    assert stats.quantile_intervals([1.0], [0.5, 0.9]) == [None, None]


@pytest.mark.parametrize("last", [3, 1], ids=["equal clusters", "a smaller one"])
def test_quantile_intervals_draw_whole_clusters(last):
    values = [1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 5.0, 6.0, 7.0][: 6 + last]
    clusters = [0, 0, 0, 1, 1, 1, 2, 2, 2][: 6 + last]
    intervals = stats.quantile_intervals(values, [0.5, 0.9], clusters, resamples=200, seed=1, unit="wave")
    groups = [np.array(values[i : i + 3]) for i in (0, 3, 6)]
    rows = np.random.default_rng(1).integers(0, 3, size=(200, 3))
    for quantile, interval in zip((0.5, 0.9), intervals, strict=True):
        drawn = [np.quantile(np.concatenate([groups[i] for i in row]), quantile) for row in rows]
        assert interval is not None
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
        assert (interval.clusters, interval.unit) == (3, "wave")
    assert stats.quantile_intervals([1.0, 2.0], [0.5], ["a", "a"]) == [None]
