"""nmm-eval from the command line, with engines of known answers in place of models."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from eval_fakes import FakeEngine, failed, image_tag, oracle, write_dataset

pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")

import nmm_serve.evals.run
from nmm_serve.cli.eval import main
from nmm_serve.errors import EngineError
from nmm_serve.evals import caption
from nmm_serve.evals.tokenizer import FallbackTokenizer


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caption, "open_tokenizer", FallbackTokenizer)
    return write_dataset(tmp_path / "data")


@pytest.fixture
def engine(monkeypatch):
    """Opening any model gives the oracle; the opened engines are kept."""
    opened = []

    def open_engine(model, engine=None, **options):
        opened.append(FakeEngine(oracle, model))
        return opened[-1]

    monkeypatch.setattr(nmm_serve.evals.run, "open_engine", open_engine)
    return opened


@pytest.fixture
def broken_engine(monkeypatch):
    fake = FakeEngine(lambda r: failed("boom") if image_tag(r) == 20 else oracle(r))
    monkeypatch.setattr(nmm_serve.evals.run, "open_engine", lambda *_args, **_options: fake)
    return fake


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


QUICK = ("--requests", 2, "--warmup", 0, "--concurrency", 1, "--output-tokens", 3)


def test_vqa_prints_a_table_and_writes_a_record(data, engine, tmp_path):
    result = run("vqa", "--model", "m", "--data", data)
    assert result.exit_code == 0, result.stderr
    assert "100.00" in result.stdout
    record = json.loads((tmp_path / "m-vqa.json").read_text())
    assert record["tasks"]["vqa"]["accuracy"] == 100
    assert engine[0].closed


def test_a_record_is_not_overwritten_by_another_model_of_that_name(data, engine, tmp_path):
    assert run("vqa", "--model", "early/final", "--data", data).exit_code == 0
    assert run("vqa", "--model", tmp_path / "early" / "final", "--data", data).exit_code == 0  # the same one, again
    result = run("vqa", "--model", "late/final", "--data", data)
    assert result.exit_code == 2
    assert "final-vqa.json is the record of" in result.stderr
    assert "early/final" in json.loads((tmp_path / "final-vqa.json").read_text())["model"]["source"]
    assert run("vqa", "--model", "late/final", "--name", "late", "--data", data).exit_code == 0
    assert run("vqa", "--model", "late/final", "--data", data, "-o", "final-vqa.json").exit_code == 0


def test_all_is_one_record_from_one_engine(data, engine, tmp_path):
    result = run("all", "--model", "some/ckpt", "--data", data, "-o", "r/all.json", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert len(engine) == 1
    tasks = json.loads((tmp_path / "r" / "all.json").read_text())["tasks"]
    assert list(tasks) == ["vqa", "caption", "latency", "text"]
    assert set(tasks["text"]["left_out"]) == {"nmm_perplexity"}
    assert "nmm_perplexity left out" in result.stderr
    assert 0 < tasks["text"]["tasks"]["nmm_story"]["metrics"]["acc"] < 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (EngineError("the engine died"), "the engine died"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
    ],
    ids=["our error", "torch's own"],
)
def test_all_keeps_what_was_finished_when_the_engine_breaks(data, monkeypatch, tmp_path, error, told):
    class Broken(FakeEngine):
        def loglikelihood(self, requests, progress=None):
            raise error

    monkeypatch.setattr(nmm_serve.evals.run, "open_engine", lambda model, *_args, **_options: Broken(oracle, model))
    result = run("all", "--model", "m", "--data", data, "-o", "all.json", *QUICK)
    assert result.exit_code == 1
    assert f"text: not finished: {told}" in result.stderr.splitlines()[-1]
    record = json.loads((tmp_path / "all.json").read_text())
    assert list(record["tasks"]) == ["vqa", "caption", "latency"]
    assert record["tasks"]["vqa"]["accuracy"] == 100
    assert record["unfinished"] == {"text": told}
    assert record["final"] is False


def test_text_prints_its_scores_and_writes_results(data, engine, tmp_path):
    result = run(
        "text", "--model", "m", "--tasks", "nmm_story,nmm_arithmetic", "--limit", 5, "--output-dir", "lm",
        "--log-samples", "--gen-kwargs", "max_gen_toks=3",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "nmm_story" in result.stdout
    section = json.loads((tmp_path / "m-text.json").read_text())["tasks"]["text"]
    assert section["gen_kwargs"] == {"max_gen_toks": 3}
    assert section["tasks"]["nmm_arithmetic"]["metrics"] == {"exact_match": 0.0}
    assert len(list((tmp_path / "lm").rglob("samples_*.jsonl"))) == 2


def test_text_says_what_is_wrong_with_its_options(data, engine):
    assert run("text", "--model", "m", "--log-samples").exit_code == 2
    result = run("text", "--model", "m", "--tasks", "gone.yaml")
    assert result.exit_code == 1
    assert "gone.yaml does not exist" in result.stderr
    assert not engine


@pytest.mark.parametrize("task", ["vqa", "caption", "latency"])
def test_json_is_one_document_on_stdout(data, engine, task):
    quick = QUICK if task == "latency" else ()
    result = run(task, "--model", "m", "--data", data, "--json", *quick)
    assert result.exit_code == 0, result.stderr
    assert list(json.loads(result.stdout)["tasks"]) == [task]


def test_what_an_engine_prints_stays_off_stdout(data, monkeypatch, capfd):
    def noisy(request):
        print("from Python")
        os.write(1, b"from C")
        return oracle(request)

    monkeypatch.setattr(nmm_serve.evals.run, "open_engine", lambda *_args, **_options: FakeEngine(noisy))
    result = run("vqa", "--model", "m", "--data", data, "--json")
    json.loads(result.stdout)
    out, err = capfd.readouterr()
    assert out == ""
    assert "from C" in err


def test_failed_items_exit_1_and_are_named_and_the_record_is_kept(data, broken_engine, tmp_path):
    result = run("vqa", "--model", "m", "--data", data, "--json")
    assert result.exit_code == 1
    assert "vqa: 1010: boom" in result.stderr
    assert json.loads(result.stdout)["tasks"]["vqa"]["accuracy"] is None
    assert (tmp_path / "m-vqa.json").exists()
    assert broken_engine.closed


def test_wrong_data_is_found_before_the_model_is_loaded(data, engine):
    (data / "images" / "val" / "000000000101.png").unlink()
    result = run("vqa", "--model", "m", "--data", data)
    assert result.exit_code == 1
    assert "000000000101.png" in result.stderr
    assert engine == []


def test_explicit_files(data, engine):
    result = run(
        "vqa", "--model", "m", "--images", data / "images" / "val",
        "--questions", data / "vqa_val_questions.json", "--annotations", data / "vqa_val_annotations.json", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr


def test_limit_is_said_to_be_not_final(data, engine):
    result = run("vqa", "--model", "m", "--data", data, "--limit", 2)
    assert result.exit_code == 0
    assert "not final" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("vqa", "--model", "m"), "no questions file"),
        (("caption", "--model", "m"), "no captions file"),
        (("vqa", "--model", "m", "--data", "gone"), "gone does not exist"),
        (("table", "gone.json"), "gone.json does not exist"),
        (("vqa", "--model", "m", "--data", "data", "-o", "data"), "data is a folder"),
    ],
)
def test_what_is_missing_is_named(data, engine, args, message):
    result = run(*args)
    assert result.exit_code == 1
    assert message in result.stderr


def test_unknown_engine(data):
    result = run("vqa", "--model", "m", "--data", data, "--engine", "vlm")
    assert result.exit_code == 1
    assert "Did you mean 'vllm'?" in result.stderr


def test_table_and_report_of_several_records(data, engine, tmp_path):
    for name in ("a", "b"):
        assert run("all", "--model", name, "--data", data, "-o", f"{name}.json", *QUICK).exit_code == 0
    table = run("table", "a.json", "b.json", "--json")
    assert [row["model"] for row in json.loads(table.stdout)["rows"]] == ["a", "b"]
    pytest.importorskip("matplotlib", reason="needs the extra `evals`")
    report = run("report", "a.json", "b.json", "-o", "out.html")
    assert report.exit_code == 0, report.stderr
    assert "</html>" in (tmp_path / "out.html").read_text()


def test_records_of_one_name_are_told_apart_in_rows_and_remarks(data, engine, tmp_path):
    for name in ("a", "b"):
        assert run("vqa", "--model", name, "--name", "final", "--data", data, "--limit", 2, "-o", f"{name}.json")
    table = json.loads(run("table", "a.json", "b.json", "--json").stdout)
    assert [row["model"] for row in table["rows"]] == ["final (fake)", "final (fake) #2"]
    assert [line.partition(":")[0] for line in table["notes"]] == ["final (fake)", "final (fake) #2"]


def test_compare_prints_tables_or_one_document_and_writes_it(data, engine, tmp_path):
    for name in ("a", "b"):
        assert run("vqa", "--model", name, "--data", data, "-o", f"{name}.json").exit_code == 0
    tables = run("compare", "a.json", "b.json")
    assert tables.exit_code == 0, tables.stderr
    assert "cannot tell" in tables.stdout
    document = run("compare", "a.json", "b.json", "--json", "-o", "c.json")
    assert document.exit_code == 0, document.stderr
    assert json.loads(document.stdout) == json.loads((tmp_path / "c.json").read_text())
    assert next(iter(json.loads(document.stdout)["metrics"])) == "VQA accuracy %"
    alone = run("compare", "a.json")
    assert (alone.exit_code, alone.stdout) == (1, "")
    assert "two or more" in alone.stderr


def test_help_does_not_load_torch():
    code = (
        "import sys\nfrom nmm_serve.cli.eval import main\n"
        "try:\n    main(['vqa', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'pycocoevalcap', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout
