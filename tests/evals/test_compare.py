"""Comparisons of records: what they tell, what they admit not to know, and what they refuse."""

import hashlib
import json
import random

import numpy as np
import pytest
from eval_fakes import FakeEngine, failed, image_tag, oracle, prompt_text, says, write_dataset

pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")

from nmm_serve.errors import DataError
from nmm_serve.evals import caption, stats
from nmm_serve.evals.compare import _judge, compare
from nmm_serve.evals.datasets import find_files
from nmm_serve.evals.latency import Load
from nmm_serve.evals.measures import Measure, latency_measures, median_statistic
from nmm_serve.evals.run import Options, evaluate, load_data
from nmm_serve.evals.tokenizer import FallbackTokenizer

IMAGES = 12


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Evaluate a function as a model; gives back where its record lies."""
    monkeypatch.setattr(caption, "open_tokenizer", FallbackTokenizer)
    data = write_dataset(tmp_path / "data", images=IMAGES)

    def make(name, answer, tasks=("vqa", "caption"), folder=data, **options):
        load = Load(concurrencies=(1,), requests=6, warmup=0, output_tokens=3)
        plan = Options(
            tasks=tasks, files=find_files(folder, "val"), out=tmp_path / f"{name}.json", name=name, load=load, **options
        )
        evaluate(FakeEngine(answer), load_data(plan), plan)
        return plan.out

    return make


def constant(_request):
    return says("yes")


def nearly(request):
    """The oracle, but for the colour of one image."""
    return says("pink") if "colour" in prompt_text(request) and image_tag(request) == 0 else oracle(request)


def test_better_equal_and_not_told_apart(make):
    found = compare([make("oracle", oracle), make("nearly", nearly), make("constant", constant)])
    accuracy = found["metrics"]["VQA accuracy %"]
    assert accuracy["clusters"] == IMAGES
    assert any("only 12 images were drawn" in remark for remark in found["remarks"])
    assert [row["model"] for row in accuracy["ranking"]] == ["oracle", "nearly", "constant"]
    assert [row["rank"] for row in accuracy["ranking"]] == [[1, 2], [1, 2], [3, 3]]
    assert accuracy["conclusion"] == "cannot tell which of oracle, nearly is best"
    pairs = {(pair["a"], pair["b"]): pair for pair in accuracy["pairs"]}
    assert pairs["oracle", "nearly"]["difference"] == pytest.approx(100 / 24)
    assert pairs["oracle", "nearly"]["better"] is None
    told = pairs["oracle", "constant"]
    assert told["better"] == "oracle"
    assert told["interval"]["low"] > 0
    assert told["effect_size"] > 1
    assert told["p_holm"] > told["p_value"]
    cider = found["metrics"]["CIDEr"]
    assert cider["pairs"][0]["difference"] == 0
    assert cider["pairs"][0]["p_value"] == 1
    assert cider["pairs"][0]["effect_size"] is None
    assert "METEOR" not in found["metrics"]


def test_the_scores_are_those_of_the_records(make):
    path = make("nearly", nearly)
    found = compare([path, make("oracle", oracle)])
    tasks = json.loads(path.read_text())["tasks"]
    values = {name: metric["scores"]["nearly"]["value"] for name, metric in found["metrics"].items()}
    assert values["VQA accuracy %"] == pytest.approx(tasks["vqa"]["accuracy"], abs=0.005)
    assert values["VQA exact match %"] == pytest.approx(tasks["vqa"]["exact_match"], abs=0.005)
    for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert values[name] == pytest.approx(tasks["caption"]["metrics"][name], abs=1e-9)
        interval = found["metrics"][name]["scores"]["nearly"]["interval"]
        recorded = tasks["caption"]["intervals"][name]
        assert (interval["low"], interval["high"]) == pytest.approx((recorded["low"], recorded["high"]), abs=1e-9)


def test_order_of_the_records_only_turns_the_signs(make):
    a, b = make("oracle", oracle), make("constant", constant)
    one, two = compare([a, b]), compare([b, a])
    for name, metric in one["metrics"].items():
        (pair,), (turned,) = metric["pairs"], two["metrics"][name]["pairs"]
        assert turned["difference"] == pytest.approx(-pair["difference"])
        assert turned["better"] == pair["better"]


def test_the_same_record_twice_cannot_be_told_apart(make):
    path = make("oracle", oracle)
    found = compare([path, path])
    assert [model["name"] for model in found["models"]] == ["oracle (fake)", "oracle (fake) #2"]
    for metric in found["metrics"].values():
        assert metric["conclusion"].startswith("cannot tell")


def test_latency_where_both_have_it(make):
    slow = lambda request: says("x", num_tokens=3)  # noqa: E731
    quick = lambda request: says("x", num_tokens=2)  # noqa: E731
    both = [make("slow", slow, ("latency",)), make("quick", quick, ("latency",))]
    found = compare(both)
    e2e = found["metrics"]["E2E ms at 1"]
    assert not e2e["higher_is_better"]
    assert not e2e["paired"]
    assert e2e["conclusion"] == "quick is best"
    assert e2e["pairs"][0]["difference"] == pytest.approx(50)
    record = json.loads(both[0].read_text())
    record["environment"]["cpu"] = "another"
    both[0].write_text(json.dumps(record))
    with pytest.raises(DataError, match="different machines"):
        compare(both)


def test_times_with_other_pictures_are_not_compared(make, tmp_path):
    here = make("here", oracle, ("latency",))
    there = make("there", oracle, ("latency",), write_dataset(tmp_path / "other", images=IMAGES - 1))
    with pytest.raises(DataError, match="or about different pictures"):
        compare([here, there])


def test_records_of_different_tasks_are_refused_with_what_can_be_given(make):
    with pytest.raises(DataError, match="vqa: caps did not run it.*those of one task at a time"):
        compare([make("answers", oracle, ("vqa",)), make("caps", oracle, ("caption",))])


def test_a_task_that_one_record_lacks_is_left_out_with_the_reason(make):
    found = compare([make("both", oracle), make("one", oracle, ("vqa",))])
    assert found["left_out"] == {"caption": "one did not run it"}
    assert "CIDEr" not in found["metrics"]


def test_failed_items_are_never_compared(make):
    broken = make("broken", lambda r: failed() if image_tag(r) == 20 else oracle(r), ("vqa",))
    with pytest.raises(DataError, match="2 of 24 items of broken failed"):
        compare([broken, make("oracle", oracle, ("vqa",))])


def test_other_data_are_refused(make, tmp_path):
    a = make("a", oracle)
    other = write_dataset(tmp_path / "other", images=IMAGES - 1)
    with pytest.raises(DataError, match="annotation files differ"):
        compare([a, make("b", oracle, folder=other)])
    with pytest.raises(DataError, match="--limit"):
        compare([a, make("c", oracle, limit=3)])


def test_other_items_are_refused(make):
    a, b = make("a", oracle), make("b", oracle)
    beside = b.with_name("b.items.jsonl")
    lines = beside.read_text().replace('"question_id": 1000', '"question_id": 9')
    beside.write_text(lines)
    record = json.loads(b.read_text())
    record["items"]["sha256"] = hashlib.sha256(lines.encode()).hexdigest()
    b.write_text(json.dumps(record))
    with pytest.raises(DataError, match="different items"):
        compare([a, b])


def test_fewer_than_two_records(make):
    with pytest.raises(DataError, match="two or more"):
        compare([make("a", oracle)])


def measure_of(values_MN):
    index_N, clusters = stats.cluster_index(range(len(values_MN[0])))
    statistics = tuple(stats.mean_statistic(values, index_N, clusters) for values in values_MN)
    return Measure("mean", statistics, (clusters,) * len(values_MN), clusters)


def test_false_alarms_stay_near_the_level():
    """Two models of equal quality: at 5 %, a difference may be called real in about one of twenty sets."""
    rng = np.random.default_rng(0)
    alarms = 0
    for trial in range(100):
        found = _judge(measure_of(rng.integers(0, 2, size=(2, 60)).astype(float)), ("a", "b"), 300, trial)
        alarms += found["pairs"][0]["better"] is not None
    assert alarms <= 12  # of 100; more than that has a chance below one in two hundred


def test_effect_size_of_a_mean_is_cohens_d():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 400), rng.normal(0, 1, 400)
    (pair,) = _judge(measure_of([a, b]), ("a", "b"), 2000, 0)["pairs"]
    assert pair["effect_size"] == pytest.approx((a - b).mean() / (a - b).std(), rel=0.1)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_median_of_a_draw(count):
    rng = random.Random(count)
    values = [rng.random() for _ in range(count)]
    for counts in np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=20):
        drawn = [v for v, c in zip(values, counts, strict=True) for _ in range(c)]
        assert median_statistic(values, np.arange(count))(counts[None])[0] == pytest.approx(np.median(drawn))


def test_median_of_a_draw_of_waves():
    """A wave drawn twice brings each of its requests twice; waves may differ in size, where a request had one token."""
    values, wave_N = [5.0, 1.0, 4.0, 2.0, 9.0], np.array([0, 0, 1, 1, 2])
    (median,) = median_statistic(values, wave_N)(np.array([[2, 0, 1]]))
    assert median == np.median([5, 1, 5, 1, 9])


def timed_record(waves, concurrency, told=True):
    """A record of times that are equal within each wave, as a batch that ends together has them."""
    values = np.repeat(waves, concurrency).tolist()
    kept = {"values": values} | ({"waves": np.repeat(range(len(waves)), concurrency).tolist()} if told else {})
    level = {"concurrency": concurrency, "n": len(values), "ttft_s": kept, "tpot_s": kept, "e2e_s": kept}
    return {
        "environment": {"cpu": "x", "cpu_count": 2, "gpus": []},
        "tasks": {"latency": {"output_tokens": 8, "prompt": "p", "images": "i", "levels": [level]}},
    }


@pytest.mark.parametrize("told", [True, False], ids=["waves told", "an older record"])
def test_equal_models_are_rarely_called_different_in_times(told):
    """Eight requests that wait for each other are one observation: drawn singly, nearly half of these pairs of equal
    models would be called different."""
    rng, alarms = np.random.default_rng(0), 0
    for trial in range(100):
        records = [timed_record(0.1 * (1 + 0.05 * rng.normal(size=32)), 8, told) for _ in range(2)]
        measure = next(m for m in latency_measures(records, [], {}) if m.name == "E2E ms at 8")
        assert (measure.unit, measure.clusters, measure.n) == ("wave", (32, 32), 256)
        alarms += _judge(measure, ("a", "b"), 200, trial)["pairs"][0]["better"] is not None
    assert alarms <= 12  # of 100; more than that has a chance below one in two hundred


def test_older_times_whose_waves_cannot_be_told_are_left_out():
    records = [timed_record([0.1, 0.2, 0.3], 4, told=False) for _ in range(2)]
    records[1]["tasks"]["latency"]["levels"][0]["n"] += 1  # a request of one token had no TPOT
    left_out = {}
    assert latency_measures(records, [], left_out) == []
    assert "without the waves" in left_out["TPOT ms at 4"]


def test_many_models_can_still_be_told_apart(make):
    """Holm's correction multiplies the smallest p-value by the number of pairs; the draws must be many enough."""

    def right_on(images):
        return lambda request: oracle(request) if image_tag(request) // 20 < images else says("-")

    models = [make(f"m{i}", right_on(2 * i), ("vqa",)) for i in range(7)]
    found = compare(models)["metrics"]["VQA accuracy %"]
    assert found["ranking"][0]["model"] == "m6"
    worst = next(pair for pair in found["pairs"] if (pair["a"], pair["b"]) == ("m0", "m6"))
    assert worst["better"] == "m6"
