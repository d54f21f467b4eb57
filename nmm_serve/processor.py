"""Messages and images to token ids and patches: the one implementation, for training and for every engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from nmm_serve.chat import BOS, IMAGE, Part
from nmm_serve.errors import ConfigError, PromptError
from nmm_serve.image_processor import as_pil
from nmm_serve.prompt import Prompt, PromptEncoder, checked


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it. `pixel_values` [P, K] and `image_grid` [I, 2] are None without images."""

    input_ids: list[int]
    pixel_values: torch.Tensor | None = None
    image_grid: torch.Tensor | None = None
    image_s: float = field(default=0.0, compare=False)
    """As in `Prompt`."""


class NMMProcessor(PromptEncoder, ProcessorMixin):
    """Tokenizer and image processor together; prompts come out as tensors."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    @property
    def patch_size(self) -> int:  # type: ignore[override]
        return self.image_processor.patch_size

    @property
    def image_size(self) -> int:  # type: ignore[override]
        return self.image_processor.image_size

    @property
    def pool_image(self) -> bool:  # type: ignore[override]
        return self.image_processor.pool_image

    @property
    def native_resolution(self) -> bool:  # type: ignore[override]
        return self.image_processor.native_resolution

    def encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(checked(text), add_special_tokens=False, split_special_tokens=True)

    def encode_marked(self, text: str) -> list[int]:
        return self.tokenizer.encode(checked(text), add_special_tokens=True)

    def token_id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def to_tensors(self, prompt: Prompt) -> Encoded:
        """Cut the images of a prompt into patches."""
        if not prompt.pixels:
            return Encoded(prompt.input_ids)
        patches, grids = zip(*map(self.image_processor.cut, prompt.pixels), strict=True)
        return Encoded(prompt.input_ids, torch.cat(patches), torch.tensor(grids), prompt.image_s)

    def encode_parts(
        self, parts: Iterable[Part], images: Sequence[Image.Image | Path] = ()
    ) -> tuple[Encoded, list[int]]:
        """`prompt_of_parts` as tensors."""
        prompt, ends = self.prompt_of_parts(parts, images)
        return self.to_tensors(prompt), ends

    def encode_chat(self, messages: Iterable[dict[str, Any]], images: Sequence[Image.Image | Path] = ()) -> Encoded:
        """`prompt_of_chat` as tensors."""
        return self.to_tensors(self.prompt_of_chat(messages, images))

    def encode_prompt(self, prompt: str | Sequence[int], images: Sequence[Image.Image | Path] = ()) -> Encoded:
        """`prompt_of_text` as tensors."""
        return self.to_tensors(self.prompt_of_text(prompt, images))

    def collate(self, prompts: Sequence[Encoded], padding_side: str = "left") -> dict[str, torch.Tensor]:
        """Pad to one length: `input_ids` and `attention_mask` [B, T], and the images of all prompts in order."""
        longest = max(len(p.input_ids) for p in prompts)
        pad_id = self.tokenizer.pad_token_id
        ids, mask = [], []
        for prompt in prompts:
            padding = longest - len(prompt.input_ids)
            row, real = prompt.input_ids, [1] * len(prompt.input_ids)
            left = padding_side == "left"
            ids.append([pad_id] * padding + row if left else row + [pad_id] * padding)
            mask.append([0] * padding + real if left else real + [0] * padding)
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        pixel_values = [p.pixel_values for p in prompts if p.pixel_values is not None]
        image_grids = [p.image_grid for p in prompts if p.image_grid is not None]
        if pixel_values:
            batch |= {"pixel_values": torch.cat(pixel_values), "image_grid": torch.cat(image_grids)}
        return batch

    def __call__(
        self, images=None, text=None, padding_side: str = "left", return_tensors=None, **kwargs
    ) -> BatchFeature:
        """transformers' call: `text` a string or a list of raw prompts, `images` an image, a list, or a list of lists.

        A flat list of images is dealt out to the prompts by their `<|image|>` marks. Prompts are padded to the longest,
        never cut, and begin with `<|bos|>`; ConfigError for `kwargs` that ask for something else.
        """
        texts = list(text) if isinstance(text, (list, tuple)) else [text]
        if not texts or not all(isinstance(t, str) for t in texts):
            raise PromptError(f"text must be a prompt or a list of prompts, not {type(text).__name__}; no token ids")
        self._check_asked(kwargs, texts)
        counts = [t.count(IMAGE) for t in texts]
        flat = _flatten(images)
        if sum(counts) != len(flat):
            raise PromptError(f"the prompts have {sum(counts)} {IMAGE} marks but {len(flat)} images were given")
        if isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images):
            given = [len(_flatten(item)) for item in images]
            if given != counts:
                raise PromptError(f"the prompts have {counts} {IMAGE} marks, but their lists of images have {given}")
        prompts, start = [], 0
        for prompt, count in zip(texts, counts, strict=True):
            prompt = prompt.removeprefix(self.tokenizer.bos_token)  # a rendered chat has it already
            prompts.append(self.encode_prompt(prompt, flat[start : start + count]))
            start += count
        return BatchFeature(data=dict(self.collate(prompts, padding_side)), tensor_type=return_tensors)

    def _check_asked(self, kwargs: dict[str, Any], texts: Sequence[str]) -> None:
        obeyed = {
            "padding": (True, "longest", *([False] if len(texts) == 1 else [])),
            "add_special_tokens": (True, *([False] if all(t.startswith(BOS) for t in texts) else [])),
        }
        for name, value in kwargs.items():
            if value is not None and value not in obeyed.get(name, (False,)):
                raise ConfigError(f"this processor has no {name}={value!r}, and would leave it undone; leave it out")

    def decode(self, ids: Sequence[int], **kwargs) -> str:
        return self.tokenizer.decode(ids, **({"skip_special_tokens": True} | kwargs))


def _flatten(images) -> list:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten(item)]
    return [as_pil(images) if isinstance(images, (np.ndarray, torch.Tensor)) else images]
