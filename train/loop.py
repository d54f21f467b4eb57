"""The training loop: one process or several, resumable bit for bit."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nmm_serve import __version__
from nmm_serve.checkpoint import clear_leftovers, save_checkpoint
from nmm_serve.errors import TrainingError
from nmm_serve.routing import IMAGE, TEXT, count_routed, modality_groups
from nmm_serve.sizing import count_params, paper_flops
from nmm_serve.train.config import TrainConfig
from nmm_serve.train.data.loader import LoaderStats, PackedLoader
from nmm_serve.train.data.mixture import parse_mixture
from nmm_serve.train.data.sharded import Division, ShardedLoader
from nmm_serve.train.distributed import (
    Processes,
    accumulating,
    clip_grad_norm,
    forget_image_gradients,
    processes,
    recompute_activations,
    spread,
    whole_model,
)
from nmm_serve.train.log import RunLog
from nmm_serve.train.memory import keep_freed_memory
from nmm_serve.train.opening import open_run
from nmm_serve.train.optim import build_optimizer, lr_factor, set_lr
from nmm_serve.train.parts import describe_parts, freeze
from nmm_serve.train.resume import rng_state, save_resume, step_of
from nmm_serve.train.run_folder import BASE, keep_config, locked
from nmm_serve.train.sharded_resume import BackgroundSaves
from nmm_serve.train.throughput import batch_work, gemm_rate
from nmm_serve.train.validate import Validation

Report = Callable[[dict[str, Any]], None]
"""Called with each event: `start`, `train`, `validation`, `bad_step`, `saved`, `done`."""


def train(config: TrainConfig, out: str | Path, report: Report = lambda event: None) -> Path:
    """Train, or go on where a killed run of the same configuration stopped. Returns the final checkpoint's directory.

    Raises ConfigError, DataError, CheckpointError or TrainingError. SIGTERM and SIGINT save a resume checkpoint and
    raise TrainingError.
    """
    out = Path(out)
    final = out / "final"
    with processes(config.parallel) as procs, contextlib.ExitStack() as held:
        procs.from_main(lambda: _start(held, out, config))
        procs.check_same("the run folder, which they must share", lambda: str((out / "config.yaml").is_file()))
        if procs.from_main(final.is_dir):
            if procs.main:
                report({"event": "done", "step": config.steps, "path": str(final)})
            return final
        trainer = Trainer(config, out, report, procs)
        try:
            trainer.run()
        finally:
            trainer.close()
    return final


def _start(held: contextlib.ExitStack, out: Path, config: TrainConfig) -> None:
    held.enter_context(locked(out))
    keep_config(out, config)
    for path in (out / "final", out / BASE, out / "checkpoints/step-"):
        clear_leftovers(path)


class Trainer:
    """Model, optimiser, data and counters of one run."""

    def __init__(self, config: TrainConfig, out: Path, report: Report, procs: Processes | None = None):
        procs = procs or Processes(device="cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.out, self.procs, self._report = config, out, procs, report
        self.device = procs.device
        bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device == "cuda")
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        torch.manual_seed(config.seed)
        if self.device == "cpu":
            keep_freed_memory()

        division = Division(config.accumulate, config.rows, procs.count)
        division.check("processes")
        self.passes = division.passes
        self.mixture = parse_mixture({"sources": config.data.sources}, Path(config.data.root))
        self.opening = open_run(config, self.mixture, out, procs)
        self.model, self.processor, self.adapters = self.opening.model, self.opening.processor, self.opening.adapters
        self.model.train()
        freeze(self.model, config.optimizer)
        self.parts = describe_parts(self.model, config.optimizer)
        if config.parallel.activation_checkpointing:
            recompute_activations(self.model)
        self.forward: Any = spread(self.model, procs, self.dtype, division)
        self.peak_lr = self.opening.peak_lr
        self.optimizer = build_optimizer(self.model, config.optimizer, self.peak_lr)
        state = self.opening.load(self.optimizer, procs)
        if config.compile:
            self.forward = torch.compile(self.forward, dynamic=True)

        self.step: int = state.get("step", 0)
        self.totals: dict[str, float] = state.get("totals") or {
            "tokens": 0, "image_tokens": 0, "labels": 0, "flops": 0, "paper_flops": 0, "seconds": 0.0, "bad_steps": 0,
        }  # fmt: skip
        self.bad_in_a_row: int = state.get("bad_in_a_row", 0)
        self.loader = ShardedLoader(
            partial(
                PackedLoader,
                self.mixture,
                self.processor,
                context_length=config.context_length,
                rows=config.rows,
                objective=config.objective,
                seed=config.seed,
                max_bad_share=config.data.max_bad_share,
            ),
            accumulate=config.accumulate,
            rows=config.rows,
            shards=config.data.shards,
            rank=procs.rank,
            processes=procs.count,
            num_workers=config.data.workers,
            state=state.get("loader"),
        )
        self.validation = Validation(config, self.processor, self.device, self.dtype, procs)
        self.log = RunLog(out, self.step) if procs.main else None
        self.saves = (
            None
            if procs.strategy == "none"
            else BackgroundSaves(out / "checkpoints", procs, config.keep, config.save_at)
        )
        self.gemm_rate = procs.sums({"rate": gemm_rate(self.device, self.dtype)})["rate"]
        self.stop_signal: int | None = None

    def report(self, event: dict[str, Any], log: bool = True) -> None:
        """One event of the whole run: the main process logs and shows it."""
        if self.log is not None:
            if log:
                self.log.write(event)
            self._report(event)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        if self.saves is not None:
            self.saves.close()

    def run(self) -> None:
        config, counts = self.config, count_params(self.model.config)
        self.report(
            {
                "event": "start", "step": self.step, "steps": config.steps, "family": self.model.config.family,
                "params": counts.total, "active_params": counts.active, "device": self.device,
                "trained_params": sum(part["trained"] for part in self.parts.values()),
                "processes": self.procs.count, "strategy": self.procs.strategy,
                "dtype": str(self.dtype).removeprefix("torch."), "gemm_flops": self.gemm_rate,
            },
            log=False,
        )  # fmt: skip
        with self.catch_signals():
            while self.step < config.steps:
                metrics = self.train_step()
                if self.is_logged(self.step):
                    self.report(metrics)
                if self.step % config.eval_every == 0 or self.step == config.steps:
                    self.evaluate()
                if stopped := self.procs.highest(self.stop_signal or 0):
                    path = self.save(wait=True)
                    name = signal.Signals(stopped).name
                    self.procs.fail(
                        TrainingError(
                            f"stopped by {name} after step {self.step}; {path} is saved: run the same command to go on"
                        )
                    )
                regular = self.step % config.save_every == 0 and self.step < config.steps
                if regular or self.step in config.save_at:
                    self.save()
                self.publish()
        self.publish(wait=True)
        self.finish()
        self.report({"event": "done", "step": self.step, "path": str(self.out / "final")}, log=False)

    def finish(self) -> None:
        """Write the final checkpoint, and the adapters by themselves."""
        final, record = self.out / "final", self.run_record()
        if self.adapters is None:
            whole = whole_model(self.model, self.procs)
            self.procs.from_main(lambda: save_checkpoint(final, whole, self.processor, record))
            return
        adapters = self.adapters.whole(self.procs)
        self.procs.from_main(lambda: adapters.save(self.out / "adapters"))
        self.procs.from_main(lambda: save_checkpoint(final, adapters.merged(), self.processor, record))

    def train_step(self) -> dict[str, Any]:
        """One optimiser step over this process's share of `accumulate` passes, each token weighing the same."""
        begin = time.perf_counter()
        waited = self.loader.wait_seconds
        batches = [next(self.loader) for _ in range(self.passes)]
        waited = self.loader.wait_seconds - waited
        trained = [part for part, entry in self.parts.items() if entry["trained"]]
        parts = [batch_work(self.model.config, b, trained) for b in batches]
        work = self.procs.sums({key: sum(part[key] for part in parts) for key in parts[0]})
        losses = {"loss": 0.0}
        # the routers' logits exist anyway; asked for in every step, so that a compiled model stays one graph
        sparse = self.model.config.num_experts > 0
        routed: torch.Tensor | None = None
        for batch in batches:
            tensors = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            with accumulating(self.forward, last=batch is batches[-1]):
                with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                    output = self.forward(**tensors, num_items_in_batch=work["labels"], output_router_logits=sparse)
                if output.loss.requires_grad:  # not where only the way of images is trained and there is none
                    # gradients are averaged over the processes, and must add up
                    (output.loss * self.procs.count).backward()
            losses["loss"] += output.ce_loss.item()
            for name in ("aux_loss", "z_loss"):
                if (value := getattr(output, name)) is not None:
                    losses[name] = losses.get(name, 0.0) + value.item()
            if sparse and self.is_logged(self.step + 1):
                counts = self.count_routed(tensors, output.router_logits)
                routed = counts if routed is None else routed + counts
        if work["image_tokens"] == 0:
            forget_image_gradients(self.model)
        reports = self.procs.gather(losses | {"waited": waited})
        losses = {name: sum(one[name] for one in reports) for name in losses}
        ce_loss = losses.pop("loss")
        norm = clip_grad_norm(self.model, self.config.optimizer.grad_clip)
        factor = lr_factor(self.step, self.config.steps, self.config.schedule)
        self.step += 1
        if math.isfinite(ce_loss) and math.isfinite(norm):
            set_lr(self.optimizer, factor)
            self.optimizer.step()
            self.bad_in_a_row = 0
        else:
            self.bad_step(ce_loss, norm)
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - begin
        self.totals["seconds"] += seconds
        for key, value in work.items():
            self.totals[key] += value
        metrics: dict[str, Any] = {
            "event": "train",
            "step": self.step,
            "loss": ce_loss,
            "grad_norm": norm,
            "lr": self.peak_lr * factor,
            "tokens": int(self.totals["tokens"]),
            "flops": float(self.totals["flops"]),
            "tokens_per_s": work["tokens"] / seconds,
            "mfu": work["flops"] / seconds / self.gemm_rate,
            "data_wait": max(one["waited"] for one in reports) / seconds,
        }
        if routed is not None:
            routed = self.procs.sum_tensor(routed)
            # [layer][expert]: how many image and text tokens of this step each expert was given
            metrics["routed"] = {"image": routed[:, IMAGE].tolist(), "text": routed[:, TEXT].tolist()}
        return metrics | losses

    def is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps

    def count_routed(self, tensors: dict[str, torch.Tensor], router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
        group_N = modality_groups(self.model.model.is_image(tensors["input_ids"]), tensors["document_ids"] > 0)
        return count_routed(router_logits, group_N, 2, self.model.config.num_experts_per_tok)

    def bad_step(self, loss: float, norm: float) -> None:
        """Skip the update and count it; too many in a row end the run."""
        self.totals["bad_steps"] += 1
        self.bad_in_a_row += 1
        self.report({"event": "bad_step", "step": self.step, "loss": repr(loss), "grad_norm": repr(norm)})
        if self.bad_in_a_row >= self.config.max_bad_steps:
            self.procs.fail(
                TrainingError(
                    f"loss {loss} and gradient norm {norm} at step {self.step}: {self.bad_in_a_row} steps in a row "
                    "were not finite; lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data"
                )
            )

    def evaluate(self) -> None:
        losses = self.validation.losses(self.model)
        if losses:
            self.report({"event": "validation", "step": self.step, "tokens": int(self.totals["tokens"]), **losses})

    def save(self, wait: bool = False) -> Path | None:
        """Write a resume checkpoint. Several processes write it in the background; `wait` to have it published."""
        places = self.procs.merged(self.loader.state_dict())
        state = {
            "totals": self.totals,
            "bad_in_a_row": self.bad_in_a_row,
            "loader": [places[number] for number in sorted(places)],
            "torch_rng": rng_state(),
        }
        if self.adapters is not None:
            state["base"] = self.opening.base_hash
        if self.log is not None:
            self.log.sync()  # what was told before the checkpoint must not be lost where the checkpoint is not
        if self.saves is not None:
            self.publish(wait=True)
            self.saves.begin(
                self.step, self.model, self.processor, self.optimizer, self.run_record(), state,
                adapted=self.adapters is not None,
            )  # fmt: skip
            return self.publish(wait)
        path = save_resume(
            self.out / "checkpoints", self.step, self.config.keep, self.config.save_at, self.model, self.processor,
            self.optimizer, self.run_record(), state, self.adapters,
        )  # fmt: skip
        self.report({"event": "saved", "step": self.step, "path": str(path)}, log=False)
        return path

    def publish(self, wait: bool = False) -> Path | None:
        """Publish the resume checkpoint that is being written, if it is done; `wait` for it."""
        path = self.saves.publish(wait) if self.saves is not None else None
        if path is not None:
            self.report({"event": "saved", "step": step_of(path), "path": str(path)}, log=False)
        return path

    def run_record(self) -> dict[str, Any]:
        """`run.json`: what was trained, on how much, and how it went."""
        counts = count_params(self.model.config)
        text_tokens = int(self.totals["tokens"] - self.totals["image_tokens"])
        events = self.log.events if self.log is not None else []
        validation = [e for e in events if e["event"] == "validation"]
        data = LoaderStats.over(self.procs.merged({self.procs.rank: self.loader.counts()}).values())
        return {
            "format_version": 1,
            "name": self.config.name,
            "family": self.model.config.family,
            "params": {"total": counts.total, "active": counts.active, "paper": counts.paper},
            "parts": self.parts,
            "peak_lr": self.peak_lr,
            "steps": self.step,
            "tokens": int(self.totals["tokens"]),
            "image_tokens": int(self.totals["image_tokens"]),
            "labels": int(self.totals["labels"]),
            "flops": float(self.totals["flops"]),
            "paper_flops": float(paper_flops(self.model.config, int(self.totals["image_tokens"]), text_tokens)),
            "seconds": self.totals["seconds"],
            "bad_steps": int(self.totals["bad_steps"]),
            "losses": {k: v for k, v in validation[-1].items() if isinstance(v, float)} if validation else {},
            "history": [
                {k: e[k] for k in ("step", "tokens", "flops", "loss")} for e in events if e["event"] == "train"
            ],
            "validation": [{k: v for k, v in e.items() if k != "event"} for e in validation],
            "data": {
                "documents": dict(data.documents),
                "bad": dict(data.bad),
                "padding_share": data.padding_share,
            },
            "config": self.config.to_dict(),
            "hardware": {
                "device": self.device, "processes": self.procs.count, "threads": torch.get_num_threads(),
                "gemm_flops": self.gemm_rate,
            },
            "versions": {"nmm-serve": __version__, "torch": torch.__version__},
        }  # fmt: skip

    @contextlib.contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Let the step in hand finish. A second signal acts at once, but for several processes: torchrun passes on what
        a terminal has sent them all, and has its own end to its patience. Only a main thread may set handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.stop_signal is not None and self.procs.count == 1:
                raise KeyboardInterrupt
            self.stop_signal = number

        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
