"""Images on their way into vLLM: our image processor, and the tokens that stand for an image in the prompt."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)
from vllm.platforms import current_platform

from nmm_serve.chat import IMAGE
from nmm_serve.config import NMMConfig
from nmm_serve.errors import NMMError
from nmm_serve.image_processor import takes_raw_pixels
from nmm_serve.images import load_image
from nmm_serve.processor import NMMProcessor


class NMMDataParser(MultiModalDataParser):
    """Images become RGB by our rules, not by vLLM's, which clip 16-bit grey."""

    def _parse_image_data(self, data):
        if isinstance(data, list):
            data = [self.to_rgb(item) for item in data]
        elif isinstance(data, (Image.Image, MediaWithBytes)):
            data = self.to_rgb(data)
        return super()._parse_image_data(data)

    def to_rgb(self, item: Any) -> Any:
        try:
            if isinstance(item, Image.Image):
                return load_image(item)
            if isinstance(item, MediaWithBytes) and item.io_config:  # vLLM changed its mode
                return dataclasses.replace(item, media=load_image(item.original_bytes))
        except NMMError as error:
            raise VLLMValidationError(str(error)) from error
        return item


class NMMProcessingInfo(BaseProcessingInfo):
    def get_hf_config(self) -> NMMConfig:
        return self.ctx.get_hf_config(NMMConfig)

    def get_hf_processor(self, **kwargs: object) -> NMMProcessor:
        """A client's `mm_processor_kwargs` would feed the model images of a size it was not trained on: refused."""
        if kwargs:
            raise VLLMValidationError(f"this model takes no mm_processor_kwargs, but got {sorted(kwargs)}")
        processor = self.ctx.get_hf_processor(NMMProcessor)
        processor.image_processor.raw_pixels = takes_raw_pixels(current_platform.device_type)
        return processor

    def get_data_parser(self) -> MultiModalDataParser:
        return NMMDataParser(
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().max_image_tokens}


class NMMDummyInputsBuilder(BaseDummyInputsBuilder[NMMProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        size = self.info.get_hf_config().image_size
        images = self._get_dummy_images(width=size, height=size, num_images=mm_counts.get("image", 0))
        return {"image": images}


class NMMMultiModalProcessor(BaseMultiModalProcessor[NMMProcessingInfo]):
    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processor = self.info.get_hf_processor(**hf_kwargs)
        try:
            return processor.image_processor.preprocess(hf_data["images"], return_tensors="pt")
        except NMMError as error:
            raise VLLMValidationError(str(error)) from error

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        grid_I2 = hf_inputs.get("image_grid", torch.empty((0, 2), dtype=torch.long))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grid_I2.prod(-1)),
            "image_grid": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        processor = self.info.get_hf_processor()
        mark = processor.image_token_id

        def image_tokens(index: int) -> PromptUpdateDetails:
            grid_2: Any = out_mm_kwargs["image"][index]["image_grid"].data
            return PromptUpdateDetails.select_token_id(processor.image_ids(int(grid_2.prod())), mark)

        return [PromptReplacement(modality="image", target=[mark], replacement=image_tokens)]

    def _maybe_apply_prompt_updates(self, mm_items, mm_res):
        """vLLM leaves surplus image tokens in the prompt without a word, and fails an assertion on missing ones."""
        num_marks = mm_res.prompt_ids.count(self.info.get_hf_processor().image_token_id)
        num_images = mm_items.get_count("image", strict=False)
        if num_marks != num_images:
            raise VLLMValidationError(
                f"the prompt has {num_marks} {IMAGE} marks but {num_images} images were given; give one for each"
            )
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)
