"""Text tasks from names to records, with engines of known answers."""

import base64
import importlib.util
import io
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

pytest.importorskip("lm_eval", reason="needs the extra `evals`")

from lm_eval.api.metrics import median, perplexity
from text_fakes import KnownEngine, coin, uniform, write_task

from nmm_serve.errors import ConfigError, DataError, EngineError
from nmm_serve.evals import text
from nmm_serve.evals.datasets import Files
from nmm_serve.evals.lm_eval_requests import sampling_of
from nmm_serve.evals.records import load_items, load_record
from nmm_serve.evals.run import Options, evaluate, failures, load_data
from nmm_serve.evals.text import SHIPPED, TextOptions, load_tasks, parse_gen_kwargs
from nmm_serve.evals.text_scores import scores

ROOT = Path(__file__).parents[2]
FOUR = [{"question": f"case {i}", "choices": ["yes", "no", "maybe", "never"], "gold": i % 4} for i in range(8)]


def shipped(name):
    lines = (json.loads(line) for line in (SHIPPED / f"{name}.jsonl").read_text().splitlines())
    return [q | {"context": f"Question: {q['question']} Answer:"} for x in lines for q in x["questions"]] if (
        name == "vqa"
    ) else list(lines)  # fmt: skip


CHOICE_TASKS = ("agreement", "counting", "relation", "story", "vqa")


def right_choices():
    """Each context's right endings: questions of `vqa` repeat over pictures."""
    found = {}
    for name in CHOICE_TASKS:
        for item in shipped(name):
            found.setdefault(item["context"], set()).add(" " + item["choices"][item["gold"]])
    return found


@pytest.fixture(autouse=True)
def _machine_not_described(monkeypatch):
    """lm-eval starts pip and others for that, seconds a run."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "this machine")


@pytest.fixture
def run(tmp_path):
    def run(engine, *tasks, limit=None, seed=0, **options):
        plan = Options(
            tasks=("text",), files=Files(split=""), out=tmp_path / "r.json", limit=limit, seed=seed,
            text=TextOptions(tasks=tasks or ("nmm",), **options),
        )  # fmt: skip
        record = evaluate(engine, load_data(plan), plan)
        assert load_record(plan.out) == record
        return record, load_items(plan.out, record)

    return run


def oracle():
    right, sums = right_choices(), {item["context"]: item["answer"] for item in shipped("arithmetic")}
    return KnownEngine(
        lambda context, continuation, _: 0.0 if continuation in right.get(context, ()) else -9.0,
        says=lambda context: f" {sums[context]}",
    )


def test_an_oracle_is_always_right(run):
    record, items = run(oracle(), *(f"nmm_{name}" for name in CHOICE_TASKS[:-1]), "nmm_arithmetic", limit=60)
    section = record["tasks"]["text"]
    for name, task in section["tasks"].items():
        metric = "exact_match" if name == "nmm_arithmetic" else "acc"
        assert task["metrics"] == {metric: 1.0}, name
        assert task["intervals"][metric]["low"] == task["intervals"][metric]["high"] == 1.0
        assert (task["n"], task["n_total"], task["failed"], task["truncated"]) == (60, 240, 0, 0)
        assert re.fullmatch("[0-9a-f]{64}", task["hash"])
    assert len(items) == record["items"]["count"] == 5 * 60
    assert {item["scores"]["acc"] for item in items if item["text_task"] == "nmm_story"} == {1.0}
    assert failures(record) == []
    assert record["environment"]["packages"]["lm-eval"] == section["lm_eval"] == "0.4.13"


def test_a_coin_scores_chance(run):
    record, _ = run(KnownEngine(coin, says=lambda _: " 9"), limit=80)
    for name, task in record["tasks"]["text"]["tasks"].items():
        if name == "nmm_perplexity":
            continue
        (metric, value), chance = next(iter(task["metrics"].items())), task["chance"]
        if name == "nmm_arithmetic":
            assert value == sum(item["answer"] == "9" for item in shipped("arithmetic")[:80]) / 80
        else:
            assert abs(value - chance) < 4 * math.sqrt(chance * (1 - chance) / task["n"]), name
            assert task["stderr"][metric] == pytest.approx(math.sqrt(value * (1 - value) / (task["n"] - 1)), rel=1e-6)


def test_a_constant_scores_chance_on_minimal_pairs(run):
    """Preferring the plural, or the singular, must not help."""
    for sign in (1, -1):
        engine = KnownEngine(lambda _, words, n, sign=sign: float(sign * len(words)))
        record, _ = run(engine, "nmm_agreement")
        assert record["tasks"]["text"]["tasks"]["nmm_agreement"]["metrics"]["acc"] == 0.5
    assert record["final"]


def test_intervals_follow_the_aggregation():
    """A perplexity is exp(-mean); of a median, or of what cannot be told, there is none."""
    logs = [-1.0, -2.0, -3.0, -2.0]
    documents = [{"filter": "none", "ppl": x, "middle": x, "steep": 400 * x} for x in logs]
    task = SimpleNamespace(aggregation=lambda: {"ppl": perplexity, "middle": median, "steep": perplexity})
    found = scores(
        task, {"ppl,none": perplexity(logs), "middle,none": -2.0, "steep,none": 1.0}, documents, documents, 0
    )
    assert found["intervals"]["middle"] is None
    assert found["intervals"]["steep"] is None, "over the largest float"
    interval = found["intervals"]["ppl"]
    assert math.e < interval["low"] < found["metrics"]["ppl"] < interval["high"] < math.e**3


def test_a_uniform_engine_has_known_perplexity(run):
    engine = KnownEngine(uniform)
    record, _ = run(engine, "nmm_perplexity", limit=20)
    task = record["tasks"]["text"]["tasks"]["nmm_perplexity"]
    texts = [item["text"] for item in shipped("perplexity")[:20]]
    tokens = sum(len(engine.processor.encode_text(t)) for t in texts)
    size = sum(len(t.encode()) for t in texts)
    expected = tokens * math.log2(len(engine.processor.tokenizer)) / size
    assert task["metrics"]["bits_per_byte"] == pytest.approx(expected)
    assert task["metrics"]["byte_perplexity"] == pytest.approx(2**expected)
    interval = task["intervals"]["bits_per_byte"]
    assert interval["low"] < expected < interval["high"]
    assert not record["final"]


def test_the_record_does_not_hang_on_order_or_run(run):
    first, items = run(KnownEngine(coin), "nmm_story", limit=30)
    again, items_again = run(KnownEngine(coin), "nmm_story", limit=30)
    assert first["tasks"] == again["tasks"]
    assert items == items_again


def test_user_tasks_from_a_folder_and_a_file(run, tmp_path):
    mine = write_task(tmp_path / "mine", "four", FOUR)
    record, _ = run(KnownEngine(lambda _, words, n: -float(words != " no")), "four", include_path=(mine,))
    assert record["tasks"]["text"]["tasks"]["four"]["metrics"] == {"acc": 0.25}
    by_path, _ = run(KnownEngine(coin), str(mine / "four.yaml"))
    assert list(by_path["tasks"]["text"]["tasks"]) == ["four"]
    assert record["final"]
    assert record["tasks"]["text"]["complete"]


def test_groups_and_patterns(run, tmp_path):
    mine = write_task(tmp_path / "mine", "four", FOUR)
    write_task(mine, "five", FOUR[:4])
    (mine / "both.yaml").write_text(
        "group: both\ntask: [four, five]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    record, _ = run(KnownEngine(lambda _, words, n: -float(words != " no")), "both", include_path=(mine,))
    section = record["tasks"]["text"]
    assert set(section["tasks"]) == {"four", "five"}
    assert section["groups"]["both"]["acc,none"] == pytest.approx(0.25)
    record, _ = run(KnownEngine(coin), "f*", include_path=(mine,))
    assert set(record["tasks"]["text"]["tasks"]) == {"four", "five"}


def test_few_shots_are_lm_evals(run, tmp_path):
    mine = write_task(tmp_path / "mine", "four", FOUR)
    engine = KnownEngine(coin)
    record, _ = run(engine, "four", include_path=(mine,), num_fewshot=2)
    assert record["tasks"]["text"]["tasks"]["four"]["num_fewshot"] == 2
    context = engine.words(engine.asked[0].context)
    assert context.count("case") == 3
    assert context.count("\n\n") == 2


def test_chats_are_asked_in_the_chat_format(run, tmp_path):
    mine = write_task(tmp_path / "mine", "four", FOUR[:1])
    engine = KnownEngine(coin)
    record, _ = run(engine, "four", include_path=(mine,), chat_template=True, system_instruction="be brief")
    tokenizer = engine.processor.tokenizer
    whole = {tokenizer.decode([*r.context, *r.continuation]) for r in engine.asked}
    assert "<|bos|><|system|>be brief<|user|>case 0<|assistant|>no" in whole
    assert record["tasks"]["text"]["chat_template"]


def test_failed_items_take_the_score_away(run, tmp_path):
    docs = [*FOUR, {"question": "long", "choices": ["yes", "word " * 2000], "gold": 0}]
    mine = write_task(tmp_path / "mine", "four", docs)
    write_task(mine, "five", FOUR[:4])
    (mine / "both.yaml").write_text("group: both\ntask: [four, five]\naggregate_metric_list: [{metric: acc}]\n")
    record, items = run(
        KnownEngine(lambda _, words, n: -float(words != " no")), "both", include_path=(mine,),
        output_dir=tmp_path / "lm", log_samples=True,
    )  # fmt: skip
    section = record["tasks"]["text"]
    task = section["tasks"]["four"]
    assert task["metrics"] == {"acc": None}
    assert task["answered_only"] == {"n": 8, "metrics": {"acc": 0.25}}
    assert task["reason"].startswith("1 of 9 items failed")
    assert section["failed"] == 1
    assert section["groups"]["both"] is None
    assert section["tasks"]["five"]["metrics"] == {"acc": 0.25}
    assert [line.split(": ")[1] for line in failures(record)] == ["four/8"]
    assert [item["id"] for item in items if item["error"]] == ["four/8"]
    results = json.loads(next((tmp_path / "lm").rglob("results_*.json")).read_text())
    assert results["results"]["four"]["acc,none"] is None
    assert results["results"]["both"]["acc,none"] is None
    assert results["results"]["five"]["acc,none"] == 0.25
    logged = [json.loads(x) for x in next((tmp_path / "lm").rglob("samples_four_*")).read_text().splitlines()]
    assert [sample["doc_id"] for sample in logged if sample.get("error")] == [8]
    assert logged[8]["acc"] is None


def test_results_in_lm_evals_format(run, tmp_path):
    out = tmp_path / "lm"
    record, _ = run(KnownEngine(coin), "nmm_vqa", limit=4, output_dir=out, log_samples=True)
    run(KnownEngine(coin), "nmm_vqa", limit=4, output_dir=out)
    assert [path.name for path in out.iterdir()] == ["known-model"], "one folder a model, not a random one a run"
    assert len(list(out.rglob("results_*.json"))) == 2
    (samples,) = out.rglob("samples_nmm_vqa_*.jsonl")
    first = json.loads(samples.read_text().splitlines()[0])
    assert first["arguments"]["gen_args_0"]["arg_0"].startswith("<image>Question: ")
    assert re.fullmatch("[0-9a-f]{64}", first["arguments"]["gen_args_0"]["arg_2"]["visual"][0])
    results = json.loads(next(out.rglob("results_*.json")).read_text())
    task = record["tasks"]["text"]["tasks"]["nmm_vqa"]
    assert results["results"]["nmm_vqa"]["acc,none"] == task["metrics"]["acc"]
    assert results["task_hashes"]["nmm_vqa"] == task["hash"]
    assert {str(path) for path in out.rglob("*") if path.is_file()} > set(record["tasks"]["text"]["saved"])
    assert str(samples) in record["tasks"]["text"]["saved"]


def test_results_that_cannot_be_saved_are_an_error(run, tmp_path, monkeypatch):
    """lm-eval itself only warns."""
    from lm_eval.loggers import evaluation_tracker

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_tracker, "json", SimpleNamespace(dumps=full))
    with pytest.raises(DataError, match="could not save its results: OSError.*No space left"):
        run(KnownEngine(coin), "nmm_story", limit=2, output_dir=tmp_path / "lm")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told_first(run, tmp_path):
    (tmp_path / "lm").mkdir(mode=0o500)
    engine = KnownEngine(coin)
    with pytest.raises(DataError, match="cannot be written"):
        run(engine, "nmm_story", output_dir=tmp_path / "lm")
    assert not engine.asked


def test_unknown_names_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_index", lambda include, defaults: _Index(include))
    with pytest.raises(DataError, match="unknown text task 'nmm_storry'. Did you mean 'nmm_story'"):
        load_tasks(TextOptions(tasks=("nmm_storry",)))
    with pytest.raises(DataError, match="does not exist"):
        load_tasks(TextOptions(tasks=("gone.yaml",)))
    with pytest.raises(DataError, match="not a folder"):
        load_tasks(TextOptions(include_path=(tmp_path / "gone",)))


def _Index(include):
    """Without lm-eval's 14,000 names, which take half a minute to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=False)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"dataset_path": "someone/unknown-data", "dataset_kwargs": None}, "not on this disk.*HF_HUB_OFFLINE=0"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "write absolute paths"),
        ({"output_type": "guess"}, "cannot be loaded: ValueError"),
    ],
)
def test_tasks_that_cannot_be_loaded_say_why(tmp_path, config, told):
    mine = write_task(tmp_path / "mine", "four", FOUR, **config)
    with pytest.raises(DataError, match=told):
        load_tasks(TextOptions(tasks=("four",), include_path=(mine,)))


def test_generation_options_over_the_tasks(run):
    engine = KnownEngine(coin, says=lambda _: "")
    run(engine, "nmm_arithmetic", limit=1, gen_kwargs={"max_gen_toks": 3, "temperature": 0.5, "do_sample": True})
    sampling = engine.asked[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.stop) == (3, 0.5, (".", "\n"))


def test_gen_kwargs_are_read():
    assert parse_gen_kwargs("max_gen_toks=3,do_sample=true,until=x") == {
        "max_gen_toks": 3, "do_sample": True, "until": "x",
    }  # fmt: skip
    assert parse_gen_kwargs("do_sample=False,seed=None,until=False alarm") == {
        "do_sample": False, "seed": None, "until": "False alarm",
    }  # fmt: skip
    assert sampling_of({"do_sample": False, "until": []}, 8, 0).temperature == 0
    with pytest.raises(ConfigError, match="do_sample='no'; expected true or false"):
        sampling_of({"do_sample": "no", "until": []}, 8, 0)
    with pytest.raises(ConfigError, match="not key=value"):
        parse_gen_kwargs("max_gen_toks")


def test_two_files_with_a_task_of_one_name_are_refused(tmp_path):
    mine, other = (write_task(tmp_path / folder, "mine", FOUR[:n]) / "mine.yaml" for folder, n in (("a", 3), ("b", 5)))
    with pytest.raises(DataError, match=r"b/mine.yaml and .*a/mine.yaml both hold a task 'mine'; rename one"):
        load_tasks(TextOptions(tasks=(str(mine), str(other))))
    story = write_task(tmp_path / "c", "nmm_story", FOUR) / "nmm_story.yaml"
    with pytest.raises(DataError, match="both hold a task 'nmm_story'"):
        load_tasks(TextOptions(tasks=(str(story), "nmm_story")))
    again = load_tasks(TextOptions(tasks=(str(mine), str(mine.parent / ".." / "a" / "mine.yaml"))))
    assert list(again.loaded["tasks"]) == ["mine"]


def test_what_an_engine_cannot_do_is_told_before_it_is_asked(run):
    engine = KnownEngine(coin)
    engine.processor = None  # a server that tells no tokens
    with pytest.raises(EngineError, match="cannot do task 'nmm_perplexity': the server does not tell its tokens"):
        run(engine, "nmm")
    assert not engine.asked


# ---- the tasks that ship


@pytest.fixture(scope="module")
def built():
    """The script that draws the data, and the documents that it cut."""
    pytest.importorskip("sklearn", reason="needs the extra `train`")
    spec = importlib.util.spec_from_file_location("build_text_tasks", ROOT / "scripts/build_text_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["agreement", "arithmetic", "counting", "perplexity", "relation", "story"])
def test_the_data_are_those_that_the_script_draws(built, name):
    assert built.draw(name) == (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8")


def test_the_pictures_are_those_that_the_script_draws(built):
    """Their pixels: PNG bytes hang on the version of a compression library."""
    drawn = [json.loads(line) for line in built.draw("vqa").splitlines()]
    kept = [json.loads(line) for line in (SHIPPED / "vqa.jsonl").read_text().splitlines()]
    for one, other in zip(drawn, kept, strict=True):
        pixels = [Image.open(io.BytesIO(base64.b64decode(x.pop("png")))).tobytes() for x in (one, other)]
        assert pixels[0] == pixels[1]
        assert one == other


def test_every_item_is_cut_from_a_test_document(built):
    """Which decides by its content that it is in no other split."""
    from nmm_serve.train.data.builtin.scene import in_split

    for name in ("agreement", "arithmetic", "counting", "relation", "story"):
        for item in shipped(name):
            document = built._document(item["document"])
            right = item["answer"] if name == "arithmetic" else item["choices"][item["gold"]]
            assert document.startswith(f"{item['context']} {right}")
            assert in_split(document, "test")
            assert not in_split(document, "train")


def test_shipped_tasks_state_their_chance():
    for file in SHIPPED.glob("*.yaml"):
        config = yaml.load(file.read_text().replace("!function", ""), yaml.SafeLoader)
        items = shipped(file.stem)
        chance = config["metadata"].get("chance")
        if config["output_type"] == "multiple_choice":
            assert {len(item["choices"]) for item in items} == {round(1 / chance)}
            assert {len(set(item["choices"])) for item in items} == {round(1 / chance)}
        elif config["output_type"] == "generate_until":
            answers = [item["answer"] for item in items]
            assert chance == pytest.approx(max(map(answers.count, answers)) / len(answers), abs=1e-4)


def test_minimal_pairs_are_balanced():
    """As many right ones of each form, so that no form can be guessed."""
    right = [item["choices"][item["gold"]] for item in shipped("agreement")]
    wrong = [item["choices"][1 - item["gold"]] for item in shipped("agreement")]
    longer = sum(len(r) > len(w) for r, w in zip(right, wrong, strict=True))
    assert longer == len(right) / 2
