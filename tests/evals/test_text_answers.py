"""Text tasks that broke off go on: what an engine has told is not asked again, and nothing else is taken for it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

pytest.importorskip("lm_eval", reason="needs the extra `evals`")

from text_fakes import KnownEngine, coin, instance, write_task
from tiny_checkpoint import empty_checkpoint, make_checkpoint

from nmm_serve.engines.base import Request, SamplingParams, Score, ScoreRequest
from nmm_serve.errors import EngineError, PromptError
from nmm_serve.evals.answers import Answers
from nmm_serve.evals.datasets import Files
from nmm_serve.evals.lm_eval_model import NMM
from nmm_serve.evals.records import load_items, load_record
from nmm_serve.evals.run import Options, evaluate, failures, load_data
from nmm_serve.evals.text import TextOptions

DOCS = [{"question": f"case {i}", "choices": ["yes", "no"], "gold": i % 2} for i in range(6)]
RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))


def score_request(context=(1, 2), continuation=(3,), images=()):
    return ScoreRequest(context=list(context), continuation=list(continuation), images=images)


def generation(prompt=(1, 2), images=(), messages=None, **sampling):
    params = SamplingParams(**sampling)
    if messages:
        return Request(messages=messages, images=images, sampling=params)
    return Request(prompt=list(prompt), images=images, sampling=params)


@pytest.fixture
def key(tmp_path):
    def key(request, task="story", version=1.0, ours=1, model="m"):
        with Answers(tmp_path, "text", ours, {"model": model}) as kept:
            return kept.key_of(request, task, version)

    return key


@pytest.mark.parametrize(
    "change",
    [
        {"task": "counting"},
        {"version": 2.0},
        {"ours": 2},
        {"model": "another"},
        {"request": score_request(context=[1, 3])},
        {"request": score_request(context=[1], continuation=[2, 3])},
        {"request": score_request(continuation=[4])},
        {"request": score_request(images=[RED])},
        {"request": score_request(images=[BLUE])},
        {"request": score_request(images=[RED, BLUE])},
        {"request": score_request(images=[BLUE, RED])},
        {"request": generation()},
        {"request": generation(max_tokens=3)},
        {"request": generation(temperature=0.5)},
        {"request": generation(temperature=0.5, seed=1)},
        {"request": generation(stop=(".",))},
        {"request": generation(prompt=[1])},
        {"request": generation(messages=[{"role": "user", "content": "a"}])},
    ],
)
def test_anything_else_is_a_miss(key, change):
    before = key(score_request(images=[Image.new("RGB", (8, 8), "white")]))
    plain = key(score_request())
    asked = {"request": score_request()} | change
    assert key(**asked) not in (plain, before)
    assert key(**asked) == key(**asked)


def test_the_pixels_count_and_not_the_object(key):
    assert key(score_request(images=[RED])) == key(score_request(images=[RED.copy()]))
    palette = RED.convert("P")
    assert key(score_request(images=[palette])) == key(score_request(images=[RED]))
    assert key(score_request(images=[RED.resize((4, 16))])) != key(score_request(images=[RED]))


def test_scores_come_back_to_the_last_digit_and_a_half_line_is_cut_off(tmp_path):
    scores = {f"key{i}": Score(logprob=-1 / (3 + i), is_greedy=bool(i % 2), num_tokens=i) for i in range(3)}
    with Answers(tmp_path, "text", 1, {}) as kept:
        kept.add((key, key, score) for key, score in scores.items())
        kept.add([("failed", "failed", PromptError("too long"))])
        path = kept.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with Answers(tmp_path, "text", 1, {}) as kept:
        assert [kept.get(key) for key in (*scores, "failed")] == [scores["key0"], scores["key1"], None, None]
        kept.add([("key2", "key2", scores["key2"])])
    assert path.read_bytes() == whole


class Breaks(KnownEngine):
    """Of a checkpoint on disk, so that its answers are kept; breaks after `calls` batches."""

    def __init__(self, model, calls=10**6):
        super().__init__(coin, says=lambda context: f"said {len(context)}", model=str(model))
        self.calls = calls

    def _ask(self, way, requests, progress):
        if self.calls == 0:
            raise EngineError("the engine died")
        self.calls -= 1
        return way(requests, progress)

    def loglikelihood(self, requests, progress=None):
        return self._ask(super().loglikelihood, requests, progress)

    def generate(self, requests, progress=None):
        return self._ask(super().generate, requests, progress)


@pytest.fixture
def run(tmp_path):
    model = empty_checkpoint(tmp_path / "model")
    mine = write_task(tmp_path / "mine", "choose", DOCS)
    write_task(
        mine, "say", DOCS, output_type="generate_until", doc_to_target="{{choices[0]}}", doc_to_choice=None,
        metric_list=[{"metric": "exact_match"}], generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
    )  # fmt: skip
    long = [{"question": f"{'red ' * 1200}{i}"} for i in range(2)]  # several windows each
    write_task(
        mine, "whole", long, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="question",
        doc_to_choice=None, metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip

    def run(engine=None, folder="out", measured=None):
        engine = engine or Breaks(model)
        plan = Options(
            tasks=("text",), files=Files(split=""), out=tmp_path / folder / "r.json", chunk_size=4,
            text=TextOptions(tasks=("choose", "say", "whole"), include_path=(mine,)),
        )  # fmt: skip
        record = evaluate(engine, load_data(plan), plan, measured=measured)
        return record, load_items(plan.out, record), engine.asked

    run.model = model
    return run


def test_broken_off_text_tasks_go_on_and_ask_nothing_twice(run):
    whole, items, all_asked = run(folder="whole")
    asked = []
    for calls in (2, 3):
        engine = Breaks(run.model, calls)
        with pytest.raises(EngineError, match="died"):
            run(engine)
        asked += engine.asked
    record, found, rest = run()
    section, expected = record["tasks"]["text"], whole["tasks"]["text"]
    assert len(asked) + len(rest) == len(all_asked) == expected["requests"]
    assert len({repr(r) for r in [*asked, *rest]}) == len({repr(r) for r in all_asked})
    assert section.pop("answers_reused") == len(asked) > 0
    assert expected.pop("answers_reused") == 0
    assert (section, found) == (expected, items)
    assert run()[2] == []


def test_a_broken_engine_does_not_lose_what_was_finished(run):
    engine = Breaks(run.model, 1)
    record, items, _ = run(engine, measured={"routing": {"complete": True}})
    assert record["unfinished"] == {"text": "the engine died"}
    assert list(record["tasks"]) == ["routing"]
    assert not record["final"]
    assert items == []
    assert failures(record) == ["text: not finished: the engine died"]


def test_nothing_is_kept_of_a_model_of_unknown_weights(run, tmp_path):
    run(Breaks("http://127.0.0.1:8000/v1"))
    assert not (tmp_path / "out" / "answers").exists()


def test_failed_requests_are_not_kept(tmp_path):
    """One prompt of a batch is refused; the others are kept."""

    class Refuses(KnownEngine):
        def loglikelihood(self, requests, progress=None):
            if any("bad" in self.words(r.context) for r in requests):
                raise PromptError("refused")
            return super().loglikelihood(requests, progress)

    asked = [instance("loglikelihood", f"{word} text", " red", doc_id=i) for i, word in enumerate(("a", "bad", "b"))]
    for engine, failed, new in ((Refuses(coin), 1, 2), (KnownEngine(coin), 0, 1), (KnownEngine(coin), 0, 0)):
        failures_ = []
        with Answers(tmp_path, "text", 1, {}) as kept:
            NMM(engine, failures=failures_, kept=kept).loglikelihood(asked)
        assert ([f.doc_id for f in failures_], len(engine.asked)) == ([1] * failed, new)


def test_a_killed_command_goes_on(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    code = "import torch; torch.set_num_threads(1); from nmm_serve.cli.eval import main; main()"
    command = [
        sys.executable, "-P", "-c", code, "text", "--model", str(model), "--tasks", "nmm_story,nmm_arithmetic",
        "--limit", "40", "--batch-size", "1", "--gen-kwargs", "max_gen_toks=2",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def lines(folder):
        kept = "".join(file.read_text() for file in folder.glob("answers/*.jsonl"))
        return [json.loads(line) for line in kept.splitlines(keepends=True) if line.endswith("}\n")]

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.Popen([*command, "-o", str(killed / "r.json")], env=env, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not lines(killed) and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    before = lines(killed)
    for folder in (killed, whole):
        done = subprocess.run([*command, "-o", str(folder / "r.json")], env=env, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    keys = [line["key"] for line in lines(killed)]
    assert len(keys) == len(set(keys))
    assert set(keys) == {line["key"] for line in lines(whole)}
    section, expected = (load_record(folder / "r.json")["tasks"]["text"] for folder in (killed, whole))
    assert section.pop("answers_reused") >= len(before) > 0
    assert expected.pop("answers_reused") == 0
    assert section == expected
