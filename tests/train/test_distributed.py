"""Two real processes against one: the same losses, each other's resume checkpoints, and what breaks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import make_checkpoint
from tiny_training import write_recipe

from nmm_serve.checkpoint import load_model, read_run
from nmm_serve.errors import CheckpointError, ConfigError, TrainingError
from nmm_serve.train.config import ParallelConfig, load_config
from nmm_serve.train.distributed import processes
from nmm_serve.train.loop import Trainer, train
from nmm_serve.train.resume import check_point, resume_points
from nmm_serve.train.sharded_resume import HuggingFaceStorageWriter, check_sharded, load_sharded

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = Path(__file__).parents[1] / "support/distributed_cases.py"
SHORT = ["steps=4", "eval_every=4", "save_every=2"]
EARLY = [*SHORT, "accumulate=2"]  # a pass for each process
MOE = [*SHORT, "rows=2", "accumulate=1", "model.family=moe", "model.router_z_loss_coef=0.001"]  # a row for each
LATE = [*SHORT, "steps=3", "model.family=late", "data.shards=2"]
LORA = [*EARLY, "lora={rank: 2, alpha: 8}", "soft_token=true", "optimizer={lr: 0.03, decoder_lr_scale: 0}"]
DDP, FSDP = "parallel.strategy=ddp", "parallel.strategy=fsdp"
RECOMPUTE = "parallel.activation_checkpointing=true"
STOP = 3


def stop_after(step: int):
    def report(event):
        if event["event"] == "train" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return report


def torchrun(count: int, *command: str) -> list[str]:
    """A free port each, so that two groups never meet."""
    return [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *command]


def children(pid: int) -> list[int]:
    """Processes that `pid` has started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(word) for word in listed.stdout.split()]


def numbers(run: Path) -> list[tuple]:
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    keys = ("step", "loss", "grad_norm", "aux_loss", "z_loss", "loss_caption", "tokens", "lr")
    return [tuple(event.get(key) or 0 for key in keys) for event in events]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml")


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory) -> Path:
    """Every run of this file, one folder each: some of one process, some of two, some begun by one kind and ended by
    the other."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("nmm_serve.train.loop.gemm_rate", lambda device, dtype: 1e9)  # a third of a second a run
    folder = tmp_path_factory.mktemp("runs")
    lora = [*LORA, f"init_from={make_checkpoint(folder / 'start', tie_word_embeddings=True)}"]
    for name, options in (("early", EARLY), ("moe", MOE), ("late", LATE), ("lora", lora)):
        train(load_config(recipe, options), folder / name)
    for name, options in (("moe-1-then-2", MOE), ("lora-1-then-2", lora)):
        with pytest.raises(TrainingError, match="stopped by SIGTERM after step 3"):
            train(load_config(recipe, options), folder / name, stop_after(STOP))
    cases: list[tuple[str, list[str], int]] = [
        ("early-ddp", [*EARLY, DDP], 0),
        ("moe-fsdp", [*MOE, FSDP, RECOMPUTE], 0),
        ("moe-1-then-2", [*MOE, FSDP], 0),
        ("moe-2-then-1", [*MOE, FSDP], STOP),
        ("late-fsdp", [*LATE, FSDP], 0),
        ("lora-ddp", [*lora, DDP], 0),
        ("lora-1-then-2", [*lora, DDP, RECOMPUTE], 0),
        ("lora-2-then-1", [*lora, FSDP], STOP),
    ]
    text = json.dumps([(str(folder / name), options, stop) for name, options, stop in cases])
    done = subprocess.run(
        torchrun(2, str(CASES), recipe, text), env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, options in (("moe-2-then-1", MOE), ("lora-2-then-1", lora)):
        train(load_config(recipe, options), folder / name)
    monkeypatch.undo()
    return folder


@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("early-ddp", "early"),
        ("moe-fsdp", "moe"),
        ("moe-1-then-2", "moe"),
        ("moe-2-then-1", "moe"),
        ("late-fsdp", "late"),
        ("lora-ddp", "lora"),
        ("lora-1-then-2", "lora"),
        ("lora-2-then-1", "lora"),
    ],
)
def test_losses_are_those_of_one_process(runs, name, alone):
    ours, expected = numbers(runs / name), numbers(runs / alone)
    assert len(ours) == len(expected)
    for actual, row in zip(ours, expected, strict=True):
        assert actual == pytest.approx(row, rel=1e-5, abs=1e-5)
    run, reference = read_run(runs / name / "final"), read_run(runs / alone / "final")
    for key in ("tokens", "image_tokens", "labels", "flops", "data", "params"):
        assert run[key] == reference[key]


def test_final_checkpoint_is_an_ordinary_one(runs):
    model, expected = load_model(runs / "moe-fsdp/final"), load_model(runs / "moe/final")
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_adapters_of_several_processes_are_merged_and_written_as_those_of_one(runs):
    files = ["final/model.safetensors", "adapters/adapter_model.safetensors"]
    before = load_file(runs / "lora/base/model.safetensors")
    for file in files:
        expected = load_file(runs / "lora" / file)
        for name in ("lora-ddp", "lora-1-then-2", "lora-2-then-1"):
            ours = load_file(runs / name / file)
            assert ours.keys() == expected.keys()
            for key, tensor in ours.items():
                torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4, msg=key)
    after = load_file(runs / "lora-1-then-2" / files[0])
    adapted = "model.layers.1.self_attn.qkv_proj.weight"
    changed = (after[adapted] - before[adapted]).abs()
    assert changed.max() > 1e-2, "far more than the tolerance"


def test_a_resume_checkpoint_of_shards_holds_what_is_trained(runs):
    (point,) = [p for p in resume_points(runs / "lora-ddp/checkpoints") if p.name == "step-00000002"]
    names = {name for file in (point / "training/shards").iterdir() for name in load_file(file)}
    weights = {name for name in names if name.startswith("weight/")}
    assert len(names) == 4 * len(weights), "each with two moments and a count of steps"
    trained = (".lora_", ".trainable_tokens_delta.", ".patch_embed.")
    assert all(any(part in name for part in trained) for name in weights)


def test_each_process_writes_half_of_the_numbers(runs):
    (point,) = [p for p in resume_points(runs / "moe-fsdp/checkpoints") if p.name == "step-00000002"]
    files = sorted((point / "training/shards").iterdir())
    assert len(files) == 2
    sizes = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    experts = [load_file(file)["weight/model.layers.0.mlp.experts.down_proj"] for file in files]
    assert [expert.shape[0] for expert in experts] == [4, 4], "of 8 experts each process holds 4"


@pytest.mark.parametrize("name", ["moe-fsdp", "late-fsdp", "moe-1-then-2", "moe-2-then-1", "early-ddp"])
def test_one_process_alone_builds_a_model_that_will_be_sharded(runs, name):
    held = [int((runs / name / f"held-{rank}").read_text()) for rank in (0, 1)]
    whole = read_run(runs / name / "final")["params"]["total"]
    assert held == ([whole, whole] if name.endswith("ddp") else [whole, 0])


@pytest.fixture
def trainer(recipe, tmp_path, monkeypatch):
    """One process that saves as several do."""
    monkeypatch.setattr("nmm_serve.train.loop.gemm_rate", lambda device, dtype: 1e9)
    config = load_config(recipe, [*EARLY, FSDP])
    with processes(ParallelConfig(strategy="fsdp")) as procs:
        trainer = Trainer(config, tmp_path, lambda event: None, procs)
        yield trainer
        trainer.close()


def test_a_save_holds_its_own_step_and_damage_is_noticed(trainer):
    trainer.train_step()
    weight = trainer.model.lm_head.weight
    saved = weight.full_tensor().clone()
    trainer.save()
    with torch.no_grad():
        weight.mul_(0)  # while it is being written
    point = trainer.publish(wait=True)

    def load():
        check_sharded(point, trainer.procs)
        return load_sharded(point, trainer.model, trainer.optimizer, trainer.procs)

    assert load()["step"] == 1
    assert torch.equal(weight.full_tensor(), saved)
    (file,) = (point / "training/shards").iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"safetensors is damaged.*Delete {point} to go on"):
        load()
    (point / "training/state.json").unlink()
    with pytest.raises(CheckpointError, match=f"Delete {point} to go on"):
        load()


def test_a_save_that_fails_leaves_the_ones_before(trainer, tmp_path, monkeypatch):
    trainer.train_step()
    first = trainer.save(wait=True)
    trainer.train_step()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    trainer.save()
    with pytest.raises(CheckpointError, match="step-00000002 could not be written: disk full"):
        trainer.publish(wait=True)
    assert resume_points(tmp_path / "checkpoints") == [first]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "training/state.json", "training/sha256-files.json"])
def test_a_damaged_file_beside_the_shards_is_named_before_it_is_opened(runs, recipe, tmp_path, name):
    out = tmp_path / "run"
    shutil.copytree(runs / "moe-2-then-1", out)
    shutil.rmtree(out / "final")
    before, last = resume_points(out / "checkpoints")
    for damage in ("", "[]", "{}", (last / name).read_text().replace("1", "2")):
        (last / name).write_text(damage)
        with pytest.raises(CheckpointError, match=f"Delete {last} to go on from the one before it, {before.name}"):
            train(load_config(recipe, MOE), out)
    check_point(before)


def test_several_processes_need_a_strategy(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started but parallel\.strategy is none"):
        train(load_config(recipe), tmp_path)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        # as gloo says them: of a process that was killed, and of machines that went off the network
        ("gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4009", "has ended: it has said why"),
        ("gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:4009: Connection timed out.", "Connection timed out"),
        ("gloo/transport/tcp/pair.cc:537] Read error [10.0.0.1]:3420: No route to host.", "No route to host"),
        ("gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 250ms for send", "Timed out waiting 250ms"),
    ],
)  # fmt: skip
def test_a_lost_process_is_said_to_be_lost(told, said, monkeypatch):
    monkeypatch.setattr("nmm_serve.train.distributed.dist.init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr("nmm_serve.train.distributed.dist.destroy_process_group", lambda: None)
    monkeypatch.setattr("nmm_serve.train.distributed.dist.get_rank", lambda: 0)
    monkeypatch.setattr("nmm_serve.train.distributed.dist.get_world_size", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = f"another process of this run .*{said}.*run the same command to go on"
    with pytest.raises(TrainingError, match=message), processes(ParallelConfig(strategy="ddp")):
        raise RuntimeError(told)
    with pytest.raises(RuntimeError, match="a tensor"), processes(ParallelConfig(strategy="ddp")):
        raise RuntimeError("Timed out waiting for a tensor")


def test_ddp_of_one_process_passes_steps_without_images(recipe, tmp_path, monkeypatch):
    """DDP waits for the gradients of every parameter, also alone."""
    monkeypatch.setattr("nmm_serve.train.loop.gemm_rate", lambda device, dtype: 1e9)
    words = ["model.preset=atto", "data.validation=[]", "data.sources=[{kind: builtin, which: text}]"]
    losses = []
    for strategy in ("none", "ddp"):
        config = load_config(recipe, [*words, f"parallel.strategy={strategy}"])
        (tmp_path / strategy).mkdir()
        with processes(config.parallel) as procs:
            trainer = Trainer(config, tmp_path / strategy, lambda event: None, procs)
            losses.append([trainer.train_step()["loss"] for _ in range(2)])
            trainer.close()
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_killed_group_goes_on(recipe, tmp_path):
    """SIGKILL to all processes at once, as a machine that goes down; the command line, as a user types it."""
    longer = [*MOE, "steps=20"]
    train(load_config(recipe, longer), tmp_path / "whole")
    options = [word for option in [*longer, FSDP] for word in ("--set", option)]
    command = ["-m", "nmm_serve.cli.train", "run", recipe, "--out", str(tmp_path / "run"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    group = subprocess.Popen(torchrun(2, *command), env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("run/checkpoints/step-*")):
        assert group.poll() is None
        time.sleep(0.05)
    for pid in (*children(group.pid), group.pid):
        os.kill(pid, signal.SIGKILL)
    group.wait()
    assert not (tmp_path / "run/final").exists()
    done = subprocess.run(torchrun(2, *command), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("checkpoint: ") == 1, "one process reports"
    for actual, row in zip(numbers(tmp_path / "run"), numbers(tmp_path / "whole"), strict=True):
        assert actual == pytest.approx(row, rel=1e-5, abs=1e-5)
