"""The table and the page: what they show, and that they need nothing from outside."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from eval_fakes import FakeEngine, failed, image_tag, oracle, says, write_dataset

pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")
pytest.importorskip("matplotlib", reason="needs the extra `evals`")

from nmm_serve.errors import DataError
from nmm_serve.evals import caption, plots
from nmm_serve.evals.datasets import find_files
from nmm_serve.evals.latency import Load
from nmm_serve.evals.records import blank_record, load_record, no_checkpoint, write_record
from nmm_serve.evals.report import write_report
from nmm_serve.evals.routing import DEFINITIONS, summarise
from nmm_serve.evals.run import Options, evaluate, load_data
from nmm_serve.evals.table import comparison, join, joined, remarks
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


def test_answers_to_another_data_set_are_kept_apart(make, page, tmp_path):
    """Its questions have the same ids."""
    other = write_dataset(tmp_path / "other")
    questions = other / "vqa_val_questions.json"
    questions.write_text(questions.read_text().replace("What colour", "How many dogs"))
    here = make("here", tasks=("vqa", "caption"))
    there = make("there", lambda _: says("seven"), ("vqa",), find_files(other, "val"))
    text = page(here, there)
    assert "How many dogs" in text
    cards = re.findall(r'data-verdict="(\w+)".*?class="question">(.*?)</div>', text, re.S)
    assert cards
    assert not any(verdict == "changed" for verdict, _ in cards)


def test_half_a_surrogate_pair_does_not_stop_the_page(make, page, tmp_path):
    data = write_dataset(tmp_path / "odd")
    file = data / "vqa_val_annotations.json"
    file.write_text(file.read_text().replace('"answer": "red"', '"answer": "red\\ud83d"'))
    assert "red?" in page(make("caf\udce9", files=find_files(data, "val")))


def test_records_without_some_tasks(make, page):
    text = page(make("only vqa", tasks=("vqa",)), make("only latency", tasks=("latency",)))
    assert "only vqa" in text
    assert "<h2>Captions</h2>" not in text


def test_a_model_has_one_colour_and_its_name_takes_no_room_from_the_panels(make):
    """In every plot, whatever the others hold; names below bars or beside points made panels narrow."""
    long = "photo-grid-late-flops-seed2-step-20000-sft (vllm)"
    records = [load_record(path) for path in (make("first", tasks=("latency",)), make(long), make("last"))]
    first, second, third = "#0072b2", "#e69f00", "#009e73"
    for plot in (plots.caption_metrics, plots.vqa_by_question_type, plots.quality_against_latency):
        svg = plot(records).lower()
        assert svg.count(f">{long}<") == 1, "in the legend alone"
        assert (first in svg, second in svg, third in svg) == (False, True, True)
    assert all(colour in plots.latency_bars(records).lower() for colour in (first, second, third))


def test_failures_are_shown_not_scored(make, page):
    path = make("broken", lambda _: failed("out of memory"))
    text = page(path, make("good"))
    assert "12 of 12 items failed" in text
    columns, rows = comparison([load_record(path)])
    titles = [column.title for column in columns]
    assert "VQA acc %" not in titles  # no record fills it
    assert "best const %" in titles
    assert len(rows) == 1


def test_joined_records_keep_their_warnings(make):
    """Answers of both on one machine, times on two."""
    records = []
    for name, machine in (("early", "laptop"), ("late", "server")):
        for task, cpu in (("vqa", "laptop"), ("latency", machine)):
            record = load_record(make(name, tasks=(task,)))
            record["model"] = record["model"] | {"hash": name}
            record["environment"] = record["environment"] | {"cpu": cpu}
            records.append(record)
    records[1]["unfinished"] = {"text": "no data"}
    groups = joined(records)
    assert groups == [[0, 1], [2, 3]]
    lines = remarks([join([records[i] for i in group]) for group in groups])
    assert any("different machines" in line for line in lines)
    assert "early: text: not finished: no data" in lines


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


def test_records_of_one_model_make_one_row(make, page):
    vqa, captions, other = make("m", tasks=("vqa",)), make("m", tasks=("caption",)), make("n", half, tasks=("vqa",))
    for path, known in ((vqa, "abc"), (captions, "abc"), (other, "abd")):
        record = json.loads(path.read_text())
        record["model"]["hash"] = known
        path.write_text(json.dumps(record))
    text = page(vqa, captions, other)
    assert len(re.findall(r'<td data-value="[mn]">', text)) == 2
    assert "#2<" not in text
    again = page(vqa, captions, captions)
    assert "m #2" in again or "m (fake) #2" in again


def test_questions_that_change_between_models_are_told(make, page, tmp_path):
    text = page(make("a", tasks=("vqa",)), make("b", half, tasks=("vqa",)))
    verdicts = re.findall(r'data-verdict="(\w+)"', text)
    assert verdicts.count("right") == verdicts.count("changed") == 6
    assert verdicts.count("wrong") == 0


def test_images_where_models_differ_are_found_on_disk_when_they_are_there(make, page, tmp_path, monkeypatch):
    monkeypatch.setattr("nmm_serve.evals.run.CARRIED", 2)
    records = make("a", tasks=("vqa",)), make("b", half, tasks=("vqa",))
    assert page(*records).count("because the models differ</p>") == 3
    (tmp_path / "data" / "images").rename(tmp_path / "gone")
    text = page(*records)
    assert "because the models differ</p>" not in text
    assert text.count("chosen by hash</p>") == 2


def routing_record(path, name, **section):
    counts = np.array([[[[9, 1], [2, 8]], [[5, 5], [5, 5]]], [[[9, 1], [3, 7]], [[6, 4], [5, 5]]]])
    record = blank_record(no_checkpoint(name, "log", "no checkpoint"), {"name": "none"}, seed=0)
    base = {"definitions": DEFINITIONS, "n": 2, "failed": 0, "errors": []}
    record["tasks"]["routing"] = base | summarise(counts, unit="image") | section
    write_record(record, (), path)
    return path


def test_routing_is_drawn(page, tmp_path):
    history = [{"step": s, "tokens": s, "specialisation": [0.1, None], "max_over_mean": [1, 2]} for s in (1, 2)]
    text = page(
        routing_record(tmp_path / "r.json", HOSTILE), routing_record(tmp_path / "l.json", "run", history=history)
    )
    assert text.count("<svg") == 4
    assert "&lt;script&gt;" in text
    assert "<script>alert" not in text
    assert "a router that ignores modality has specialisation" in text


def test_text_tasks_are_shown(make, page):
    path = make("a", tasks=("vqa",))
    record = json.loads(path.read_text())
    found = {"metrics": {"acc": 0.5, "ppl": None}, "intervals": {"acc": {"low": 0.25, "high": 0.75}, "ppl": None}}
    tasks = {"arithmetic": found | {"higher_is_better": {"acc": True}, "failed": 0}}
    record["tasks"]["text"] = {"definitions": {}, "n": 4, "failed": 0, "errors": [], "tasks": tasks}
    path.write_text(json.dumps(record))
    text = page(path)
    assert "<h2>Text tasks</h2>" in text
    assert "[0.250, 0.750]" in text
    assert "arithmetic acc" not in text, "the first table leaves them to their section"


CLICKS = """
<script>
const cells = (row) => row.cells[0].textContent;
const table = document.querySelector("table.sortable");
const order = () => [...table.tBodies[0].rows].map(cells).join("");
const seen = [order()];
const accuracy = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === "VQA acc %");
for (let i = 0; i < 2; i++) { table.tHead.rows[0].cells[accuracy].querySelector("button").click(); seen.push(order()); }
const shown = () => [...document.querySelectorAll(".qa")].filter(q => !q.closest("[hidden]")).length;
for (const value of ["changed", "right", "wrong", "wrong:b", "caption", "all"]) {
  const filter = document.getElementById("filter");
  filter.value = value;
  filter.dispatchEvent(new Event("change"));
  seen.push(shown());
}
document.title = JSON.stringify(seen);
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the PATH")
def test_sorting_and_filtering_in_a_browser(make, page, tmp_path):
    text = page(make("b", half, tasks=("vqa", "caption")), make("a", tasks=("vqa", "caption")))
    (tmp_path / "clicks.html").write_text(text.replace("</body>", CLICKS))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"file://{tmp_path}/clicks.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = html.unescape(re.search(r"<title>(.*?)</title>", done.stdout).group(1))
    assert json.loads(title) == ["ba", "ab", "ba", 6, 6, 0, 6, 6, 18]
