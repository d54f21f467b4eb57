"""The loader: the same batches whoever reads them and wherever they are taken up again; bad documents counted."""

import json
import logging
import multiprocessing
import os
import pickle
import random
import signal
from collections import Counter

import pytest
import torch
from tiny_data import PATCH_SIZE, picture_number, tiny_processor, write_coco, write_interleaved

from nmm_serve.errors import ConfigError, DataError
from nmm_serve.image_processor import NMMImageProcessor
from nmm_serve.processor import NMMProcessor
from nmm_serve.train.data.loader import MAX_IN_A_ROW, MIN_DOCUMENTS, PackedLoader, evaluation_batches
from nmm_serve.train.data.mixture import parse_mixture
from nmm_serve.train.data.sources import open_source

CONTEXT = 96
BATCHES = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_coco(folder / "coco", n=150)
    write_interleaved(folder / "i.jsonl", n=20)
    rng = random.Random(0)
    (folder / "t.txt").write_text("\n\n".join("circle " * rng.randint(1, 120) for _ in range(40)))
    return folder


@pytest.fixture(scope="module")
def mixture(data):
    return parse_mixture(
        {
            "sources": [
                {"name": "captions", "kind": "coco_captions", "data": "coco", "weight": 4, "augment": "paper"},
                {"name": "vqa", "kind": "vqa_v2", "data": "coco", "weight": 4, "max_questions": 2},
                {"name": "web", "kind": "interleaved_jsonl", "path": "i.jsonl"},
                {"name": "text", "kind": "text", "path": "t.txt", "documents": "paragraph"},
            ]
        },
        data,
    )


def make(mixture, **options) -> PackedLoader:
    defaults = {"context_length": CONTEXT, "rows": 2, "objective": "pretrain", "seed": 7}
    return PackedLoader(mixture, tiny_processor(), **{**defaults, **options})


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


@pytest.fixture(scope="module")
def run(mixture):
    """Batches of an uninterrupted run, and the state after each, as it would be saved."""
    loader = make(mixture)
    batches, states = [], [json.dumps(loader.state_dict())]
    for _ in range(BATCHES):
        batches.append(next(loader))
        states.append(json.dumps(loader.state_dict()))
    return batches, states


def test_rows_are_full_and_hold_every_kind(run):
    batches, _ = run
    assert {kind for batch in batches for kind in batch["counts"]} == {"caption", "vqa", "interleaved", "text"}
    padding = sum(int((batch["document_ids"] == 0).sum()) for batch in batches)
    assert padding / (BATCHES * 2 * CONTEXT) < 0.1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(mixture, run, num_workers):
    loader = make(mixture, num_workers=num_workers)
    assert all(same(next(loader), batch) for batch in run[0])
    loader.close()


def test_workers_keep_all_patches_of_pooled_images(mixture):
    """Such an image is one token."""
    images = NMMImageProcessor(patch_size=PATCH_SIZE, image_size=32, pool_image=True)
    processor = NMMProcessor(images, tiny_processor().tokenizer)
    options = {"context_length": CONTEXT, "rows": 2, "objective": "pretrain", "seed": 7}
    alone, apart = (PackedLoader(mixture, processor, **options, num_workers=n) for n in (0, 2))
    for _ in range(4):
        batch = next(alone)
        assert len(batch["pixel_values"]) == batch["image_grid"].prod(-1).sum()
        assert same(next(apart), batch)
    apart.close()


@pytest.mark.parametrize(("stops", "num_workers"), [(range(BATCHES), 0), ((0, 5), 2)])
def test_resumed_at_any_batch_it_goes_on_as_if_nothing_happened(mixture, run, stops, num_workers):
    batches, states = run
    for stop in stops:
        loader = make(mixture, num_workers=num_workers, state=json.loads(states[stop]))
        assert json.dumps(loader.state_dict()) == states[stop]
        for place in range(stop, min(stop + 4, BATCHES)):
            assert same(next(loader), batches[place])
            assert json.dumps(loader.state_dict()) == states[place + 1]
        loader.close()


def test_the_data_survives_pickling(mixture, run):
    """Where processes are spawned, not forked, workers get it so."""
    next(make(mixture))  # open its files
    assert same(next(make(pickle.loads(pickle.dumps(mixture)))), run[0][0])


def test_resumed_with_rows_of_another_number_the_rows_are_the_same(mixture, run):
    batches, states = run
    loader = make(mixture, rows=1, state=json.loads(states[3]))
    for batch in batches[3:6]:
        for r in range(2):
            assert torch.equal(next(loader)["input_ids"][0], batch["input_ids"][r])


def test_closing_loses_nothing(mixture, run):
    loader = make(mixture, num_workers=1)
    for batch in run[0][:4]:
        assert same(next(loader), batch)
        loader.close()
        loader.close()


def test_other_seeds_give_other_batches(mixture, run):
    assert not same(next(make(mixture, seed=8)), run[0][0])


def test_the_model_s_random_numbers_are_left_alone(mixture):
    before = torch.get_rng_state()
    for workers in (0, 1):
        loader = make(mixture, num_workers=workers)
        next(loader)
        loader.close()
    assert torch.equal(torch.get_rng_state(), before)


def captions_seen(loader, documents: int) -> Counter[int]:
    """Pictures of the caption documents in the first batches that hold at least `documents` of them."""
    seen: Counter[int] = Counter()
    while seen.total() < documents:
        batch = next(loader)
        seen.update(picture_number(patches) for patches in batch["pixel_values"].split(16))
    return seen


@pytest.fixture(scope="module")
def captions(data):
    return parse_mixture({"sources": [{"kind": "coco_captions", "data": "coco"}]}, data)


def test_no_sample_twice_in_an_epoch_across_a_resume(captions):
    """Half an epoch, a resume, and on to where all but the buffered documents are seen."""
    first = make(captions)
    seen = captions_seen(first, 40)
    seen += captions_seen(make(captions, state=json.loads(json.dumps(first.state_dict()))), 40)
    assert max(seen.values()) == 1
    assert seen.total() >= 80


def test_ranks_share_one_epoch_without_overlap(captions):
    seen: Counter[int] = Counter()
    loaders = [make(captions, rank=rank, world_size=3, rows=1) for rank in range(3)]
    counts = []
    for loader in loaders:
        pictures = captions_seen(loader, 1)
        counts.append(pictures.total())
        seen += pictures
    assert min(counts) > 0
    assert max(seen.values()) == 1
    # what the ranks have read and not yet shown is disjoint too
    drawn = [{tuple(item[:3]) for item in loader.state_dict()["pending"]} for loader in loaders]
    assert not set.intersection(*drawn)
    assert all({position % 3 for position, _, _ in items} == {rank} for rank, items in enumerate(drawn))


def test_a_rank_resumes(mixture):
    loader = make(mixture, rank=1, world_size=2)
    next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make(mixture, rank=1, world_size=2, state=state)
    assert same(next(resumed), next(loader))
    with pytest.raises(DataError, match="rank was 1 and is now 0"):
        make(mixture, rank=0, world_size=2, state=state)


def test_a_state_of_another_run_is_refused(mixture, captions, run):
    state = json.loads(run[1][2])
    with pytest.raises(DataError, match="seed was 7 and is now 1"):
        make(mixture, state=state, seed=1)
    with pytest.raises(DataError, match="context_length was 96"):
        make(mixture, state=state, context_length=64)
    with pytest.raises(DataError, match="sources was"):
        make(captions, state=state)
    with pytest.raises(DataError, match="version 0"):
        make(mixture, state={**state, "version": 0})


@pytest.mark.parametrize(
    "options", [{"rows": 0}, {"context_length": 1}, {"num_workers": -1}, {"max_bad_share": 1.5}, {"seed": -1}]
)
def test_values_out_of_range_are_refused(mixture, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(mixture, **options)


def damaged(tmp_path, numbers, n=100):
    """A caption source in which the images of `numbers` cannot be read."""
    folder = write_coco(tmp_path / "coco", n=n)
    for i, number in enumerate(numbers):
        image = folder / "images" / "train" / f"COCO_train_{number:012d}.png"
        if i % 2:
            image.unlink()
        else:
            image.write_bytes(image.read_bytes()[:60])
    return parse_mixture({"sources": [{"name": "c", "kind": "coco_captions", "data": str(folder)}]})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_counted_named_and_left_out(tmp_path, caplog, num_workers):
    mixture = damaged(tmp_path, [3, 4])
    loader = make(mixture, num_workers=num_workers, max_bad_share=0.1)
    with caplog.at_level(logging.WARNING):
        seen = captions_seen(loader, 150)
    loader.close()
    assert not {3, 4} & set(seen)
    assert loader.stats.bad["c"] == len(caplog.records) >= 2
    for number in (3, 4):
        assert f"COCO_train_{number:012d}.png" in caplog.text
    assert loader.stats.documents["c"] > 150


def test_bad_counts_survive_a_resume(tmp_path):
    mixture = damaged(tmp_path, [3, 4])
    loader = make(mixture, max_bad_share=0.1)
    captions_seen(loader, 100)
    resumed = make(mixture, max_bad_share=0.1, state=json.loads(json.dumps(loader.state_dict())))
    assert resumed.stats.bad == loader.stats.bad
    assert loader.stats.bad["c"] >= 2
    assert resumed.stats.documents == loader.stats.documents


def test_too_many_bad_images_stop_the_run(tmp_path):
    loader = make(damaged(tmp_path, range(0, 100, 10)), max_bad_share=0.05)
    with pytest.raises(
        DataError, match=rf"of {MIN_DOCUMENTS} documents of source 'c' are bad, over max_bad_share 0\.05.*COCO_train_"
    ):
        captions_seen(loader, 200)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_vanished_folder_stops_the_run(tmp_path, num_workers):
    mixture = damaged(tmp_path, [])
    loader = make(mixture, num_workers=num_workers, max_bad_share=1.0)
    next(loader)
    (tmp_path / "coco" / "images").rename(tmp_path / "gone")
    with pytest.raises(DataError, match=f"{MAX_IN_A_ROW} in a row"):
        captions_seen(loader, 1000)
    loader.close()


def test_a_killed_worker_is_an_error_not_a_hang(captions):
    before = multiprocessing.active_children()
    loader = make(captions, num_workers=1)
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="data worker ended unexpectedly"):
        captions_seen(loader, 10_000)


def test_workers_end_with_their_loader(captions):
    before = multiprocessing.active_children()
    loader = make(captions, num_workers=2)
    next(loader)
    workers = set(multiprocessing.active_children()) - set(before)
    assert len(workers) == 2
    del loader
    assert not any(worker.is_alive() for worker in workers)


def test_workers_end_with_an_error(tmp_path):
    before = multiprocessing.active_children()
    loader = make(damaged(tmp_path, range(100)), num_workers=2)
    with pytest.raises(DataError, match="are bad"):
        next(loader)
    assert set(multiprocessing.active_children()) == set(before)


def test_evaluation_batches_hold_each_document_once(data):
    source = open_source({"kind": "coco_captions", "data": str(data / "coco")})
    batches = evaluation_batches(source, tiny_processor(), context_length=CONTEXT, rows=4, n=100)
    pictures = [picture_number(p) for b in batches for p in b["pixel_values"].split(16)]
    assert sorted(pictures) == list(range(100))
    assert all(len(b["input_ids"]) == 4 for b in batches[:-1])
    again = evaluation_batches(source, tiny_processor(), context_length=CONTEXT, rows=4, n=100)
    assert all(same(x, y) for x, y in zip(batches, again, strict=True))


def test_evaluation_does_not_go_on_without_a_document(tmp_path):
    source = damaged(tmp_path, [5]).sources[0].source
    with pytest.raises(DataError, match=r"validation document c:COCO_train_000000000005\.png cannot be used"):
        evaluation_batches(source, tiny_processor(), context_length=CONTEXT, rows=2, n=100)
