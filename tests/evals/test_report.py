"""The table and the page: what they show, and that they need nothing from outside."""

import json
import re

import pytest
from eval_fakes import FakeEngine, failed, image_tag, oracle, says, write_dataset

pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")
pytest.importorskip("matplotlib", reason="needs the extra `evals`")

from nmm_serve.errors import DataError
from nmm_serve.evals import caption
from nmm_serve.evals.datasets import find_files
from nmm_serve.evals.latency import Load
from nmm_serve.evals.records import load_record
from nmm_serve.evals.report import write_report
from nmm_serve.evals.run import Options, evaluate, load_data
from nmm_serve.evals.table import comparison, remarks
from nmm_serve.evals.tokenizer import FallbackTokenizer

HOSTILE = '<script>alert("x")</script> & $\\frac{1}{2}$ \u202e日本'


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write the record of a model; gives its path."""
    monkeypatch.setattr(caption, "open_tokenizer", FallbackTokenizer)
    data = write_dataset(tmp_path / "data")

    def make(name, answer=oracle, tasks=("vqa", "caption", "latency"), files=None, **options):
        load = Load(concurrencies=(1, 2), requests=2, warmup=0, output_tokens=4)
        out = tmp_path / f"{len(list(tmp_path.glob('*.json')))}.json"
        plan = Options(tasks=tasks, files=files or find_files(data, "val"), out=out, name=name, load=load, **options)
        evaluate(FakeEngine(answer), load_data(plan), plan)
        return out

    return make


@pytest.fixture
def page(tmp_path):
    def page(*records):
        out = tmp_path / "report.html"
        write_report(records, out)
        return out.read_text()

    return page


def half(request):
    return oracle(request) if image_tag(request) % 40 else says("purple")


def test_the_page_needs_nothing_from_outside(make, page):
    text = page(make("a"), make("b", half))
    assert "default-src 'none'" in text
    outside = [
        u
        for u in re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", text)
        if not u.startswith(("data:", "#"))
    ]
    assert outside == []


def test_the_page_shows_what_the_records_hold(make, page):
    text = page(make("model-a"), make("model-b", half))
    for shown in ("model-a", "model-b", "100.00", "50.00", "purple", "What colour is it?", "red ×10", "best constant"):
        assert shown in text
    assert text.count("<svg") == 4
    assert text.count("data:image/jpeg;base64,") == 6


def test_untrusted_text_stays_text(make, page):
    text = page(make(HOSTILE, lambda _: says(HOSTILE)))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_ids_of_several_plots_do_not_collide(make, page):
    text = page(make("a"), make("b", half))
    ids = re.findall(r'<(?:clipPath|path|symbol|g)[^>]* id="([^"]+)"', text)
    referenced = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert referenced
    assert all(ids.count(name) == 1 for name in referenced)


def test_two_records_of_one_model_are_told_apart(make, page):
    text = page(make("same"), make("same", half))
    assert "same (fake)" in text
    assert "same (fake) #2" in text


def test_records_without_some_tasks(make, page):
    text = page(make("only vqa", tasks=("vqa",)), make("only latency", tasks=("latency",)))
    assert "only vqa" in text
    assert "<h2>Captions</h2>" not in text


def test_failures_are_shown_not_scored(make, page):
    path = make("broken", lambda _: failed("out of memory"))
    text = page(path, make("good"))
    assert "12 of 12 items failed" in text
    columns, rows = comparison([load_record(path)])
    titles = [column.title for column in columns]
    assert "VQA acc %" not in titles  # no record fills it
    assert "best const %" in titles
    assert len(rows) == 1


def test_remarks_warn_of_what_cannot_be_compared(make, tmp_path):
    other = find_files(write_dataset(tmp_path / "other", images=4), "val")
    records = [load_record(p) for p in (make("a", tasks=("vqa",)), make("b", tasks=("vqa",), files=other))]
    assert any("different data" in line for line in remarks(records))
    limited = load_record(make("c", tasks=("vqa",), limit=2))
    assert any("not final" in line for line in remarks([limited]))
    assert remarks(records[:1]) == []


def test_a_file_that_is_no_record(tmp_path, page):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"questions": []}))
    with pytest.raises(DataError, match="not an evaluation record"):
        page(path)
    assert not (tmp_path / "report.html").exists()


def test_best_cells_are_marked(make, page):
    text = page(make("a"), make("b", half))
    (row_a, row_b) = re.findall(r"<tr><td data-value=\"[ab]\">.*?</tr>", text)
    assert re.search(r'class="best">100\.00', row_a)
    assert 'class="best">50.00' not in row_b


def test_training_curves_are_drawn_from_the_run(make, page):
    path = make("trained", tasks=("vqa",))
    record = json.loads(path.read_text())
    record["model"]["run"] = {
        "history": [{"step": i, "tokens": 100 * i, "flops": 1.0, "loss": 5.0 / i} for i in range(1, 9)],
        "validation": [{"step": 8, "tokens": 800, "loss_vqa": 1.0, "loss_avg": 1.0}],
    }
    path.write_text(json.dumps(record))
    text = page(path)
    assert "<h2>Training</h2>" in text
    assert "validation loss" in text
    record["model"]["run"]["validation"] = []
    path.write_text(json.dumps(record))
    assert "validation loss" not in page(path)
