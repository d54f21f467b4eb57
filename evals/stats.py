"""Intervals and paired comparisons by the bootstrap, with images as clusters.

Questions about one image are not independent, so whole images are drawn with replacement and every question of a drawn
image comes along. Every interval is the percentile interval, of `centred` resamples where the statistic needs it.
Everything is vectorised over resamples: a statistic takes a matrix of counts (how often each cluster was drawn in each
resample) instead of a list of drawn samples.

Shape suffixes: R resamples, C clusters (images), N items, Q quantiles.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

RESAMPLES = 1000
LEVEL = 0.95
_CHUNK_CELLS = 8_000_000
"""Upper bound of the cells of one counts matrix (64 MB of int64)."""


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval. `clusters` is the number of units drawn, `resamples` how often."""

    low: float
    high: float
    level: float
    resamples: int
    clusters: int
    unit: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """Paired difference `a - b` over the same items.

    `p_value` is two-sided: twice the smaller share of resampled differences on one side of zero.
    """

    difference: float
    interval: Interval | None
    p_value: float | None


def draw_counts(num_clusters: int, resamples: int, seed: int) -> Iterator[Array]:
    """Yield counts_RC in chunks: how often each cluster is drawn in each resample. Same seed, same draws.

    The chunk size depends on `num_clusters` alone, so two statistics over the same clusters see the same draws: that is
    what makes a comparison of two models paired.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_CELLS // num_clusters)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn_RC = rng.integers(0, num_clusters, size=(rows, num_clusters))
        offset_R1 = np.arange(rows)[:, None] * num_clusters
        flat = np.bincount((drawn_RC + offset_R1).ravel(), minlength=rows * num_clusters)
        yield flat.reshape(rows, num_clusters)


def bootstrap(
    statistic: Callable[[Array], Array], num_clusters: int, resamples: int = RESAMPLES, seed: int = 0
) -> Array:
    """The statistic of every resample. `statistic` maps counts_RC to values_R (NaN where it is not defined)."""
    return np.concatenate([statistic(counts_RC) for counts_RC in draw_counts(num_clusters, resamples, seed)])


def centred(values_R: Array, value: float) -> Array:
    """Resamples moved so that their mean is `value`, the statistic of the data themselves.

    For a statistic that the drawing itself moves: an image drawn twice makes its own n-grams less rare, so CIDEr of
    resamples is too low, and their plain percentiles miss the truth on that side.
    """
    return values_R + (value - np.nanmean(values_R))


def percentile_interval(values_R: Array, num_clusters: int, unit: str, level: float = LEVEL) -> Interval | None:
    """None with fewer than two clusters: one cluster drawn again and again says nothing about spread."""
    values_R = values_R[~np.isnan(values_R)]
    if num_clusters < 2 or not len(values_R):
        return None
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, len(values_R), num_clusters, unit)


def cluster_index(clusters: Sequence[Hashable]) -> tuple[Array, int]:
    """Number the clusters in order of first appearance. Returns index_N and how many there are."""
    seen: dict[Hashable, int] = {}
    index_N = np.fromiter((seen.setdefault(c, len(seen)) for c in clusters), dtype=np.int64, count=len(clusters))
    return index_N, len(seen)


def _cluster_sums(values_N: Array, index_N: Array, num_clusters: int) -> tuple[Array, Array]:
    sums_C = np.bincount(index_N, weights=values_N, minlength=num_clusters)
    sizes_C = np.bincount(index_N, minlength=num_clusters).astype(float)
    return sums_C, sizes_C


def _mean_of_resamples(counts_RC: Array, sums_C: Array, sizes_C: Array) -> Array:
    with np.errstate(invalid="ignore"):  # a resample that drew no item of this group is NaN and left out
        return (counts_RC @ sums_C) / (counts_RC @ sizes_C)


def mean_statistic(values: Sequence[float] | Array, index_N: Array, num_clusters: int) -> Callable[[Array], Array]:
    """The mean of `values` over a draw of clusters, for `bootstrap`. `index_N` tells each value's cluster."""
    sums_C, sizes_C = _cluster_sums(np.asarray(values, dtype=float), index_N, num_clusters)
    return lambda counts_RC: _mean_of_resamples(counts_RC, sums_C, sizes_C)


def mean_interval(
    values: Sequence[float] | Array,
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    unit: str = "image",
) -> Interval | None:
    """Interval of the mean of `values`, drawing whole clusters."""
    values_N = np.asarray(values, dtype=float)
    assert len(values_N) == len(clusters)
    index_N, num_clusters = cluster_index(clusters)
    if num_clusters < 2:
        return None
    means_R = bootstrap(mean_statistic(values_N, index_N, num_clusters), num_clusters, resamples, seed)
    return percentile_interval(means_R, num_clusters, unit, level)


def paired_difference(
    values_a: Sequence[float] | Array,
    values_b: Sequence[float] | Array,
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    unit: str = "image",
) -> Difference:
    """Mean of `a - b` over the same items in the same order, drawing whole clusters."""
    delta_N = np.asarray(values_a, dtype=float) - np.asarray(values_b, dtype=float)
    assert len(delta_N) == len(clusters)
    index_N, num_clusters = cluster_index(clusters)
    difference = float(delta_N.mean())
    if num_clusters < 2:
        return Difference(difference, None, None)
    deltas_R = bootstrap(mean_statistic(delta_N, index_N, num_clusters), num_clusters, resamples, seed)
    return Difference(difference, percentile_interval(deltas_R, num_clusters, unit, level), sign_p_value(deltas_R))


def sign_p_value(deltas_R: Array) -> float:
    """Two-sided p-value of "no difference" from resampled differences; ties at zero count for both sides."""
    resamples = len(deltas_R)
    tail = min(np.count_nonzero(deltas_R <= 0), np.count_nonzero(deltas_R >= 0))
    return float(min(1.0, 2 * (tail + 1) / (resamples + 1)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: p-values that hold for all tests together. None stays None."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        adjusted[i] = largest
    return adjusted


def quantile_intervals(
    values: Sequence[float] | Array,
    quantiles: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    unit: str = "request",
) -> list[Interval | None]:
    """Interval of each quantile of `values`, drawing whole clusters; without `clusters`, single values (requests)."""
    values_N = np.asarray(values, dtype=float)
    index_N, num_clusters = cluster_index(range(len(values_N)) if clusters is None else clusters)
    assert len(index_N) == len(values_N)
    if num_clusters < 2:
        return [None] * len(quantiles)
    items = _draw_items(index_N, num_clusters, resamples, seed)
    if isinstance(items, list):
        resampled_QR = np.stack([np.quantile(values_N[row], quantiles) for row in items], axis=1)
    else:
        resampled_QR = np.quantile(values_N[items], quantiles, axis=1)
    return [percentile_interval(row_R, num_clusters, unit, level) for row_R in resampled_QR]


def _draw_items(index_N: Array, num_clusters: int, resamples: int, seed: int) -> Array | list[Array]:
    """Positions of the items of each resample of whole clusters: one array where all clusters are of one size, else an
    array a resample."""
    members = [np.flatnonzero(index_N == cluster) for cluster in range(num_clusters)]
    drawn_RC = np.random.default_rng(seed).integers(0, num_clusters, size=(resamples, num_clusters))
    if len({len(member) for member in members}) == 1:
        return np.stack(members)[drawn_RC].reshape(resamples, -1)
    return [np.concatenate([members[c] for c in row_C]) for row_C in drawn_RC]


def paired_ratio(
    values_a: Sequence[float] | Array,
    values_b: Sequence[float] | Array,
    clusters: Sequence[Hashable],
    *,
    statistic: Callable[..., Any] = np.median,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    unit: str = "round",
) -> tuple[float, Interval | None]:
    """`statistic(a) / statistic(b)` over the same items in the same order, drawing whole clusters for both alike."""
    values_2N = np.asarray([values_a, values_b], dtype=float)
    assert values_2N.shape[1] == len(clusters) > 0
    index_N, num_clusters = cluster_index(clusters)
    ratio = float(statistic(values_2N[0]) / statistic(values_2N[1]))
    if num_clusters < 2:
        return ratio, None
    a_N, b_N = values_2N
    items = _draw_items(index_N, num_clusters, resamples, seed)
    if isinstance(items, list):
        ratios_R = np.array([statistic(a_N[row]) / statistic(b_N[row]) for row in items])
    else:
        ratios_R = statistic(a_N[items], axis=1) / statistic(b_N[items], axis=1)
    return ratio, percentile_interval(ratios_R, num_clusters, unit, level)
