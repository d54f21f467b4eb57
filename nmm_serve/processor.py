"""Messages and images to token ids and patches: the one implementation, for training and for every engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from nmm_serve.chat import IMAGE, IMAGE_END, IMAGE_START, ImageSlot, Part, Special, message_parts
from nmm_serve.errors import PromptError


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it. `pixel_values` [P, K] and `image_grid` [I, 2] are None without images."""

    input_ids: list[int]
    pixel_values: torch.Tensor | None = None
    image_grid: torch.Tensor | None = None


class NMMProcessor(ProcessorMixin):
    """Tokenizer and image processor together."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def encode_text(self, text: str) -> list[int]:
        """Plain text; characters that spell a special token stay characters."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def image_ids(self, num_tokens: int) -> list[int]:
        """Start, one placeholder a patch, end."""
        start, patch, end = self.tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE, IMAGE_END])
        return [start, *[patch] * num_tokens, end]

    def encode_parts(self, parts: Iterable[Part], images: Sequence[Image.Image] = ()) -> tuple[Encoded, list[int]]:
        """Encode parts in order, taking images as their slots come up.

        Returns the encoding and, for each part, the position where it ends.

        Raises PromptError when slots and images differ in number.
        """
        ids: list[int] = []
        patches, grids, ends, used = [], [], [], 0
        for part in parts:
            if isinstance(part, ImageSlot):
                if used < len(images):
                    patches_PK, grid = self.image_processor.patches(images[used])
                    patches.append(patches_PK)
                    grids.append(grid)
                    ids += self.image_ids(len(patches_PK))
                used += 1
            elif isinstance(part, Special):
                ids.append(self.tokenizer.convert_tokens_to_ids(str(part)))
            else:
                ids += self.encode_text(part)
            ends.append(len(ids))
        if used != len(images):
            raise PromptError(
                f"the prompt has {used} image places but {len(images)} images were given; give one image for each"
            )
        if not patches:
            return Encoded(ids), ends
        return Encoded(ids, torch.cat(patches), torch.tensor(grids)), ends

    def encode_chat(self, messages: Iterable[dict[str, Any]], images: Sequence[Image.Image] = ()) -> Encoded:
        """A chat up to the assistant's turn."""
        return self.encode_parts([part for _, part in message_parts(messages, True)], images)[0]

    def encode_prompt(self, prompt: str, images: Sequence[Image.Image] = ()) -> Encoded:
        """A raw prompt: `<|image|>` marks each image, special tokens in it are special, `<|bos|>` is put before it."""
        ids: list[int] = []
        patches, grids = [], list[tuple[int, int]]()
        for token in self.tokenizer.encode(prompt, add_special_tokens=True):
            if token != self.image_token_id:
                ids.append(token)
            else:
                if len(grids) < len(images):
                    patches_PK, grid = self.image_processor.patches(images[len(grids)])
                    patches.append(patches_PK)
                    ids += self.image_ids(len(patches_PK))
                    grids.append(grid)
                else:
                    grids.append((0, 0))
        if len(grids) != len(images):
            raise PromptError(
                f"the prompt has {len(grids)} {IMAGE} marks but {len(images)} images were given; give one for each"
            )
        if not patches:
            return Encoded(ids)
        return Encoded(ids, torch.cat(patches), torch.tensor(grids))

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

        A flat list of images is dealt out to the prompts by their `<|image|>` marks.
        """
        texts = [text] if isinstance(text, str) else list(text)
        flat = _flatten(images)
        counts = [t.count(IMAGE) for t in texts]
        if sum(counts) != len(flat):
            raise PromptError(f"the prompts have {sum(counts)} {IMAGE} marks but {len(flat)} images were given")
        prompts, start = [], 0
        for prompt, count in zip(texts, counts, strict=True):
            prompt = prompt.removeprefix(self.tokenizer.bos_token)  # a rendered chat has it already
            prompts.append(self.encode_prompt(prompt, flat[start : start + count]))
            start += count
        return BatchFeature(data=dict(self.collate(prompts, padding_side)), tensor_type=return_tensors)

    def decode(self, ids: Sequence[int], **kwargs) -> str:
        return self.tokenizer.decode(ids, **({"skip_special_tokens": True} | kwargs))


def _flatten(images) -> list:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flatten(item)]
    return [images]
