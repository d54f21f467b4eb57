"""The chat format: special tokens, the template, and messages to parts."""

from collections.abc import Iterable, Sequence
from typing import Any

from nmm_serve.errors import PromptError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
IMAGE_START, IMAGE, IMAGE_END = "<|image_start|>", "<|image|>", "<|image_end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE_START, IMAGE, IMAGE_END, *ROLES.values())

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('unknown role ' ~ message['role'] ~ '; use system, user or assistant') -}}
    {%- endif -%}
    {{- '<|' ~ message['role'] ~ '|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in ['image', 'image_url', 'input_image'] -%}
                {{- '<|image|>' -}}
            {%- elif part['type'] in ['text', 'input_text'] -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('unknown content part ' ~ part['type'] ~ '; use text or image') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


class Special(str):
    """A special token, as opposed to text that happens to spell one."""


class ImageSlot:
    """The place of the next image."""


Part = str | Special | ImageSlot


def message_parts(messages: Iterable[dict[str, Any]], add_generation_prompt: bool = False) -> list[tuple[str, Part]]:
    """(role, part) pairs; `CHAT_TEMPLATE` renders the same sequence as a string.

    Text stays text: a user who types `<|image|>` gets those characters, not a special token.
    The end token belongs to the assistant, so a loss on the assistant's parts teaches it to stop.
    """
    parts: list[tuple[str, Part]] = [("system", Special(BOS))]
    messages = list(messages)
    if not messages:
        raise PromptError("a chat without messages; give at least one")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise PromptError(f"unknown role {role!r}; use one of {', '.join(ROLES)}")
        # the role marker is a prompt even when the assistant's words are a target
        parts.append(("user" if role == "assistant" else role, Special(ROLES[role])))
        parts.extend((role, part) for part in _content_parts(content))
        if role == "assistant":
            parts.append((role, Special(EOS)))
    if add_generation_prompt:
        parts.append(("user", Special(ROLES["assistant"])))
    return parts


def _content_parts(content: str | Sequence[dict[str, Any]] | None) -> list[Part]:
    if isinstance(content, str):
        return [content] if content else []
    if content is None:
        raise PromptError("a message has no content; give a string or a list of text and image parts")
    parts: list[Part] = []
    for part in content:
        kind = part.get("type")
        if kind in ("image", "image_url", "input_image"):
            parts.append(ImageSlot())
        elif kind in ("text", "input_text"):
            # neighbouring texts are one text, as in the template: the tokenizer may merge across the seam
            if parts and type(parts[-1]) is str:
                parts[-1] += part["text"]
            elif part["text"]:
                parts.append(part["text"])
        else:
            raise PromptError(f"unknown content part {kind!r}; use text or image")
    return parts
