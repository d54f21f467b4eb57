"""The order of documents: permutations, shares, ranks, and the options of a mixture file."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import write_coco

from nmm_serve.errors import ConfigError, DataError
from nmm_serve.train.data.documents import text_document
from nmm_serve.train.data.mixture import Mixture, MixtureSource, Walk, parse_mixture, place_of
from nmm_serve.train.data.order import permuted
from nmm_serve.train.data.sources import Source, open_source


class Numbers(Source):
    kind = "text"

    def __init__(self, name: str, size: int) -> None:
        self.name, self._size = name, size

    def __len__(self) -> int:
        return self._size

    def document(self, index, visit):
        return text_document(str(index), name=self.item_name(index))


def mixture(*sources: tuple[str, int, float]) -> Mixture:
    return Mixture([MixtureSource(Numbers(name, size), weight) for name, size, weight in sources])


@given(st.integers(1, 3000), st.text())
def test_permutation_is_one(size, key):
    assert sorted(permuted(place, size, key) for place in range(size)) == list(range(size))


@given(st.integers(1, 10**9), st.data())
def test_permutation_of_a_large_source_stays_inside(size, data):
    place = data.draw(st.integers(0, size - 1))
    assert 0 <= permuted(place, size, "k") < size


def test_permutations_differ_by_key_and_mix_neighbours():
    first, second = ([permuted(place, 1000, key) for place in range(1000)] for key in "ab")
    assert sum(x == y for x, y in zip(first, second, strict=True)) < 20
    assert sum(abs(x - y) < 10 for x, y in itertools.pairwise(first)) < 60  # 20 expected by chance


def test_small_permutations_are_about_uniform():
    counts = Counter(tuple(permuted(place, 3, str(key)) for place in range(3)) for key in range(6000))
    assert len(counts) == 6
    assert all(850 < count < 1150 for count in counts.values())


def test_shares_follow_weights_and_no_document_repeats_within_an_epoch():
    mixed = mixture(("a", 300, 3), ("b", 5000, 6), ("c", 7, 1))
    walk = Walk(mixed, seed=5)
    places: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 2: []}
    for _ in range(10_000):
        item = next(walk)
        places[item.source].append(place_of(item, mixed, 5))
    shares = [len(visits) / 10_000 for visits in places.values()]
    assert shares == pytest.approx([0.3, 0.6, 0.1], abs=0.02)
    for number, visits in places.items():
        size = len(mixed.sources[number].source)
        assert len(set(visits)) == len(visits)  # (index, epoch): once an epoch
        whole = [index for index, epoch in visits if epoch == 0][:size]
        if len(visits) >= size:
            assert sorted(whole) == list(range(size))
        assert [epoch for _, epoch in visits] == sorted(epoch for _, epoch in visits)


def test_a_walk_goes_on_from_its_counts():
    mixed = mixture(("a", 30, 1), ("b", 50, 2))
    walk = Walk(mixed, 1)
    drawn = Counter(next(walk).source for _ in range(5000))
    assert walk.counts == [drawn[0], drawn[1]]
    resumed = Walk(mixed, 1, walk.position, walk.counts)
    assert [next(resumed) for _ in range(5000)] == [next(walk) for _ in range(5000)]


def test_seeds_give_other_orders():
    mixed = mixture(("a", 300, 1), ("b", 300, 1))
    one, other = ([place_of(item, mixed, seed) for item in itertools.islice(Walk(mixed, seed), 50)] for seed in (1, 2))
    assert one != other


def test_parse_reads_names_weights_and_augmentation(tmp_path):
    write_coco(tmp_path / "d")
    mixed = parse_mixture(
        {
            "sources": [
                {"kind": "coco_captions", "data": "d", "weight": 3, "augment": "paper"},
                {"name": "questions", "kind": "vqa_v2", "data": "d"},
            ]
        },
        tmp_path,
    )
    assert mixed.names == ["coco_captions", "questions"]
    assert mixed.probabilities == [0.75, 0.25]
    assert [s.augment for s in mixed.sources] == ["paper", None]


TEXT = {"name": "t", "kind": "builtin", "which": "text"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"source": []}, "unknown key of the mixture 'source'. Did you mean 'sources'"),
        ({"sources": []}, "at least one source"),
        ({"sources": ["coco"]}, "expected options like"),
        ({"sources": [{"which": "text"}]}, "has no kind"),
        ({"sources": [{"kind": "coco_caption"}]}, "Did you mean 'coco_captions'"),
        ({"sources": [{**TEXT, "siz": 3}]}, "source 't' (builtin): unknown option 'siz'. Did you mean 'size'"),
        ({"sources": [{**TEXT, "which": "txt"}]}, "Did you mean 'text'"),
        ({"sources": [{**TEXT, "which": ["text"]}]}, "unknown value"),
        ({"sources": [{**TEXT, "size": "many"}]}, "size: expected an integer, found 'many'"),
        ({"sources": [{**TEXT, "size": True}]}, "size: expected an integer, found True"),
        ({"sources": [{**TEXT, "size": 0}]}, "size 0; expected 1 or more"),
        ({"sources": [{"kind": "builtin"}]}, "option 'which' is missing"),
        ({"sources": [{**TEXT, "weight": 0}]}, "weight 0.0; expected a number above 0"),
        ({"sources": [{**TEXT, "weight": float("nan")}]}, "weight nan"),
        ({"sources": [{**TEXT, "weight": "a"}]}, "weight: expected a number, found 'a'"),
        ({"sources": [{**TEXT, "augment": "papers"}]}, "Did you mean 'paper'"),
        ({"sources": [TEXT, TEXT]}, "two sources are named 't'"),
        ({"sources": [{"kind": "text", "path": 3}]}, "expected a path or a list of paths, found 3"),
        ({"sources": [{"kind": "vqa_v2", "data": 3}]}, "data: expected a path, found 3"),
        ({"sources": [{"kind": "vqa_v2"}]}, "give data"),
    ],
)
def test_wrong_options_are_named(config, message):
    with pytest.raises(ConfigError) as error:
        parse_mixture(config)
    assert message in str(error.value)


def test_a_source_without_documents_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="source 'x' \\(text\\) has no documents"):
        open_source({"name": "x", "kind": "text", "path": str(tmp_path / "a.jsonl")})
