"""Planted copies are found, by what they are; different data are not; what cannot be read is named."""

import io
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from eval_fakes import write_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

pytest.importorskip("imagehash", reason="needs the extra `evals`")

from nmm_serve.cli.eval import main
from nmm_serve.errors import DataError
from nmm_serve.evals.contamination import check, ngrams
from nmm_serve.evals.image_hash import NearIndex, fingerprint, fingerprint_all


def scene(seed, size=(120, 90)):
    """A picture with the coarse structure and the noise of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def reading(name, images=(), texts=()):
    return SimpleNamespace(name=name, read=lambda: SimpleNamespace(images=list(images)), texts=lambda: list(texts))


LONG = "the quick brown fox jumps over the lazy dog while seven wizards brew strong potions in silence"


def test_planted_copies_are_found_and_others_are_not(tmp_path):
    for i in range(40):
        scene(i).save(tmp_path / f"train{i}.png")
    changed = {
        "same": scene(0),
        "recompressed": jpeg(scene(1), 60),
        "half": scene(2).resize((60, 45)),
        "brighter": ImageEnhance.Brightness(scene(3)).enhance(1.15),
        "blurred": scene(4).filter(ImageFilter.GaussianBlur(1)),
        "new": scene(1000),
        "newer": scene(1001),
    }
    evaluation = [reading(name, [image], [f"a short text about {name}"]) for name, image in changed.items()]
    evaluation.append(reading("copied", [], [f"Once more: {LONG.upper()}!"]))
    train = [reading(f"doc{i}", [tmp_path / f"train{i}.png"], ["x " * i]) for i in range(40)]
    train += [
        reading("twice", [tmp_path / "train0.png"]),
        reading("book", [], [f"It said, {LONG}; and then it ended."]),
    ]
    section, items = check(train, evaluation, workers=1)
    found = {(item["kind"], item["evaluation"].split(":")[0]): item for item in items}
    assert set(found) == {("exact image", "same"), ("text", "copied")} | {
        ("near image", name) for name in ("recompressed", "half", "brighter", "blurred")
    }
    assert found["exact image", "same"]["train"] == [str(tmp_path / "train0.png")]
    assert found["near image", "half"]["train"] == [str(tmp_path / "train2.png")]
    assert found["text", "copied"]["train"] == ["book"]
    assert found["text", "copied"]["words"] in LONG
    assert section["images"]["exact"] == {"count": 1, "of": 7, "share": 1 / 7}
    assert section["images"]["train"] == 40
    assert section["texts"] == {
        "evaluation": 8, "train": 41, "too_short": 7, "overlapping": {"count": 1, "of": 1, "share": 1.0}
    }  # fmt: skip
    json.dumps([section, items], allow_nan=False)


def test_a_copy_that_is_exact_to_one_can_be_near_to_another():
    original, copy = scene(1), Image.open(io.BytesIO(jpeg(scene(1), 60)))
    section, items = check([reading("t", [original])], [reading("a", [original]), reading("b", [copy])], workers=1)
    assert [(item["kind"], item["evaluation"]) for item in items] == [("exact image", "a"), ("near image", "b")]
    assert section["failed"] == 0


def test_pictures_of_one_colour_are_near_to_nothing():
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    section, items = check([reading("t", [red])], [reading("a", [blue]), reading("b", [red])], workers=1)
    assert [(item["kind"], item["evaluation"]) for item in items] == [("exact image", "b")]
    assert section["images"]["without_near_hash"] == 2


def test_the_same_shapes_in_other_colours_are_no_copy():
    image = scene(5)
    red, green, blue = image.split()
    _, items = check([reading("t", [image])], [reading("a", [Image.merge("RGB", (blue, red, green))])], workers=1)
    assert items == []


def test_what_cannot_be_read_is_named():
    def broken():
        raise DataError("no such line")

    bad = SimpleNamespace(name="bad", read=broken, texts=broken)
    section, _ = check([bad, reading("garbage", [b"no image"])], [reading("e", [scene(0)])], workers=1)
    assert section["failed"] == 2
    assert section["errors"][0] == {"id": "train: bad", "error": "no such line"}
    assert section["errors"][1]["id"] == "train: garbage"


def test_more_training_documents_are_counted_than_named():
    texts = [reading(f"t{i}", [], [LONG]) for i in range(9)]
    _, (item,) = check(texts, [reading("e", [], [LONG])], workers=1)
    assert (item["train"], item["train_count"]) == ([f"t{i}" for i in range(5)], 9)


@given(st.text("aB .,-'!\n日\u2028" + "7", max_size=200), st.integers(1, 4))
def test_ngrams_are_those_of_lm_eval(text, n):
    janitor = pytest.importorskip("lm_eval.decontamination.janitor", reason="needs lm-eval")
    theirs = janitor.Janitor(ngram_n=n)
    assert ngrams(text, n) == list(janitor.word_ngrams(theirs.normalize_string(text), n))


def test_hashing_in_other_processes_gives_the_same(monkeypatch):
    images = [(str(i), jpeg(scene(i, (24, 18)), 90)) for i in range(12)]
    monkeypatch.setattr("nmm_serve.evals.image_hash._FEW", 2)
    monkeypatch.setattr("nmm_serve.evals.image_hash._CHUNK", 3)
    parallel = dict(fingerprint_all(iter(images), 2))
    assert parallel == {name: fingerprint(data) for name, data in images}


def test_near_pairs_are_found_in_any_number_of_steps(monkeypatch):
    prints = [(str(i), fingerprint(scene(i % 7, (24, 18)))) for i in range(20)]
    pairs = set(NearIndex(prints[:9]).matches(prints[9:]))
    monkeypatch.setattr("nmm_serve.evals.image_hash._CELLS", 10)
    assert set(NearIndex(prints[:9]).matches(prints[9:])) == pairs
    assert {(a, b) for a, b, bits in pairs if bits == 0} >= {(str(i), str(i + 14)) for i in range(6)}
    assert list(NearIndex([]).matches(prints)) == []


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", images=3, split="train")
    write_dataset(tmp_path / "other", images=5)
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": LONG}) + "\n")
    run = partial(CliRunner().invoke, main)
    options = ["contamination", "--train", "data", "--train", "more.jsonl", "--data", "other", "-o", "c.json"]
    done = run([*options, "--json"])
    assert done.exit_code == 0, done.stderr
    section = json.loads(done.stdout)["tasks"]["contamination"]
    assert section["images"]["exact"]["count"] == 3
    assert section["texts"]["train"] == 3 * 2 + 3 * 4 + 1
    table = run(options)
    assert "exact image" in table.stdout
    assert "000000000101.png" in table.stderr
    assert "more.txt does not exist" in run([*options, "--train", "more.txt"]).stderr
    (tmp_path / "other/images/val/000000000101.png").write_bytes(b"cut")
    broken = run(options)
    assert broken.exit_code == 1
    assert "000000000101.png is not a readable image" in broken.stderr
