"""The built-in data set: reproducible, disjoint splits; pictures, captions and files that say what the scene says."""

import hashlib
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nmm_serve.errors import ConfigError, DataError
from nmm_serve.train.data import builtin
from nmm_serve.train.data.builtin import digits, disk, scene
from nmm_serve.train.data.builtin.render import RGB
from nmm_serve.train.data.builtin.words import CELLS, COLORS, KINDS, NUMBERS, SHAPES, SIZES

SPLITS = ("train", "val", "test")
INDICES = st.integers(0, 10**9)
SEEDS = st.integers(0, 2**32)
QUESTION_FIELDS = {"image_id", "question", "question_id"}
ANNOTATION_FIELDS = {
    "image_id", "question_id", "question_type", "answer_type", "answers", "multiple_choice_answer", "family",
}  # fmt: skip


def pixel_hash(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


# ---- splits and seeds


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SPLITS), INDICES, SEEDS)
def test_the_same_arguments_give_the_same_example(split, index, seed):
    first, second = (builtin.builtin_images(split, index, seed) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.captions, first.questions, first.scene) == (second.captions, second.questions, second.scene)
    assert builtin.text_document(split, index, seed) == builtin.text_document(split, index, seed)


def test_known_content_stays_what_it_is():
    """Across processes, machines and versions: a record made elsewhere must be comparable."""
    example = builtin.builtin_images("val", 7, 3)
    assert example.captions[0] == "A gray 1."
    assert example.questions[1]["question"] == "What is in the top center?"
    assert builtin.text_document("val", 7, 3).startswith("The orange cross is larger than the green ring.")


def test_index_seed_and_split_each_change_the_picture():
    base = pixel_hash(builtin.builtin_images("train", 0, 0).image)
    others = [("train", 1, 0), ("train", 0, 1), ("val", 0, 0), ("test", 0, 0)]
    assert base not in {pixel_hash(builtin.builtin_images(*args).image) for args in others}


def test_digit_pools_share_no_image_and_use_them_all():
    pools = {split: {i for pool in digits.pools(split) for i in pool} for split in SPLITS}
    assert sum(len(p) for p in pools.values()) == len(set.union(*pools.values())) == len(digits.images())
    pixels = {split: {digits.images()[i].tobytes() for i in pool} for split, pool in pools.items()}
    assert not pixels["train"] & pixels["val"]
    assert not pixels["train"] & pixels["test"]
    assert not pixels["val"] & pixels["test"]
    assert all(len(pool) >= 20 for split in SPLITS for pool in digits.pools(split))


def test_scenes_use_the_digits_of_their_split():
    for split in SPLITS:
        pools = digits.pools(split)
        written = [o for i in range(200) for o in builtin.builtin_images(split, i).scene.objects if o.kind == "digit"]
        assert len(written) > 30
        assert all(o.glyph in pools[o.digit] for o in written)


def test_no_picture_layout_or_text_is_in_two_splits():
    """Other seeds for the splits, as a user may choose; lone objects are the layouts most likely to meet."""
    pictures, layouts, texts = {}, {}, {}
    for seed, split in enumerate(SPLITS):
        examples = [builtin.builtin_images(split, i, seed) for i in range(400)]
        documents = [builtin.interleaved_document(split, i, seed) for i in range(60)]
        pictures[split] = {pixel_hash(e.image) for e in examples}
        pictures[split] |= {pixel_hash(part) for d in documents for part in d if isinstance(part, Image.Image)}
        layouts[split] = {scene.layout(e.scene.objects) for e in examples}
        texts[split] = {builtin.text_document(split, i, seed) for i in range(200)}
        assert len(pictures[split]) > 500
    for found in (pictures, layouts, texts):
        assert not found["train"] & found["val"]
        assert not found["train"] & found["test"]
        assert not found["val"] & found["test"]


@given(st.text())
def test_every_content_belongs_to_exactly_one_split(text):
    assert sum(scene.in_split(text, split) for split in SPLITS) == 1


@pytest.mark.parametrize("draw", [builtin.builtin_images, builtin.text_document, builtin.interleaved_document])
def test_bad_arguments_are_named(draw):
    with pytest.raises(DataError, match=r"unknown split.*'vall'.*Did you mean 'val'"):
        draw("vall", 0, 0)
    with pytest.raises(DataError, match=r"-1 .*negative"):
        draw("train", -1, 0)
    with pytest.raises(ConfigError, match="a jitter of -2 pixels"):
        builtin.Difficulty(jitter=-2)
    with pytest.raises(ConfigError, match=r"max_objects 6.*2 to 5"):
        builtin.Difficulty(max_objects=6)


# ---- pictures


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SPLITS), INDICES, SEEDS)
def test_objects_lie_inside_the_picture_in_cells_of_their_own(split, index, seed):
    objects = builtin.builtin_images(split, index, seed).scene.objects
    assert 1 <= len(objects) <= 5
    assert len({o.cell for o in objects}) == len(objects)
    covered = np.zeros((64, 64), dtype=int)
    for o in objects:
        half = o.extent // 2
        assert half <= o.x <= 64 - half
        assert half <= o.y <= 64 - half
        covered[o.y - half : o.y + half, o.x - half : o.x + half] += 1
    assert covered.max() == 1
    written = [o.digit for o in objects if o.digit is not None]
    assert len(set(written)) == len(written)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPLITS), INDICES, SEEDS, st.integers(0, 4))
def test_little_jitter_keeps_objects_in_the_middle_of_their_cells(split, index, seed, jitter):
    middles = (11, 32, 53)
    objects = builtin.builtin_images(split, index, seed, builtin.Difficulty(jitter)).scene.objects
    assert len({o.cell for o in objects}) == len(objects)
    assert all(min(abs(c - m) for m in middles) <= jitter for o in objects for c in (o.x, o.y))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPLITS), INDICES, SEEDS, st.integers(2, 5))
def test_no_picture_has_more_objects_than_were_asked_for(split, index, seed, most):
    example = builtin.builtin_images(split, index, seed, builtin.Difficulty(max_objects=most))
    assert 1 <= len(example.scene.objects) <= most
    assert all(int(q["multiple_choice_answer"]) <= most for q in example.questions if q["question_type"] == "how many")


def test_pictures_show_the_colors_of_the_scene_on_light_paper():
    wrong = 0
    shown = 0
    for i in range(150):
        example = builtin.builtin_images("train", i)
        assert example.image.size == (64, 64)
        assert example.image.mode == "RGB"
        pixels = np.asarray(example.image).astype(int)
        paper = np.ones((64, 64), dtype=bool)
        for o in example.scene.objects:
            half = o.extent // 2
            box = np.s_[o.y - half : o.y + half, o.x - half : o.x + half]
            paper[box] = False
            ink = pixels[box].reshape(-1, 3)
            darkest = ink[ink.min(axis=1).argmin()]
            distance = {name: np.abs(np.array(rgb) - darkest).sum() for name, rgb in RGB.items()}
            nearest = min(distance, key=distance.__getitem__)
            wrong += nearest != o.color
            shown += 1
        assert pixels[paper].min() > 180
    assert wrong <= 0.02 * shown


def test_without_scikit_learn_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn .*pip install 'nmm-serve\[train\]'"):
        digits._load.__wrapped__()


def test_small_handwriting_of_the_held_out_pool_can_be_read():
    """A nearest-neighbour reader of rendered crops must do far better than the tenth that is chance."""
    from sklearn.neighbors import KNeighborsClassifier

    def crops(split, count):
        drawn, values = [], []
        for i in range(count):
            example = builtin.builtin_images(split, i)
            pixels = np.asarray(example.image.convert("L"), dtype=float)
            for o in example.scene.objects:
                if o.kind == "digit" and o.size == "small":
                    crop = pixels[o.y - 7 : o.y + 7, o.x - 7 : o.x + 7]
                    drawn.append(((crop - crop.min()) / np.ptp(crop)).ravel())
                    values.append(o.digit)
        return drawn, values

    reader = KNeighborsClassifier(3).fit(*crops("train", 2500))
    assert reader.score(*crops("val", 400)) > 0.85


# ---- captions

NOUN = "|".join((*SHAPES, *"0123456789"))
NUMBER = {"a": 1, "an": 1, **{word: i for i, word in enumerate(NUMBERS)}}


def numbered(text, pattern):
    """ "two red stars and a green 7" -> {("red", "star"): 2, ("green", "7"): 1}."""
    found = re.findall(rf"\b({'|'.join(NUMBER)}) {pattern}(?:e?s)?\b", text.lower())
    return Counter({tuple(rest): NUMBER[number] for number, *rest in found})


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SPLITS), INDICES, SEEDS)
def test_captions_name_exactly_what_is_there(split, index, seed):
    example = builtin.builtin_images(split, index, seed)
    objects = example.scene.objects
    listing, places, counts, relation, colors = example.captions
    color = f"({'|'.join(COLORS)})"
    assert numbered(listing, f"{color} ({NOUN})") == Counter((o.color, o.noun) for o in objects)
    cell = "|".join(CELLS)
    placed = re.findall(rf"{color} ({NOUN}) in the ({cell})\b", places)
    if places.startswith("In the"):
        found = re.findall(rf"in the ({cell}) is an? {color} ({NOUN})\b", places, re.IGNORECASE)
        placed = [(color, noun, place) for place, color, noun in found]
    assert Counter(placed) == Counter((o.color, o.noun, o.cell) for o in objects)
    by_kind = numbered(counts, f"({'|'.join((*KINDS, 'object'))})")
    total = by_kind.pop(("object",), len(objects))
    assert total == len(objects)
    assert by_kind == Counter((o.kind,) for o in objects)
    assert numbered(colors, f"{color} object") == Counter((o.color,) for o in objects)
    assert_relation_holds(relation, objects)
    assert all(caption[0].isupper() and caption.endswith(".") for caption in example.captions)


def assert_relation_holds(caption, objects):
    named = rf"(?:a|an) ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({NOUN})"
    alone = re.fullmatch(rf"{named} in the ({'|'.join(CELLS)})\.", caption, re.IGNORECASE)
    if alone:
        assert [(o.size, o.color, o.noun, o.cell) for o in objects] == [alone.groups()]
        return
    words = "to the left of|to the right of|above|below"
    told = re.fullmatch(rf"{named} ({words}) {named}\.", caption, re.IGNORECASE)
    assert told
    size, color, noun, word, *second = told.groups()
    holds = {
        "to the left of": lambda p, q: p.x < q.x,
        "to the right of": lambda p, q: p.x > q.x,
        "above": lambda p, q: p.y < q.y,
        "below": lambda p, q: p.y > q.y,
    }[word]
    firsts = [o for o in objects if (o.size, o.color, o.noun) == (size, color, noun)]
    seconds = [o for o in objects if (o.size, o.color, o.noun) == tuple(second)]
    assert any(holds(p, q) for p in firsts for q in seconds if p is not q)


def test_the_vocabulary_is_small_and_closed():
    def words(indices):
        found = set()
        for i in indices:
            example = builtin.builtin_images("train", i)
            texts = [*example.captions, *(q["question"] for q in example.questions)]
            texts += [a["answer"] for q in example.questions for a in q["answers"]]
            texts.append(builtin.text_document("train", i))
            texts += [part for part in builtin.interleaved_document("train", i) if isinstance(part, str)]
            found |= {word for text in texts for word in re.findall(r"\w+", text.lower())}
        return found

    vocabulary = words(range(1000))
    assert len(vocabulary) < 180
    assert words(range(10_000, 10_250)) <= vocabulary


# ---- files


def read(path):
    return json.loads(path.read_text())


def test_export_writes_coco_and_vqa_files_that_agree_with_the_examples(tmp_path):
    builtin.export(tmp_path, "val", 12, 5)
    examples = {e.image_id: e for e in (builtin.builtin_images("val", i, 5) for i in range(12))}
    captions = read(tmp_path / "captions_val.json")
    assert {image["id"] for image in captions["images"]} == set(examples)
    for image in captions["images"]:
        example = examples[image["id"]]
        assert image["file_name"] == f"{image['id']:012d}.png"
        with Image.open(tmp_path / "images" / "val" / image["file_name"]) as stored:
            assert stored.size == (image["width"], image["height"])
            assert stored.convert("RGB").tobytes() == example.image.tobytes()
        told = [c["caption"] for c in captions["annotations"] if c["image_id"] == image["id"]]
        assert told == example.captions
        assert len(told) == 5
    assert len({c["id"] for c in captions["annotations"]}) == 60

    asked, answered = read(tmp_path / "vqa_val_questions.json"), read(tmp_path / "vqa_val_annotations.json")
    assert {"info", "task_type", "data_type", "data_subtype", "license", "questions"} == set(asked)
    assert {"info", "data_type", "data_subtype", "license", "annotations"} == set(answered)
    assert asked["task_type"] == "Open-Ended"
    merged = [{**q, **a} for q, a in zip(asked["questions"], answered["annotations"], strict=True)]
    assert merged == [q for e in examples.values() for q in e.questions]
    assert all(set(q) == QUESTION_FIELDS for q in asked["questions"])
    assert all(set(a) == ANNOTATION_FIELDS for a in answered["annotations"])
    assert len({q["question_id"] for q in asked["questions"]}) == len(asked["questions"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "images", "captions_val.json", "vqa_val_questions.json", "vqa_val_annotations.json",
    }  # fmt: skip


def test_splits_are_exported_side_by_side_and_never_overwritten(tmp_path):
    for split in SPLITS:
        builtin.export(tmp_path, split, 2)
    ids = [image["id"] for split in SPLITS for image in read(tmp_path / f"captions_{split}.json")["images"]]
    assert len(set(ids)) == 6
    with pytest.raises(DataError, match=r"images/val is there already; delete"):
        builtin.export(tmp_path, "val", 2)
    with pytest.raises(DataError, match="cannot export 0 examples"):
        builtin.export(tmp_path / "other", "val", 0)


def test_an_export_that_fails_half_way_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    real = builtin.builtin_images

    def full_disk(split, index, seed, difficulty):
        if index == 3:
            raise OSError(28, "No space left on device")
        return real(split, index, seed, difficulty)

    monkeypatch.setattr(disk, "builtin_images", full_disk)
    with pytest.raises(OSError, match="No space"):
        builtin.export(tmp_path, "train", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert not list((tmp_path / "images").iterdir())
