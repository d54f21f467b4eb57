"""Adapters on a frozen decoder, through PEFT: low-rank updates of its matrices (LoRA) and one trained token.

They are trained beside the weights and merged into them in every checkpoint, so that each engine opens it as any other.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nmm_serve.chat import IMAGE_START
from nmm_serve.checkpoint import load_model
from nmm_serve.errors import ConfigError
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.train.config import TrainConfig
from nmm_serve.train.distributed import Processes

SOFT_TOKEN = IMAGE_START
"""The token whose embedding is the soft token: it stands before every image, in every engine."""


def has_adapters(config: TrainConfig) -> bool:
    return config.lora is not None or config.soft_token


class Adapters:
    """The adapters of one model.

    Args:
        model: gets the adapters put in place; its parameters keep their names but for the wrapped ones.
        base: checkpoint of the model as it is without them, which PEFT's files name. It must be there when the
            model is spread over several processes and a whole one is asked for.

    Raises ConfigError for a target that the decoder does not have, or when PEFT is not installed.
    """

    def __init__(self, model: NMMForConditionalGeneration, config: TrainConfig, soft_token_id: int, base: Path):
        try:
            import peft
        except ImportError:
            raise ConfigError("lora and soft_token need PEFT; run pip install 'nmm-serve[train]'") from None
        settings: Any
        if config.lora is None:
            settings = peft.TrainableTokensConfig(token_indices=[soft_token_id], target_modules=["embed_tokens"])
        else:
            settings = peft.LoraConfig(
                r=config.lora.rank,
                lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it
                target_modules=_pattern(model, config.lora.targets),
                trainable_token_indices={"embed_tokens": [soft_token_id]} if config.soft_token else None,
            )
        self._config, self._soft_token_id, self._base, self._model = config, soft_token_id, base, model
        self._wrapped = peft.get_peft_model(model, settings)
        self._wrapped.peft_config["default"].base_model_name_or_path = str(base)

    def whole(self, procs: Processes) -> "Adapters":
        """These adapters on a model with all its weights, in the main process; every process must call.

        Several processes hold shards of the model: only what was trained is put together, and the rest read again.
        """
        if procs.strategy == "none":
            return self
        trained = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
            for name, value in trained_tensors(self._model).items()
        }
        if not procs.main:
            return self
        model = load_model(self._base).float()
        adapters = Adapters(model, self._config, self._soft_token_id, self._base)
        model.load_state_dict(trained, strict=False)
        return adapters

    def merged(self) -> NMMForConditionalGeneration:
        """A copy of the model with the adapters merged into its weights."""
        return copy.deepcopy(self._wrapped).merge_and_unload()

    def save(self, folder: Path) -> None:
        """The adapters alone, in PEFT's own files."""
        self._wrapped.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form


def _pattern(model: NMMForConditionalGeneration, targets: tuple[str, ...]) -> str:
    """The decoder's layers of these names: those of an encoder are called the same."""
    known = {
        name.rsplit(".", 1)[1]
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("mlp.gate")
    }
    if unknown := [name for name in targets if name not in known]:
        hint = "; the stacked experts of a mixture take none" if model.config.num_experts else ""
        raise ConfigError(
            f"lora.targets: this decoder has no linear layer {unknown[0]!r}; it has {', '.join(sorted(known))}{hint}"
        )
    return rf"model\.layers\.\d+\..*\.({'|'.join(targets)})"


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: with the model it started from, the whole state of the weights."""
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
