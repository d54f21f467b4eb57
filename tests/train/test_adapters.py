import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import make_checkpoint
from tiny_hf import write_encoder, write_language_model
from tiny_training import TINY

from nmm_serve.checkpoint import load_model, load_processor, read_run
from nmm_serve.errors import CheckpointError, ConfigError
from nmm_serve.train.config import config_from, load_config
from nmm_serve.train.loop import Trainer, train
from nmm_serve.train.resume import check_base, resume_points

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = TINY | {
    "steps": 4, "eval_every": 4, "save_every": 2, "accumulate": 1, "tokenizer": {}, "model": {},
    "optimizer": {"lr": 1e-2, "decoder_lr_scale": 0},
}  # fmt: skip


def settings(**changes):
    return config_from(BASE | changes)


def losses(out):
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(e["event"], e["step"], e.get("loss"), e.get("grad_norm"), e.get("loss_caption")) for e in events]


def weights(path):
    return load_model(path).state_dict()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("adapters") / "start", tie_word_embeddings=True)


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "lora and soft token"])
def config(request, start):
    return settings(
        init_from=str(start), lora={"rank": 2, "targets": ["qkv_proj", "down_proj"]}, soft_token=request.param
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(config, folder)
    return folder


def test_the_final_checkpoint_is_the_base_with_low_rank_updates(run, start, config):
    before, after = weights(start), weights(run / "final")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {n for n in before if n.endswith(("qkv_proj.weight", "down_proj.weight"))}
    tables = {"model.embed_tokens.weight", "lm_head.weight"} if config.soft_token else set()
    image_front = {n for n in before if ".patch_embed." in n}
    assert changed == adapted | tables | image_front
    for name in adapted:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) == 2
    if config.soft_token:
        table = "model.embed_tokens.weight"
        rows = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
        assert rows == [load_processor(start).token_id("<|image_start|>")]
    written = json.loads((run / "adapters/adapter_config.json").read_text())
    assert (written["r"], written["base_model_name_or_path"]) == (2, str(run / "base"))


def test_the_record_counts_what_was_trained(run, config):
    parts = read_run(run / "final")["parts"]
    assert parts["decoder"]["trained"] == 0
    width, qkv, down = 128, (128 + 384) * 2, (512 + 128) * 2
    assert parts["adapters"]["trained"] == 2 * (qkv + down) + (width if config.soft_token else 0)
    assert parts["connector"]["trained"] == parts["connector"]["params"] > 0


def test_the_merged_model_says_what_the_adapted_one_says(config, run, tmp_path):
    """And a killed run goes on bit for bit, though its checkpoints hold merged weights."""
    trainer = Trainer(config, tmp_path, lambda event: None)
    for _ in range(3):
        trainer.train_step()
    merged = trainer.adapters.merged().eval()
    ids = torch.randint(0, 290, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    trainer.model.train()
    trainer.save()
    trainer.close()
    train(config, tmp_path)
    expected, actual = weights(run / "final"), weights(tmp_path / "final")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


class Stop(Exception):
    """Stands for the moment at which the process dies."""


def test_a_killed_run_has_the_losses_of_an_undisturbed_one(config, run, tmp_path):
    def die(event):
        if event["event"] == "train" and event["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(config, tmp_path, die)
    assert [point.name for point in resume_points(tmp_path / "checkpoints")] == ["step-00000002"]
    train(config, tmp_path)
    ours, expected = (load_file(out / "adapters/adapter_model.safetensors") for out in (tmp_path, run))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert losses(tmp_path) == losses(run)


def test_a_run_does_not_go_on_from_another_base(config, run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "final")
    file = out / "base/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{out}/base is not the model that the adapters in .*step-00000002"):
        train(config, out)
    point = out / "checkpoints/step-00000002"
    (point / "training/state.json").write_text('{"step": 2}')  # as once written
    with pytest.raises(CheckpointError, match="does not say which model its adapters were put on"):
        check_base(out / "base", point)


def test_a_language_model_that_stays_learns_from_one_projection_and_one_token(tmp_path):
    """The setting of eP-ALM, by the recipe that ships."""
    language_model = write_language_model(tmp_path / "lm")
    encoder = write_encoder(tmp_path / "clip", "clip")
    config = load_config(
        "frozen-lm",
        [
            f"start.decoder={language_model}", f"start.encoder={encoder}", "model.patch_size=8", "model.image_size=32",
            "steps=6", "rows=1", "schedule.warmup_steps=1", "log_every=1", "eval_every=6", "context_length=512",
            "data.validation_documents=2", "optimizer.lr=0.02",
        ],
    )  # fmt: skip
    trainer = Trainer(config, tmp_path / "run", lambda event: None)
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert [n.split(".")[1] for n in names] == ["embed_tokens", "connector"]
    parts = trainer.run_record()["parts"]
    assert parts["adapters"]["trained"] == 64, "one row"
    assert parts["connector"]["trained"] == 48 * 64
    assert parts["vision"]["trained"] == parts["decoder"]["trained"] == 0
    trainer.close()
    before = weights(tmp_path / "run/base")
    final = train(config, tmp_path / "run")
    after, run = weights(final), read_run(final)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        "model.embed_tokens.weight", "model.connector.weight"
    }  # fmt: skip
    assert run["history"][-1]["loss"] < run["history"][0]["loss"]
    assert run["image_tokens"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"lr": 1e-3}, "lora": {}}, "lora is for a decoder that itself stays"),
        ({"optimizer": {"lr": 1e-3}, "soft_token": True}, "soft_token is for a decoder that itself stays"),
        ({"lora": {"rank": 0}}, "rank of at least 1"),
        ({"lora": {"ranks": 2}}, "Did you mean lora.rank"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_targets_that_a_decoder_lacks_are_named(tmp_path, start):
    with pytest.raises(ConfigError, match="no linear layer 'q_proj'; it has down_proj, gate_up_proj, o_proj, qkv_proj"):
        train(settings(init_from=str(start), lora={"targets": ["q_proj"]}), tmp_path / "a")
    experts = make_checkpoint(tmp_path / "moe", num_experts=2)
    with pytest.raises(ConfigError, match="stacked experts of a mixture take none"):
        train(settings(init_from=str(experts), lora={}), tmp_path / "b")


def test_a_random_decoder_is_not_frozen(tmp_path):
    with pytest.raises(ConfigError, match="a decoder from scratch would stay random"):
        train(settings(), tmp_path)


def test_a_batch_without_images_teaches_a_frozen_decoder_nothing(tmp_path, start):
    config = settings(init_from=str(start), data={"sources": [{"kind": "builtin", "which": "text"}]})
    trainer = Trainer(config, tmp_path, lambda event: None)
    metrics = trainer.train_step()
    assert metrics["loss"] > 0
    assert metrics["grad_norm"] == 0
    trainer.close()
