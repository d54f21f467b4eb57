"""A checkpoint with random weights, small enough to make in a second."""

from pathlib import Path

import torch

from nmm_serve.checkpoint import save_checkpoint
from nmm_serve.config import NMMConfig
from nmm_serve.image_processor import NMMImageProcessor
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.processor import NMMProcessor
from nmm_serve.tokenizer import token_ids, train_tokenizer

WORDS = ["what is the colour of the circle ? red green blue", "describe the image . a large square and a small circle"]


def make_checkpoint(path: Path, **config) -> Path:
    """Early fusion unless `config` says otherwise; the same weights each time."""
    tokenizer = train_tokenizer(WORDS * 10, 300)
    fields = {
        "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "patch_size": 8, "image_size": 64,
        "max_position_embeddings": 512,
    }  # fmt: skip
    fields |= token_ids(tokenizer) | config
    names = ("patch_size", "image_size", "native_resolution")
    images = NMMImageProcessor(**{name: fields[name] for name in names if name in fields})
    torch.manual_seed(0)
    model = NMMForConditionalGeneration(NMMConfig(**fields))
    processor = NMMProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    save_checkpoint(path, model, processor, {"tokens": 1000, "loss": 2.5})
    return path


def empty_checkpoint(folder: Path) -> Path:
    """The files of a checkpoint and nothing in them: enough to be named in a record."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "nmm"}')
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for name in ("tokenizer.json", "processor_config.json"):
        (folder / name).write_text("{}")
    return folder
