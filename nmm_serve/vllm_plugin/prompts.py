"""Token ids and images to what vLLM's engine takes, without vLLM's own way there.

That way takes a small model's time for a step, in the thread that would run it, and keeps what it did in a cache of
two halves, one before the engine and one in it. Both must see the same requests in the same order, so a prompt that was
made ahead and then not handed over breaks the next one. What is made here is the same but for the hash, in any thread,
at any time (tests/nmm_serve/test_vllm.py).
"""

import hashlib
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from vllm.inputs import tokens_input
from vllm.inputs.engine import mm_input
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange

from nmm_serve.errors import PromptError
from nmm_serve.images import fit_to_patches
from nmm_serve.processor import NMMProcessor
from nmm_serve.vllm_plugin.processing import NMMMultiModalProcessor

CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Patches:
    """One image as the model takes it."""

    item: MultiModalKwargsItem
    digest: str
    """Of the scaled pixels: vLLM encodes images of one digest once."""
    num_patches: int
    num_bytes: int


class Prompts:
    """Prompts for one engine.

    Args:
        processor: vLLM's, which knows whether the model takes pixels or patches. None: the engine is text-only.
        keep_images: keep the patches of recent images, up to a gigabyte.
        know_images: let vLLM see that two images are the same; else each is new to it.
    """

    def __init__(self, processor: NMMMultiModalProcessor | None, keep_images: bool, know_images: bool):
        self.vllm_processor = processor
        self.keep_images, self.know_images = keep_images, know_images
        self._kept: OrderedDict[Any, Patches] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    @cached_property
    def processor(self) -> NMMProcessor:
        """Ours. Raises PromptError in a text-only engine: only images need it."""
        if self.vllm_processor is None:
            raise PromptError("this engine is text-only (limit_mm_per_prompt allows no image); raise that limit")
        return self.vllm_processor.info.get_hf_processor()

    def make(self, marked: Sequence[int], images: Sequence[Patches]) -> Any:
        """Token ids with one mark an image, and as many images, to vLLM's engine input.

        Raises vLLM's VLLMValidationError, a ValueError, for more images than the engine takes in a prompt.
        """
        if not images:
            return tokens_input(list(marked))
        assert self.vllm_processor is not None, "its patches were made with it"
        self.vllm_processor.info.validate_num_items("image", len(images))
        mark, rest = self.processor.image_token_id, iter(images)
        ids: list[int] = []
        places = []
        for token in marked:
            if token != mark:
                ids.append(token)
                continue
            tokens = self.processor.image_ids(next(rest).num_patches)
            places.append(PlaceholderRange(len(ids), len(tokens), torch.tensor(tokens) == mark))
            ids += tokens
        return mm_input(
            ids,
            MultiModalKwargsItems({"image": [image.item for image in images]}),
            {"image": [image.digest if self.know_images else uuid.uuid4().hex for image in images]},
            {"image": places},
        )

    def patches(self, image: Any) -> Patches:
        """An image, or its file, scaled and cut. Raises ImageError, and PromptError in a text-only engine."""
        named = _file_key(image) if self.keep_images and isinstance(image, Path) else None
        if named is not None and (found := self._find(named)):
            return found
        p = self.processor
        pixels_HWC = fit_to_patches(image, p.patch_size, p.image_size, p.native_resolution)
        digest = hashlib.blake2b(f"{pixels_HWC.shape} ".encode() + pixels_HWC.tobytes(), digest_size=32).hexdigest()
        made = self._find(digest) if self.keep_images else None
        if made is None:
            made = self._cut(pixels_HWC, digest)
        if self.keep_images:
            self._keep(digest, made)
            if named is not None:
                self._keep(named, made)
        return made

    def _cut(self, pixels_HWC: np.ndarray, digest: str) -> Patches:
        patches_PK, grid = self.processor.image_processor.cut(pixels_HWC)
        assert self.vllm_processor is not None, "`processor` has refused"
        features = BatchFeature({"pixel_values": patches_PK, "image_grid": torch.tensor([grid])})
        fields = self.vllm_processor._get_mm_fields_config(features, {})
        (item,) = MultiModalKwargsItems.from_hf_inputs(features, fields)["image"]
        return Patches(item, digest, len(patches_PK), patches_PK.nbytes)

    def _find(self, key: Any) -> Patches | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: Any, made: Patches) -> None:
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = made
            self._kept_bytes += made.num_bytes  # twice for a file: under its name and its digest
            while self._kept_bytes > CACHE_BYTES:
                self._kept_bytes -= self._kept.popitem(last=False)[1].num_bytes


def _file_key(file: Path) -> tuple[Path, int, int] | None:
    """None for a file that is not there, which reading it tells."""
    try:
        found = file.stat()
    except OSError:
        return None
    return file, found.st_mtime_ns, found.st_size
