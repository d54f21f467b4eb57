"""What was answered is not asked again, and nothing else is taken for it."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict

import pytest
from eval_fakes import FakeEngine, failed, image_tag, oracle, says, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import empty_checkpoint

pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")

from nmm_serve.engines.base import Output, SamplingParams
from nmm_serve.errors import DataError
from nmm_serve.evals import answers as module
from nmm_serve.evals.answers import Answers, identity
from nmm_serve.evals.datasets import find_files
from nmm_serve.evals.records import blank_record, load_items, load_record, no_checkpoint, write_record
from nmm_serve.evals.run import Options, evaluate, failures, load_data


def described(folder, **settings):
    engine = FakeEngine(oracle, str(folder))
    engine.describe = lambda: {"engine": "fake", "dtype": "float32", "torch": "2", "batch_size": 16} | settings
    return engine


@pytest.fixture
def world(tmp_path):
    """Everything that an answer hangs on; `key(**changes)` gives the key of one item in it."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        (model / name).write_text(name)
    (model / "run.json").write_text("{}")
    (tmp_path / "image.png").write_bytes(b"pixels")

    def key(
        task="vqa", version=1, text="What is it?", image="image.png", sampling=None, seed=0, engine=None,
        kind="generate",
    ):  # fmt: skip
        who = identity(described(model, **(engine or {})), seed)
        with Answers(tmp_path, task, version, who) as kept:
            sampling = asdict(sampling or SamplingParams(max_tokens=16))
            return kept.key(kind, {"text": text, "decoding": sampling}, [tmp_path / image])

    return key, tmp_path


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"]
)
def test_another_file_of_the_checkpoint_is_a_miss(world, file):
    key, folder = world
    before = key()
    (folder / "model" / file).write_text("changed")
    assert key() != before


def test_what_evaluations_leave_beside_the_weights_is_no_miss(world):
    key, folder = world
    before = key()
    record = blank_record(no_checkpoint("m", "here", "a test"), {"name": "fake"}, seed=0)
    write_record(record, [{"task": "vqa"}], folder / "model/vqa.json")
    for name in ("report.html", "answers/vqa-0.jsonl", "notes.md", "loss.png"):
        (folder / "model" / name).parent.mkdir(exist_ok=True)
        (folder / "model" / name).write_text("x")
    assert key() == before
    (folder / "model" / "generation_config.json").write_text('{"format": "else"}')
    assert key() != before


@pytest.mark.parametrize(
    "change",
    [
        {"task": "caption"},
        {"kind": "loglikelihood"},
        {"version": 2},
        {"text": "What is that?"},
        {"seed": 1},
        {"sampling": SamplingParams(max_tokens=17)},
        {"sampling": SamplingParams(max_tokens=16, temperature=0.5)},
        {"sampling": SamplingParams(max_tokens=16, stop=("\n",))},
        {"sampling": SamplingParams(max_tokens=16, seed=3)},
        {"engine": {"dtype": "bfloat16"}},
        {"engine": {"torch": "3"}},
        {"engine": {"quantization": "int8"}},
    ],
    ids=str,
)
def test_another_way_of_asking_is_a_miss(world, change):
    key, _ = world
    assert key(**change) != key()


def test_another_template_or_version_of_ours_is_a_miss(world, monkeypatch):
    key, _ = world
    before = key()
    monkeypatch.setattr(module, "CHAT_TEMPLATE", "another")
    assert key() != before
    monkeypatch.undo()
    monkeypatch.setattr(module, "__version__", "0.0.0")
    assert key() != before


def test_other_image_bytes_are_a_miss_and_another_file_name_is_not(world):
    key, folder = world
    before = key()
    (folder / "copy.png").write_bytes(b"pixels")
    assert key(image="copy.png") == before
    (folder / "image.png").write_bytes(b"pixelz")
    assert key() != before


def test_what_changes_no_answer_is_a_hit(world):
    key, folder = world
    before = key()
    (folder / "model" / "run.json").write_text('{"seconds": 1}')
    assert key(engine={"batch_size": 1, "threads": 8}) == before


def test_the_batch_size_counts_where_answers_depend_on_it(world):
    """Else `--batch-size 1` of a quantised export would be given what a batch of 16 said, and hide the difference."""
    key, _ = world
    int8 = {"dtype": "int8", "answers_depend_on_batch": True}
    assert key(engine=int8 | {"batch_size": 1}) != key(engine=int8 | {"batch_size": 16})
    assert key(engine=int8 | {"threads": 1}) == key(engine=int8 | {"threads": 8})


def test_the_weights_behind_a_url_are_not_known(tmp_path):
    assert identity(FakeEngine(oracle, "http://127.0.0.1:8000/v1"), 0) is None
    with Answers(tmp_path, "vqa", 1, None) as kept:
        assert kept.key("generate", {"text": "text"}, [tmp_path / "image.png"]) is None
        kept.add([(None, 1, says("yes"))])
    assert list(tmp_path.iterdir()) == []


def test_two_evaluations_do_not_write_one_file(tmp_path):
    with Answers(tmp_path, "vqa", 1, {"a": 1}):
        with Answers(tmp_path, "caption", 1, {"a": 1}), Answers(tmp_path, "vqa", 1, {"a": 2}):
            pass
        with pytest.raises(DataError, match="another evaluation"):
            Answers(tmp_path, "vqa", 1, {"a": 1})
    with Answers(tmp_path, "vqa", 1, {"a": 1}):
        pass


TEXTS = ["yes", "no\n", "", "a\r\u2028b", '"{}\\', "日本", "\ud83d", "x" * 500]


@settings(deadline=None)
@given(cut=st.integers(0, 4000), tail=st.binary(max_size=40))
def test_a_file_cut_anywhere_loses_no_more_than_the_cut(tmp_path_factory, cut, tail):
    folder = tmp_path_factory.mktemp("cut")
    outputs = [Output(text=text, num_tokens=i) for i, text in enumerate(TEXTS)]
    with Answers(folder, "vqa", 1, {"m": 1}) as kept:
        kept.add([(f"key{i}", i, output) for i, output in enumerate(outputs)])
        path = kept.path
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + tail.replace(b"\n", b""))
    with Answers(folder, "vqa", 1, {"m": 1}) as kept:
        back = [kept.get(f"key{i}") for i in range(len(outputs))]
        lines = whole[:cut].count(b"\n")
        assert back[:lines] == outputs[:lines]
        assert set(back[lines + 1 :]) <= {None}
        kept.add([(f"key{i}", i, output) for i, output in enumerate(outputs)])
    with Answers(folder, "vqa", 1, {"m": 1}) as kept:
        assert [kept.get(f"key{i}") for i in range(len(outputs))] == outputs
    keys = [json.loads(line)["key"] for line in path.read_bytes().split(b"\n") if line.startswith(b'{"key')]
    assert len(set(keys)) == len(outputs)


@pytest.mark.parametrize("line", [b"[]", b"{}", b"null", b'{"key": "key0", "output": {"text": 3}}', b"\xff\xfe", b"3"])
def test_a_line_that_is_no_answer_is_passed_over(tmp_path, line):
    with Answers(tmp_path, "vqa", 1, {"m": 1}) as kept:
        path = kept.path
    path.write_bytes(line + b"\n")
    with Answers(tmp_path, "vqa", 1, {"m": 1}) as kept:
        assert kept.get("key0") is None


@pytest.fixture
def run(tmp_path):
    files = find_files(write_dataset(tmp_path / "data"), "val")
    model = empty_checkpoint(tmp_path / "model")

    def run(answer, folder="out", **options):
        asked = []

        def count(request):
            asked.append(request)
            return answer(request)

        plan = Options(tasks=("vqa",), files=files, out=tmp_path / folder / "r.json", **options)
        record = evaluate(FakeEngine(count, str(model)), load_data(plan), plan)
        return record, load_items(plan.out, record), len(asked)

    return run


class Killed(Exception):
    pass


def test_a_run_that_broke_off_goes_on(run):
    left = [9]

    def breaks_off(request):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return oracle(request)

    with pytest.raises(Killed):
        run(breaks_off)
    record, items, asked = run(oracle)
    assert asked == 4  # a chunk of eight was kept
    assert record["tasks"]["vqa"]["answers_reused"] == 8
    fresh, fresh_items, all_asked = run(oracle, "elsewhere")
    assert all_asked == 12
    assert items == fresh_items
    same = [
        {k: v for k, v in r["tasks"]["vqa"].items() if k not in ("answers_reused", "speed")} for r in (record, fresh)
    ]
    assert same[0] == same[1]
    assert run(oracle)[2] == 0


def test_a_failed_item_is_named_and_asked_again(run):
    broken, items, _ = run(lambda r: failed("boom") if image_tag(r) == 20 else oracle(r))
    assert len(failures(broken)) == 2
    assert broken["tasks"]["vqa"]["accuracy"] is None
    assert sum(item["error"] is not None for item in items) == 2
    record, _, asked = run(oracle)
    assert asked == 2
    assert record["tasks"]["vqa"]["accuracy"] == 100
    assert failures(record) == []


def test_a_limit_shares_its_answers_with_the_whole(run):
    assert run(oracle, limit=4)[2] == 4
    assert run(oracle)[2] == 8
    assert run(oracle, limit=6)[2] == 0


KILLED_RUNS = textwrap.dedent(
    """
    import os, random, signal, sys, time
    import torch
    from pathlib import Path
    torch.set_num_threads(1)
    from nmm_serve.cli.eval import main
    import nmm_serve.evals.run
    from nmm_serve.engines.torch import TorchEngine
    TorchEngine(sys.argv[sys.argv.index("--model") + 1]).close()
    rng, kills = random.Random(0), 0

    def start(out):
        child = os.fork()
        if child == 0:
            try:
                main([*sys.argv[1:], "-o", out])
            except SystemExit as end:
                os._exit(end.code or 0)
            finally:
                os._exit(3)
        return child

    def lines():
        return sum(path.read_bytes().count(b"\\n") for path in Path("killed/answers").glob("*.jsonl"))

    for _ in range(5):
        child, enough, ended = start("killed/r.json"), lines() + rng.choice([0, 1]), 0
        while lines() < enough and not ended:
            ended = os.waitpid(child, os.WNOHANG)[0]
            time.sleep(0.002)
        if ended:
            break
        time.sleep(rng.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    for out in ("killed/r.json", "whole/r.json"):
        assert os.waitpid(start(out), 0)[1] == 0
    print(kills)
    """
)
"""The command in forked children, so that not each of them pays for importing what it needs."""


def test_kills_at_random_points_change_nothing(tmp_path):
    from tiny_checkpoint import make_checkpoint

    model = make_checkpoint(tmp_path / "model")
    data = write_dataset(tmp_path / "data", images=12)
    command = ["vqa", "--model", model, "--data", data, "--batch-size", "1"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", KILLED_RUNS, *map(str, command)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 2
    for name in ("killed", "whole"):
        (kept,) = (tmp_path / name / "answers").glob("*.jsonl")
        keys = [json.loads(line)["key"] for line in kept.read_text().splitlines()]
        assert len(keys) == len(set(keys)) == 24
    killed, whole = (load_record(tmp_path / name / "r.json")["tasks"]["vqa"] for name in ("killed", "whole"))
    assert (killed.pop("answers_reused") > 0, whole.pop("answers_reused")) == (True, 0)
    assert killed.pop("speed").keys() == whole.pop("speed").keys()
    assert killed == whole
    assert (tmp_path / "killed/r.items.jsonl").read_text() == (tmp_path / "whole/r.items.jsonl").read_text()
