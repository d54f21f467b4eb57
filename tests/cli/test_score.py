"""nmm-eval score from the command line: official files in, one JSON document out, one clear error otherwise."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from eval_fakes import put_java, references, write_dataset

pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")

from nmm_serve.cli.eval import main
from nmm_serve.evals import caption, spice
from nmm_serve.evals.tokenizer import FallbackTokenizer


@pytest.fixture
def vqa_files(tmp_path, monkeypatch):
    """Options that name a VQA set of six images and its results: all right but the last `big?`."""
    monkeypatch.chdir(tmp_path)
    data = write_dataset(tmp_path / "data")
    annotations = json.loads((data / "vqa_val_annotations.json").read_text())["annotations"]
    results = [{"question_id": a["question_id"], "answer": a["multiple_choice_answer"]} for a in annotations]
    results[-1]["answer"] = "no idea"
    (tmp_path / "R.json").write_text(json.dumps(results[::-1]))
    return (
        "vqa", "--questions", data / "vqa_val_questions.json", "--annotations", data / "vqa_val_annotations.json",
        "--results", "R.json",
    )  # fmt: skip


@pytest.fixture
def caption_files(tmp_path, monkeypatch):
    """Options that name a caption set of six images and its results: the first references."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caption, "open_tokenizer", FallbackTokenizer)
    data = write_dataset(tmp_path / "data")
    results = [{"image_id": 100 + i, "caption": references(i)[0]} for i in range(6)]
    (tmp_path / "R.json").write_text(json.dumps(results[::-1]))
    return ("caption", "--annotations", data / "captions_val.json", "--results", "R.json")


def run(*args):
    return CliRunner().invoke(main, ["score", *map(str, args)])


def test_vqa_document(vqa_files):
    result = run(*vqa_files, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    document = json.loads(result.stdout)
    items = document.pop("items")
    assert document == {
        "overall": 91.67,
        "per_question_type": {"what colour": 100.0, "is it": 83.33},
        "per_answer_type": {"other": 100.0, "yes/no": 83.33},
        "exact_match": 91.67,
        "relaxed_accuracy": 91.67,
    }
    assert items[:2] == [{"question_id": 1000, "score": 100.0}, {"question_id": 1001, "score": 100.0}]
    assert items[-1] == {"question_id": 1051, "score": 0.0}


@pytest.mark.parametrize(("kept", "best"), [(1, "0.00"), (3, "66.67"), (4, None)])
def test_too_few_answers_are_said(vqa_files, tmp_path, kept, best):
    file = tmp_path / "data" / "vqa_val_annotations.json"
    document = json.loads(file.read_text())
    for annotation in document["annotations"]:
        annotation["answers"] = annotation["answers"][:kept]
    file.write_text(json.dumps(document))
    result = run(*vqa_files, "--json")
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stderr.split())
    assert said == "" if best is None else f"nothing can score above {best} % here; go by exact match" in said


def test_vqa_table(vqa_files):
    result = run(*vqa_files)
    assert result.exit_code == 0, result.stderr
    assert "91.67" in result.stdout
    assert "question type: is it" in result.stdout
    assert "relaxed accuracy" in result.stdout


def test_caption_document(caption_files):
    result = run(*caption_files, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert list(document["overall"]) == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
    assert document["overall"]["Bleu_4"] == pytest.approx(1)
    assert document["overall"]["METEOR"] is None
    assert list(document["reasons"]) == ["METEOR"]
    assert [item["image_id"] for item in document["items"]] == [100 + i for i in range(6)]
    assert sum(item["CIDEr"] for item in document["items"]) / 6 == pytest.approx(document["overall"]["CIDEr"])
    lines = result.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["METEOR", "tokens", "SPICE"]


def test_caption_table_and_chosen_metrics(caption_files):
    result = run(*caption_files, "--metrics", "cider, ROUGE_L")
    assert result.exit_code == 0, result.stderr
    assert "ROUGE_L" in result.stdout
    assert "1.0000" in result.stdout
    assert "Bleu_1" not in result.stdout
    assert "SPICE" not in result.stderr


@pytest.mark.parametrize(
    ("metrics", "message"), [("CIDER,METEO", "Did you mean 'METEOR'?"), ("SPICE", "nothing is downloaded")]
)
def test_metrics_that_cannot_be_had(caption_files, metrics, message, monkeypatch):
    monkeypatch.setattr(spice, "missing", lambda: "SPICE is left out: nothing is downloaded")
    result = run(*caption_files, "--metrics", metrics, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr


VQA_FAULTS = [
    (lambda r: r[1:], "1 of 12 have no answer (first: 1051)"),
    (lambda r: [], "12 of 12 have no answer"),
    (lambda r: [*r, r[3]], "question_id 1040 occurs twice"),
    (lambda r: [*r, {"question_id": 7, "answer": "x"}], "1 are not annotated (first: 7)"),
    (lambda r: [{**x, "question_id": str(x["question_id"])} for x in r], "12 are not annotated (first: '1051')"),
    (lambda r: [{**x, "question_id": [1]} for x in r], "results[0].question_id is [1]; expected an integer"),
    (lambda r: [{**x, "question_id": True} for x in r], "question_id is True; expected an integer"),
    (lambda r: [{**r[0], "answer": 3}, *r[1:]], "the answer of 1051 is 3; expected text"),
    (lambda r: [{**r[0], "answer": None}, *r[1:]], "the answer of 1051 is None; expected text"),
    (lambda r: [{"question_id": 1051}, *r[1:]], "results[0] lacks answer"),
    (lambda r: ["yes", *r], "results[0] lacks question_id, answer"),
    (lambda r: {"annotations": r}, "expected a list of results"),
    (lambda r: "yes", "expected a list of results"),
]


@pytest.mark.parametrize(("spoil", "message"), VQA_FAULTS)
def test_vqa_results_that_do_not_fit(vqa_files, tmp_path, spoil, message):
    path = tmp_path / "R.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    result = run(*vqa_files, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert "R.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1


CAPTION_FAULTS = [
    (lambda r: r[1:], "1 of 6 have no caption (first: 105)"),
    (lambda r: [*r, r[3]], "image_id 102 occurs twice"),
    (lambda r: [{**r[0], "caption": ["a dog"]}, *r[1:]], "the caption of 105 is ['a dog']; expected text"),
    (lambda r: [{**r[0], "caption": "\ud800"}, *r[1:]], "holds half a surrogate pair"),
    (lambda r: [{"question_id": 1, "answer": "x"}], "results[0] lacks image_id, caption"),
]


@pytest.mark.parametrize(("spoil", "message"), CAPTION_FAULTS)
def test_caption_results_that_do_not_fit(caption_files, tmp_path, spoil, message):
    path = tmp_path / "R.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    result = run(*caption_files, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[1, 2", "is not JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 100_000, "is not JSON that can be read"),
        (b"[%s]" % (b"9" * 5000), "is not JSON that can be read"),
    ],
)
def test_files_that_are_no_json(vqa_files, tmp_path, content, message):
    (tmp_path / "R.json").write_bytes(content)
    result = run(*vqa_files, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert "R.json" in result.stderr


def test_missing_file_and_missing_option(vqa_files):
    assert "gone.json does not exist" in run(*vqa_files[:-1], "gone.json").stderr
    assert run("vqa").exit_code == 2
    assert run("vqq").exit_code == 2


def test_half_a_surrogate_pair_is_an_answer_like_any_other(vqa_files, tmp_path):
    """VQA compares strings; nothing has to be encoded. The document escapes what it cannot."""
    annotations = tmp_path / "data" / "vqa_val_annotations.json"
    annotations.write_text(annotations.read_text().replace('"yes/no"', '"\\ud800"'))
    path = tmp_path / "R.json"
    path.write_text(json.dumps([{**r, "answer": "\ud800"} for r in json.loads(path.read_text())]))
    result = run(*vqa_files, "--json")
    assert result.exit_code == 0, result.stderr
    assert "\ud800" in json.loads(result.stdout)["per_answer_type"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("script", [None, "exit 1", "echo chatter; echo chatter >&2; sleep 0.1; kill -9 $$"])
def test_with_a_broken_java_or_none(caption_files, tmp_path, monkeypatch, script):
    """In a process of its own, so that chatter of child processes would show and a destructor would hang."""
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        put_java(tmp_path, monkeypatch, script)
    code = "import sys; from nmm_serve.cli.eval import main; sys.argv[0] = 'nmm-eval'; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "score", *map(str, caption_files), "--json"],
        capture_output=True, text=True, timeout=100, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["overall"]["METEOR"] is None
    assert "apt install" in document["reasons"]["METEOR"]
    assert document["overall"]["CIDEr"] > 0
    assert "Traceback" not in done.stderr


@pytest.mark.java
def test_real_java_keeps_its_chatter_to_itself(caption_files, tmp_path):
    code = "import sys; from nmm_serve.cli.eval import main; sys.argv[0] = 'nmm-eval'; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "score", *map(str, caption_files), "--json"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["overall"]["METEOR"] == pytest.approx(1)
    assert all(set(item) >= {"METEOR", "CIDEr"} for item in document["items"])
    assert "reasons" not in document
    assert "Untokenizable" not in done.stderr
