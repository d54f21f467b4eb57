"""Chat messages to token ids in vLLM's server, by the same code as in training.

vLLM renders a chat template to a string and tokenizes that, so a user who types `<|assistant|>` puts words into the
model's mouth. Here text stays text.
"""

import copy
from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.utils.async_utils import make_async

from nmm_serve.chat import IMAGE, Part, message_parts
from nmm_serve.errors import NMMError
from nmm_serve.processor import NMMProcessor


def chat_parts(messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[Part]:
    """The parts of a chat as vLLM's clients give it, with its two template options.

    Raises PromptError for roles, contents and options that the chat format does not have.
    """
    if options.get("tools"):
        raise VLLMValidationError("this model does not call tools; send the request without them", parameter="tools")
    messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    parts = [part for _, part in message_parts(messages, options.get("add_generation_prompt", True))]
    if options.get("continue_final_message"):
        if not messages or messages[-1]["role"] != "assistant":
            raise VLLMValidationError("continue_final_message needs a last message by the assistant")
        parts.pop()  # its end token
    return parts


class NMMRenderer(HfRenderer):
    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self.processor: Any = None
        if tokenizer is not None:
            # its own copy: encoding text without special tokens switches a setting inside the tokenizer
            self.processor = NMMProcessor.from_pretrained(
                config.model_config.model, tokenizer=copy.deepcopy(tokenizer), local_files_only=True
            )
        self._to_prompt_async = make_async(self._to_prompt, executor=self._executor)

    def _to_prompt(self, conversation, mm_data, mm_uuids, params: ChatParams) -> TokensPrompt:
        try:
            ids = self.processor.parts_to_ids(chat_parts(conversation, params.chat_template_kwargs))
        except NMMError as error:
            raise VLLMValidationError(str(error), parameter="messages") from error
        prompt = TokensPrompt(prompt_token_ids=ids)
        if mm_data is not None:
            prompt["multi_modal_data"] = mm_data
        if mm_uuids is not None:
            prompt["multi_modal_uuids"] = mm_uuids
        return prompt

    def _is_foreign(self, params: ChatParams) -> bool:
        """The operator brought a chat template or prompt embeddings: vLLM's own way."""
        return self.processor is None or params.chat_template is not None or self.model_config.enable_prompt_embeds

    def _process_tokens(self, prompt, **kwargs):
        self._check_marks(prompt)
        return super()._process_tokens(prompt, **kwargs)

    async def _process_tokens_async(self, prompt, **kwargs):
        self._check_marks(prompt)
        return await super()._process_tokens_async(prompt, **kwargs)

    def _check_marks(self, prompt) -> None:
        """vLLM counts images only where there are some: a raw prompt could hold a mark that nothing stands behind."""
        num_marks = prompt["prompt_token_ids"].count(self.model_config.hf_config.image_token_id)
        if num_marks and not prompt.get("multi_modal_data"):
            raise VLLMValidationError(f"the prompt has {num_marks} {IMAGE} marks but no images were given")

    def render_messages(self, messages, params):
        if self._is_foreign(params):
            return super().render_messages(messages, params)
        conversation, mm_data, mm_uuids = parse_chat_messages(
            messages, self.model_config, "openai", params.media_io_kwargs, params.mm_processor_kwargs
        )
        return conversation, self._to_prompt(conversation, mm_data, mm_uuids, params)

    async def render_messages_async(self, messages, params):
        if self._is_foreign(params):
            return await super().render_messages_async(messages, params)
        conversation, mm_data, mm_uuids = await parse_chat_messages_async(
            messages, self.model_config, "openai", params.media_io_kwargs, params.mm_processor_kwargs
        )
        return conversation, await self._to_prompt_async(conversation, mm_data, mm_uuids, params)
