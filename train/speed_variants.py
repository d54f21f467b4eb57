"""The processes of the speed measurement: our trainer, and a plain Hugging Face Trainer on the same documents.

Legend: T tokens.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from nmm_serve.config import NMMConfig
from nmm_serve.errors import NMMError, TrainingError
from nmm_serve.presets import preset as named_preset
from nmm_serve.sizing import count_params
from nmm_serve.train.build import build
from nmm_serve.train.config import TrainConfig, config_from
from nmm_serve.train.data.encoding import NO_LOSS
from nmm_serve.train.data.loader import PackedLoader
from nmm_serve.train.data.mixture import parse_mixture
from nmm_serve.train.data.packing import Batch
from nmm_serve.train.loop import Trainer
from nmm_serve.train.throughput import batch_work, gemm_rate

Variant = Literal["dense", "hf_padded", "hf_packed", "moe"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

Tensors = dict[str, torch.Tensor]
KIB = 1024


def speed_config(preset: str, variant: str, rows: int, context_length: int) -> TrainConfig:
    """A run on built-in data in the paper's mixture. Raises ConfigError for a preset that does not exist."""
    named_preset(preset)
    kinds = (("caption", 45), ("interleaved", 45), ("text", 10))
    return config_from(
        {
            "steps": 1_000_000,
            "rows": rows,
            "context_length": context_length,
            "model": {"preset": preset, "family": "moe" if variant == "moe" else "early"},
            "tokenizer": {"documents": 200},
            "data": {"sources": [{"name": k, "kind": "builtin", "which": k, "weight": w} for k, w in kinds]},
        }
    )


class Turns:
    """A variant's end of the pipe: it waits for its turn, and tells what the step was and how long it took."""

    def __init__(self, pipe: Connection, device: str, dtype: torch.dtype):
        self._pipe, self._device, self._dtype = pipe, device, dtype
        self.peak_gpu_bytes = 0

    def ready(self, config: NMMConfig, parameters: int) -> None:
        counts = count_params(config)
        assert counts.total == parameters, "the closed form counts another model"
        self._pipe.send(
            {
                "parameters": counts.total,
                "active": counts.active,
                "device": self._device,
                "dtype": str(self._dtype).removeprefix("torch."),
            }
        )

    def begin(self) -> bool:
        """Wait; False when there is no further step."""
        if self._pipe.recv() != "step":
            return False
        self._rate = gemm_rate(self._device, self._dtype)
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what was multiplied for the rate is not the step's
        self._start = time.perf_counter()
        return True

    def end(self, loss: float, work: dict[str, int], positions: int, data_wait: float | None = None) -> None:
        """`positions`: of the batch, padding included. `data_wait`: share of the step that waited for data."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            self.peak_gpu_bytes = max(self.peak_gpu_bytes, torch.cuda.max_memory_allocated())
        seconds = time.perf_counter() - self._start
        rate = (self._rate + gemm_rate(self._device, self._dtype)) / 2
        answer = {"seconds": seconds, "loss": loss, "tokens": work["tokens"], "flops": work["flops"]}
        self._pipe.send(answer | {"padding": positions - work["tokens"], "gemm_flops": rate, "data_wait": data_wait})


def work(pipe: Connection, variant: Variant, setup: dict[str, Any]) -> None:
    """The body of a variant's process: builds, then takes one step whenever it is told "step".

    It sends what it built, what each step was, and at the end what memory it held; or {"error": message}.
    """
    os.dup2(2, 1)  # what libraries print must not get between the parent's results
    torch.set_num_threads(setup["threads"])
    # one GPU: with several, Hugging Face's Trainer would take them all, and cut our batches apart
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    libraries = resident_bytes("VmRSS")
    config = speed_config(setup["preset"], variant, setup["rows"], setup["context_length"])
    try:
        with tempfile.TemporaryDirectory(prefix="nmm-speed-") as folder:
            if variant in ("dense", "moe"):
                gpu_peak = our_steps(pipe, config, Path(folder))
            else:
                gpu_peak = hugging_face_steps(pipe, config, Path(folder), setup["steps"], padded=variant == "hf_padded")
    except NMMError as error:
        pipe.send({"error": str(error)})
        return
    if torch.cuda.is_available():
        pipe.send({"peak_bytes": gpu_peak, "libraries_bytes": 0})
    else:
        pipe.send({"peak_bytes": resident_bytes("VmHWM"), "libraries_bytes": libraries})


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int | None:
    """Resident memory of this process now, or the most it ever held. None where /proc does not tell.

    Not getrusage's maximum: that one is inherited from the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith(field + ":")), None)


def our_steps(pipe: Connection, config: TrainConfig, folder: Path) -> int:
    """The step of `nmm-train run`. Returns the most bytes that a step held on a GPU."""
    trainer = Trainer(config, folder, lambda event: None)
    turns = Turns(pipe, trainer.device, trainer.dtype)
    turns.ready(trainer.model.config, trainer.model.num_parameters())
    positions = config.rows * config.context_length
    while turns.begin():
        before = dict(trainer.totals)
        metrics = trainer.train_step()
        work = {key: int(trainer.totals[key] - before[key]) for key in ("tokens", "flops")}
        turns.end(metrics["loss"], work, positions, metrics["data_wait"])
    trainer.loader.close()
    trainer.close()
    return turns.peak_gpu_bytes


def hugging_face_steps(pipe: Connection, config: TrainConfig, folder: Path, steps: int, *, padded: bool) -> int:
    """What somebody would write who has the model class, the documents and transformers.Trainer. Returns as above.

    Raises TrainingError where accelerate is missing: the Trainer refuses to start without.
    """
    import transformers

    if not transformers.utils.is_accelerate_available():
        raise TrainingError(
            "transformers.Trainer needs accelerate; run pip install 'nmm-serve[train]', or time dense and moe alone"
        )
    transformers.utils.logging.set_verbosity_error()
    mixture = parse_mixture({"sources": config.data.sources}, Path(config.data.root))
    torch.manual_seed(config.seed)
    model, processor = build(config, mixture)
    loader = PackedLoader(
        mixture, processor, context_length=config.context_length, rows=config.rows, objective=config.objective,
        seed=config.seed,
    )  # fmt: skip
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    amounts = [batch_work(model.config, batch) for batch in batches]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pad_id = processor.tokenizer.pad_token_id
    examples = [documents_of(batch, model.config) if padded else [tensors_of(batch)] for batch in batches]
    turns = Turns(pipe, device, torch.bfloat16 if device == "cuda" else torch.float32)

    class Keeping(transformers.Trainer):
        """Remembers the loss, which the defaults would show every 500 steps, and the positions."""

        def training_step(self, model, inputs, *args, **kwargs):
            self.positions = inputs["input_ids"].numel()
            self.loss = super().training_step(model, inputs, *args, **kwargs)
            return self.loss

    class TakeTurns(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.begin()

        def on_step_end(self, args, state, control, **kwargs):
            turns.end(trainer.loss.item(), amounts[state.global_step - 1], trainer.positions)
            control.should_training_stop = not turns.begin()

    trainer = Keeping(
        model,
        transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=1,  # an example is the documents of one of our batches
            train_sampling_strategy="sequential",
            max_steps=steps,
            bf16=device == "cuda",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=lambda examples: pad(examples[0], pad_id) if padded else examples[0][0],
        train_dataset=examples,
        callbacks=[TakeTurns()],
    )
    turns.ready(model.config, model.num_parameters())
    trainer.train()
    return turns.peak_gpu_bytes


def tensors_of(batch: Batch) -> Tensors:
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def documents_of(batch: Batch, config: NMMConfig) -> list[Tensors]:
    """Take a packed batch apart: each document's `input_ids` and `labels` [T] and its own images."""
    pixels = batch["pixel_values"]
    grids = [] if batch["image_grid"] is None else batch["image_grid"].tolist()
    documents: list[Tensors] = []
    patch = image = 0
    for ids_T, labels_T, document_T in zip(batch["input_ids"], batch["labels"], batch["document_ids"], strict=True):
        for number in range(1, int(document_T.max()) + 1):
            found = {"input_ids": ids_T[document_T == number], "labels": labels_T[document_T == number]}
            patches = int((found["input_ids"] == config.image_token_id).sum())
            if patches and pixels is not None:
                first_patch, first_image = patch, image
                while patch < first_patch + patches:
                    patch += grids[image][0] * grids[image][1]
                    image += 1
                found["pixel_values"] = pixels[first_patch:patch]
                found["image_grid"] = torch.tensor(grids[first_image:image])
            documents.append(found)
    return documents


def pad(documents: Sequence[Tensors], pad_id: int) -> Tensors:
    """The usual collator: every document a row, as long as the longest."""
    from torch.nn.utils.rnn import pad_sequence

    ids = [d["input_ids"] for d in documents]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence([d["labels"] for d in documents], batch_first=True, padding_value=NO_LOSS),
    }
    for name in ("pixel_values", "image_grid"):
        if images := [d[name] for d in documents if name in d]:
            batch[name] = torch.cat(images)
    return batch
