"""Evaluation sets: the folder layout, files named one by one, and data that do not fit."""

import json

import pytest
from eval_fakes import write_dataset

from nmm_serve.errors import DataError
from nmm_serve.evals.datasets import Files, find_files, load_captions, load_vqa


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data")


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_reads_the_folder(data):
    files = find_files(data, "val")
    questions, captions = load_vqa(files), load_captions(files)
    assert len(questions.questions) == 12
    assert questions.complete
    first = questions.questions[0]
    assert (first.question_id, first.image_id, first.text, first.answers) == (
        1000,
        100,
        "What colour is it?",
        ("red",) * 10,
    )
    assert first.image == data / "images" / "val" / "000000000100.png"
    assert len(captions.images) == 6
    assert len(captions.images[0].references) == 2
    assert set(questions.fingerprint["files"]) == {"vqa_val_questions.json", "vqa_val_annotations.json"}


def test_limit_is_not_complete(data):
    questions = load_vqa(find_files(data, "val"), limit=3)
    assert (len(questions.questions), questions.total, questions.complete) == (3, 12, False)
    captions = load_captions(find_files(data, "val"), limit=100)
    assert captions.complete


def test_files_named_one_by_one(data, tmp_path):
    renamed = tmp_path / "pictures"
    (data / "images" / "val").rename(renamed)
    for path in list(renamed.iterdir()):
        path.rename(renamed / f"COCO_val2014_{path.name}")
    files = Files(
        images=renamed, questions=data / "vqa_val_questions.json", annotations=data / "vqa_val_annotations.json"
    )
    assert load_vqa(files).questions[0].image == renamed / "COCO_val2014_000000000100.png"


def test_missing_image_is_named(data):
    (data / "images" / "val" / "000000000103.png").unlink()
    with pytest.raises(DataError, match=r"103.*000000000103\.png"):
        load_vqa(find_files(data, "val"))
    with pytest.raises(DataError, match=r"000000000103\.png"):
        load_captions(find_files(data, "val"))


def test_missing_image_without_captions_file_is_named(data):
    (data / "captions_val.json").unlink()
    (data / "images" / "val" / "000000000103.png").unlink()
    with pytest.raises(DataError, match=r"image 103 is missing: no 000000000103\.jpg"):
        load_vqa(find_files(data, "val"))


def test_unknown_split_names_those_there(data):
    with pytest.raises(DataError, match=r"no split 'test'.*Splits there: val"):
        find_files(data, "test")


def test_named_file_that_does_not_exist(data, tmp_path):
    with pytest.raises(DataError, match=r"gone\.json does not exist"):
        find_files(data, "val", questions=tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vqa_val_questions.json", lambda d: d["questions"][0].pop("question"), r"questions\[0\] lacks question"),
        ("vqa_val_questions.json", lambda d: d["questions"].append(d["questions"][0]), "occurs twice"),
        ("vqa_val_questions.json", lambda d: d["questions"].pop(), "do not match"),
        ("vqa_val_annotations.json", lambda d: d["annotations"].pop(), "has no annotation"),
        ("vqa_val_annotations.json", lambda d: d["annotations"][0].update(image_id=5), "is about image"),
        ("vqa_val_annotations.json", lambda d: d["annotations"][0].update(answers=[]), "no list of answers"),
        ("vqa_val_annotations.json", lambda d: d["annotations"][0].update(answers=["yes"]), "expected answers like"),
        (
            "vqa_val_questions.json",
            lambda d: d["questions"][0].update(question_id=[1]),
            "expected an integer or a string",
        ),
        ("vqa_val_questions.json", lambda d: d.update(questions=[]), "is empty"),
        ("vqa_val_questions.json", lambda d: d.pop("questions"), "expected an object with a list 'questions'"),
    ],
)
def test_data_that_do_not_fit(data, file, change, message):
    edit(data / file, change)
    with pytest.raises(DataError, match=message):
        load_vqa(find_files(data, "val"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"][0].update(image_id=7), "which images\\[\\] does not list"),
        (lambda d: d.update(annotations=d["annotations"][2:]), "1 images have no caption"),
        (lambda d: d["annotations"][0].update(caption=None), "expected text"),
        (lambda d: d["images"].append(d["images"][0]), "occurs twice"),
    ],
)
def test_captions_that_do_not_fit(data, change, message):
    edit(data / "captions_val.json", change)
    with pytest.raises(DataError, match=message):
        load_captions(find_files(data, "val"))


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is not JSON"), (b"\xff\xfe", "not UTF-8"), (b"[]", "expected")]
)
def test_files_that_are_no_json(data, content, message):
    (data / "captions_val.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_captions(find_files(data, "val"))
