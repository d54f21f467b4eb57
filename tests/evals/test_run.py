"""Whole evaluations through engines with known answers, and the records they leave."""

import errno
import json
import os
import random

import pytest
from eval_fakes import FakeEngine, big, failed, image_tag, oracle, prompt_text, says, write_dataset

pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")

from nmm_serve.errors import DataError
from nmm_serve.evals import caption
from nmm_serve.evals.datasets import Files, find_files, load_vqa
from nmm_serve.evals.latency import Load
from nmm_serve.evals.records import load_items, load_record, no_checkpoint, write_record
from nmm_serve.evals.run import Options, evaluate, failures, load_data
from nmm_serve.evals.table import remarks
from nmm_serve.evals.tokenizer import FallbackTokenizer


@pytest.fixture(autouse=True)
def _no_java(monkeypatch):
    """METEOR's Java takes long to start and is tested elsewhere."""
    monkeypatch.setattr(caption, "open_tokenizer", FallbackTokenizer)


@pytest.fixture
def data(tmp_path):
    return write_dataset(tmp_path / "data")


@pytest.fixture
def run(data, tmp_path):
    def run(answer, tasks=("vqa",), batch_size=1, **options):
        engine = FakeEngine(answer, batch_size=batch_size)
        load = Load(concurrencies=(1, 2), requests=2, warmup=1, output_tokens=4)
        plan = Options(tasks=tasks, files=find_files(data, "val"), out=tmp_path / "out.json", load=load, **options)
        record = evaluate(engine, load_data(plan), plan)
        assert load_record(plan.out) == record
        return record, load_items(plan.out, record), engine

    return run


def test_oracle_scores_everything(run):
    record, items, _ = run(oracle, ("vqa", "caption"))
    section = record["tasks"]["vqa"]
    assert (section["accuracy"], section["exact_match"], section["relaxed_accuracy"]) == (100.0, 100.0, 100.0)
    assert (section["failed"], section["n"]) == (0, 12)
    assert section["interval"]["low"] == section["interval"]["high"] == 100.0
    metrics = record["tasks"]["caption"]["metrics"]
    assert metrics["ROUGE_L"] == pytest.approx(1)
    assert metrics["Bleu_4"] == pytest.approx(1)
    assert metrics["METEOR"] is None
    assert record["final"]
    assert len(items) == record["items"]["count"] == 18
    assert failures(record) == []


def test_a_constant_scores_the_majority_share(run):
    record, _, _ = run(lambda request: says("yes" if "big" in prompt_text(request) else "red"))
    section = record["tasks"]["vqa"]
    assert section["per_question_type"]["is it"]["accuracy"] == pytest.approx(66.67)
    assert section["per_answer_type"]["yes/no"] == section["per_question_type"]["is it"]
    constants = section["best_constant"]["per_question_type"]
    assert (constants["is it"]["answer"], constants["is it"]["accuracy"]) == ("yes", 66.67)
    assert section["accuracy"] == section["best_constant"]["overall"]


def test_a_coin_scores_chance_within_its_interval(data, tmp_path):
    folder = write_dataset(tmp_path / "many", images=12)
    rng = random.Random(0)
    plan = Options(tasks=("vqa",), files=find_files(folder, "val"), out=tmp_path / "coin.json")
    engine = FakeEngine(lambda request: says(rng.choice(["yes", "no"])))
    section = evaluate(engine, load_data(plan), plan)["tasks"]["vqa"]
    interval = section["per_question_type"]["is it"]["interval"]
    assert interval["low"] <= 50 <= interval["high"]


@pytest.mark.parametrize("batch_size", [1, 100])
def test_batch_size_does_not_change_a_score(run, batch_size):
    def sometimes(request):
        return says(big(image_tag(request) // 20) if image_tag(request) % 40 else "no")

    record, items, engine = run(sometimes, batch_size=batch_size)
    assert engine.batches == ([8, 4] if batch_size == 1 else [12])
    assert record["tasks"]["vqa"]["accuracy"] == 33.33
    assert [item["question_id"] for item in items] == sorted(item["question_id"] for item in items)


def test_failed_items_are_named_and_never_scored(run):
    def breaks_once(request):
        return (
            failed("out of memory") if image_tag(request) == 40 and "big" in prompt_text(request) else oracle(request)
        )

    record, items, _ = run(breaks_once)
    section = record["tasks"]["vqa"]
    assert section["accuracy"] is None
    assert section["per_question_type"] is None
    assert "1 of 12 items failed" in section["reason"]
    assert section["answered_only"]["n"] == 11
    assert section["answered_only"]["accuracy"] == 100.0
    assert failures(record) == ["vqa: 1021: out of memory"]
    (item,) = [i for i in items if i["error"]]
    assert (item["prediction"], item["accuracy"]) == (None, None)


def test_everything_failed(run):
    record, _, _ = run(lambda _: failed(), ("vqa", "caption", "latency"))
    assert record["tasks"]["vqa"]["answered_only"] is None
    assert record["tasks"]["caption"]["metrics"] is None
    assert record["tasks"]["latency"]["levels"][0]["ttft_s"]["mean"] is None
    assert len(failures(record)) == 12 + 6 + 2


def test_an_image_that_cannot_be_read_is_a_failed_item(run, data):
    (data / "images" / "val" / "000000000101.png").write_bytes(b"no image")
    record, _, _ = run(oracle)
    assert [error["id"] for error in record["tasks"]["vqa"]["errors"]] == [1010, 1011]
    assert "000000000101.png" in record["tasks"]["vqa"]["errors"][0]["error"]


def test_limit_is_not_final(run):
    record, items, _ = run(oracle, limit=3)
    assert not record["final"]
    assert len(items) == record["tasks"]["vqa"]["n"] == 3
    assert record["tasks"]["vqa"]["n_total"] == 12


def test_all_tasks_in_one_record(run):
    record, _, _ = run(oracle, ("vqa", "caption", "latency"))
    assert list(record["tasks"]) == ["vqa", "caption", "latency"]
    assert [level["concurrency"] for level in record["tasks"]["latency"]["levels"]] == [1, 2]
    for section in record["tasks"].values():
        assert section["definitions"]
    assert len(record["samples"]) == 6
    assert all(src.startswith("data:image/jpeg;base64,") for src in record["samples"].values())


def test_an_engine_that_does_not_tell_how_full_it_was(run):
    record, _, _ = run(oracle)
    speed = record["tasks"]["vqa"]["speed"]
    assert speed["full_batch_share"] is speed["steady_full_batch_share"] is None
    assert "fake engine does not tell" in speed["full_batch_reason"]
    assert speed["asking_s"] > 0


def test_answers_cut_short_are_counted(run):
    record, _, _ = run(lambda request: oracle(request).__class__(text="x", finish_reason="length"))
    assert record["tasks"]["vqa"]["cut_at_max_tokens"] == 12


def test_a_record_names_its_circumstances(run):
    record, _, _ = run(oracle, name="mine", seed=7)
    assert record["model"]["name"] == "mine"
    assert record["model"]["hash"] is None
    assert record["model"]["hash_reason"]
    assert record["seed"] == 7
    assert record["engine"] == {"name": "fake", "dtype": "none", "device": "none"}
    assert record["environment"]["packages"]["numpy"]
    assert set(record["tasks"]["vqa"]["data"]["files"]) == {"vqa_val_questions.json", "vqa_val_annotations.json"}


def test_half_a_surrogate_pair_in_an_annotation_costs_nothing(run, data):
    file = data / "vqa_val_annotations.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["answers"][3]["answer"] = "dog \ud83d"
    document["annotations"][0]["question_type"] = "what \ud83d"
    file.write_text(json.dumps(document))
    record, items, _ = run(oracle)
    assert items[0]["answers"][3] == "dog \ud83d"
    assert "what \ud83d" in record["tasks"]["vqa"]["per_question_type"]


def test_one_answer_a_question_is_remarked_on(run, data):
    file = data / "vqa_val_annotations.json"
    document = json.loads(file.read_text())
    for annotation in document["annotations"]:
        annotation["answers"] = annotation["answers"][:1]
    file.write_text(json.dumps(document))
    record, *_ = run(oracle)
    assert (record["tasks"]["vqa"]["accuracy"], record["tasks"]["vqa"]["exact_match"]) == (0.0, 100.0)
    assert any("nothing can score above 0.00 % here" in line for line in remarks([record]))


def test_files_of_one_name_both_count(data, tmp_path):
    for kind in ("questions", "annotations"):
        (tmp_path / kind).mkdir()
        (data / f"vqa_val_{kind}.json").rename(tmp_path / kind / "val.json")
    found = load_vqa(
        find_files(
            data, "val", questions=tmp_path / "questions/val.json", annotations=tmp_path / "annotations/val.json"
        )
    )
    assert list(found.fingerprint["files"]) == ["val.json", "val.json #2"]
    assert len(set(found.fingerprint["files"].values())) == 2


def test_items_that_were_changed_are_refused(run, tmp_path):
    record, _, _ = run(oracle)
    beside = tmp_path / record["items"]["file"]
    beside.write_text(beside.read_text().replace("red", "blue"))
    with pytest.raises(DataError, match="content was changed"):
        load_items(tmp_path / "out.json", record)
    beside.unlink()
    with pytest.raises(DataError, match="missing"):
        load_items(tmp_path / "out.json", record)


SHAPE = {
    "format": "nmm-serve/evaluation/1", "model": no_checkpoint("a", "a", "a test"), "engine": {"name": "torch"},
    "environment": {"packages": {}, "cpu": "x", "cpu_count": 1, "gpus": []}, "tasks": {}, "created": "", "final": True,
}  # fmt: skip
VQA = dict.fromkeys(("definitions", "n", "failed", "best_constant", "question_only"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not an evaluation record"),
        ("[1]", "is not an evaluation record"),
        ('{"format": "other/1"}', "'other/1' document"),
        ('{"format": "nmm-serve/evaluation/1"}', "damaged record: it lacks model"),
        (json.dumps(SHAPE | {"model": 3}), "damaged record: 'model' is no section"),
        (json.dumps(SHAPE | {"engine": {}}), "damaged record: 'engine' has no 'name'"),
        (json.dumps(SHAPE | {"model": {"name": "a"}}), "damaged record: 'model' has no 'source'"),
        (json.dumps(SHAPE | {"environment": {}}), "damaged record: 'environment' has no 'packages'"),
        (json.dumps(SHAPE | {"tasks": {"vqa": 3}}), "damaged record: task 'vqa' is no section"),
        (json.dumps(SHAPE | {"tasks": {"vqa": {}}}), "damaged record: task 'vqa' has no 'definitions'"),
        (json.dumps(SHAPE | {"tasks": {"vqa": VQA}}), "damaged record: task 'vqa' has no 'data'"),
        (json.dumps(SHAPE | {"tasks": {"vqa": VQA | {"data": {}}}}), "'data' of task 'vqa' has no 'files'"),
        (json.dumps(SHAPE | {"tasks": {"latency": {"n": 1}}}), "damaged record: task 'latency' has no 'definitions'"),
        ("", "is not JSON"),
    ],
)
def test_a_file_that_is_no_record(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_record(path)


def test_requests_without_pictures_say_where_to_take_them(tmp_path):
    with pytest.raises(DataError, match="give --data, .*or time checkpoints with --compare"):
        load_data(Options(tasks=("latency",), files=Files(), out=tmp_path / "x.json"))


def test_a_full_disk_leaves_no_half_record(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_record({"a": 1}, [], tmp_path / "r.json")
    assert caught.value.filename
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record({"a": float("nan")}, [], tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()
