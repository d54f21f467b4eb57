"""The training loop: one process, resumable bit for bit."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nmm_serve import __version__
from nmm_serve.checkpoint import load_model, load_processor, save_checkpoint
from nmm_serve.errors import TrainingError
from nmm_serve.image_processor import takes_raw_pixels
from nmm_serve.presets import preset
from nmm_serve.routing import IMAGE, TEXT, count_routed, modality_groups
from nmm_serve.sizing import count_params, paper_flops
from nmm_serve.train.build import build
from nmm_serve.train.config import TrainConfig
from nmm_serve.train.data.loader import PackedLoader
from nmm_serve.train.data.mixture import parse_mixture
from nmm_serve.train.log import RunLog
from nmm_serve.train.optim import build_optimizer, lr_factor, set_lr
from nmm_serve.train.parts import describe_parts, freeze
from nmm_serve.train.resume import load_resume, resume_points, rng_state, save_resume
from nmm_serve.train.run_folder import keep_config, locked
from nmm_serve.train.throughput import batch_work, count_labels, gemm_rate
from nmm_serve.train.validate import Validation

Report = Callable[[dict[str, Any]], None]
"""Called with each event: `start`, `train`, `validation`, `bad_step`, `saved`, `done`."""


def train(config: TrainConfig, out: str | Path, report: Report = lambda event: None) -> Path:
    """Train, or go on where a killed run of the same configuration stopped. Returns the final checkpoint's directory.

    Raises ConfigError, DataError, CheckpointError or TrainingError. SIGTERM and SIGINT save a resume checkpoint and
    raise TrainingError.
    """
    out = Path(out)
    with locked(out):
        keep_config(out, config)
        final = out / "final"
        if final.is_dir():
            report({"event": "done", "step": config.steps, "path": str(final)})
            return final
        trainer = Trainer(config, out, report)
        try:
            trainer.run()
        finally:
            trainer.log.close()
        return final


class Trainer:
    """Model, optimiser, data and counters of one run."""

    def __init__(self, config: TrainConfig, out: Path, report: Report):
        self.config, self.out, self._report = config, out, report
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        bf16 = config.precision == "bf16" or (config.precision == "auto" and self.device == "cuda")
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        torch.manual_seed(config.seed)

        points = resume_points(out / "checkpoints")
        self.mixture = parse_mixture({"sources": config.data.sources}, Path(config.data.root))
        if points:
            self.model, self.processor = load_model(points[-1]), load_processor(points[-1])
        else:
            self.model, self.processor = build(config, self.mixture)
        self.processor.image_processor.raw_pixels = takes_raw_pixels(self.device)
        self.model.to(self.device).train()
        freeze(self.model, config.optimizer)
        self.parts = describe_parts(self.model, config.optimizer)
        self.optimizer = build_optimizer(self.model, config.optimizer, self.peak_lr)
        state = load_resume(points[-1], self.model, self.optimizer) if points else {}
        self.forward = torch.compile(self.model, dynamic=True) if config.compile else self.model

        self.step: int = state.get("step", 0)
        self.totals: dict[str, float] = state.get("totals") or {
            "tokens": 0, "image_tokens": 0, "labels": 0, "flops": 0, "paper_flops": 0, "seconds": 0.0, "bad_steps": 0,
        }  # fmt: skip
        self.bad_in_a_row: int = state.get("bad_in_a_row", 0)
        self.loader = PackedLoader(
            self.mixture,
            self.processor,
            context_length=config.context_length,
            rows=config.rows,
            objective=config.objective,
            seed=config.seed,
            num_workers=config.data.workers,
            max_bad_share=config.data.max_bad_share,
            state=state.get("loader"),
        )
        self.validation = Validation(config, self.processor, self.device, self.dtype)
        self.log = RunLog(out, self.step)
        self.gemm_rate = gemm_rate(self.device, self.dtype)
        self.stop_signal: int | None = None

    @property
    def peak_lr(self) -> float:
        return self.config.optimizer.lr or preset(self.config.model.preset).peak_lr

    def report(self, event: dict[str, Any]) -> None:
        self.log.write(event)
        self._report(event)

    def run(self) -> None:
        config, counts = self.config, count_params(self.model.config)
        self._report(
            {
                "event": "start", "step": self.step, "steps": config.steps, "family": self.model.config.family,
                "params": counts.total, "active_params": counts.active, "device": self.device,
                "trained_params": sum(part["trained"] for part in self.parts.values()),
                "dtype": str(self.dtype).removeprefix("torch."), "gemm_flops": self.gemm_rate,
            }
        )  # fmt: skip
        with self.catch_signals():
            while self.step < config.steps:
                metrics = self.train_step()
                if self.is_logged(self.step):
                    self.report(metrics)
                if self.step % config.eval_every == 0 or self.step == config.steps:
                    self.evaluate()
                if self.stop_signal is not None:
                    path = self.save()
                    name = signal.Signals(self.stop_signal).name
                    raise TrainingError(
                        f"stopped by {name} after step {self.step}; {path} is saved: run the same command to go on"
                    )
                regular = self.step % config.save_every == 0 and self.step < config.steps
                if regular or self.step in config.save_at:
                    self.save()
        save_checkpoint(self.out / "final", self.model, self.processor, self.run_record())
        self._report({"event": "done", "step": self.step, "path": str(self.out / "final")})

    def train_step(self) -> dict[str, Any]:
        """One optimiser step over `accumulate` batches, each token weighing the same."""
        begin = time.perf_counter()
        waited = self.loader.stats.wait_seconds
        batches = [next(self.loader) for _ in range(self.config.accumulate)]
        num_labels = sum(count_labels(b) for b in batches)
        work = [batch_work(self.model.config, b) for b in batches]
        ce_loss, router_losses = 0.0, dict[str, float]()
        # the routers' logits exist anyway; asked for in every step, so that a compiled model stays one graph
        sparse = self.model.config.num_experts > 0
        routed: torch.Tensor | None = None
        for batch in batches:
            tensors = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                output = self.forward(**tensors, num_items_in_batch=num_labels, output_router_logits=sparse)
            output.loss.backward()
            ce_loss += output.ce_loss.item()
            for name in ("aux_loss", "z_loss"):
                if (value := getattr(output, name)) is not None:
                    router_losses[name] = router_losses.get(name, 0.0) + value.item()
            if sparse and self.is_logged(self.step + 1):
                counts = self.count_routed(tensors, output.router_logits)
                routed = counts if routed is None else routed + counts
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip).item()
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
        for done in work:
            for key, value in done.items():
                self.totals[key] += value
        metrics: dict[str, Any] = {
            "event": "train",
            "step": self.step,
            "loss": ce_loss,
            "grad_norm": norm,
            "lr": self.peak_lr * factor,
            "tokens": int(self.totals["tokens"]),
            "flops": float(self.totals["flops"]),
            "tokens_per_s": sum(w["tokens"] for w in work) / seconds,
            "mfu": sum(w["flops"] for w in work) / seconds / self.gemm_rate,
            "data_wait": (self.loader.stats.wait_seconds - waited) / seconds,
        }
        if routed is not None:
            # [layer][expert]: how many image and text tokens of this step each expert was given
            metrics["routed"] = {"image": routed[:, IMAGE].tolist(), "text": routed[:, TEXT].tolist()}
        return metrics | router_losses

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
            raise TrainingError(
                f"loss {loss} and gradient norm {norm} at step {self.step}: {self.bad_in_a_row} steps in a row "
                "were not finite; lower optimizer.lr, lengthen schedule.warmup_steps, or look at the data"
            )

    def evaluate(self) -> None:
        losses = self.validation.losses(self.model)
        if losses:
            self.report({"event": "validation", "step": self.step, "tokens": int(self.totals["tokens"]), **losses})

    def save(self) -> Path:
        state = {
            "totals": self.totals,
            "bad_in_a_row": self.bad_in_a_row,
            "loader": self.loader.state_dict(),
            "torch_rng": rng_state(),
        }
        path = save_resume(
            self.out / "checkpoints", self.step, self.config.keep, self.config.save_at, self.model, self.processor,
            self.optimizer, self.run_record(), state,
        )  # fmt: skip
        self._report({"event": "saved", "step": self.step, "path": str(path)})
        return path

    def run_record(self) -> dict[str, Any]:
        """`run.json`: what was trained, on how much, and how it went."""
        counts = count_params(self.model.config)
        text_tokens = int(self.totals["tokens"] - self.totals["image_tokens"])
        validation = [e for e in self.log.events if e["event"] == "validation"]
        return {
            "format_version": 1,
            "name": self.config.name,
            "family": self.model.config.family,
            "params": {"total": counts.total, "active": counts.active, "paper": counts.paper},
            "parts": self.parts,
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
                {k: e[k] for k in ("step", "tokens", "flops", "loss")} for e in self.log.events if e["event"] == "train"
            ],
            "validation": [{k: v for k, v in e.items() if k != "event"} for e in validation],
            "data": {
                "documents": dict(self.loader.stats.documents),
                "bad": dict(self.loader.stats.bad),
                "padding_share": self.loader.stats.padding_share,
            },
            "config": self.config.to_dict(),
            "hardware": {"device": self.device, "threads": torch.get_num_threads(), "gemm_flops": self.gemm_rate},
            "versions": {"nmm-serve": __version__, "torch": torch.__version__},
        }

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Let the step in hand finish; a second signal acts at once. Only a main thread may set handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number

        old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
