"""lm-eval's contexts and continuations to token ids, for an engine here or behind a URL.

What a task says stays text: characters that spell a special token are characters, not a special token. (A server's
tokenizer knows no such difference.) `<image>` is lm-eval's mark for an image; it counts only where a task has images.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from nmm_serve.chat import BOS, ImageSlot, Part, Special, message_parts
from nmm_serve.engines.openai import OpenAIEngine
from nmm_serve.errors import NMMError, PromptError
from nmm_serve.prompt import PromptEncoder

IMAGE_MARK = "<image>"

Ids = list[int]


class ChatContext(str):
    """A rendered chat: the string that lm-eval shows, logs and hashes, and the messages that it came from."""

    messages: list[dict[str, str]]
    open_end: bool
    """The last message is the assistant's and goes on."""

    def __new__(cls, messages: list[dict[str, str]], open_end: bool) -> "ChatContext":
        shown = super().__new__(cls, "".join(_shown(part) for part in _chat_parts(messages, open_end)))
        shown.messages, shown.open_end = messages, open_end
        return shown


def _shown(part: Part) -> str:
    return IMAGE_MARK if isinstance(part, ImageSlot) else str(part)


def chat_messages(context: ChatContext, num_images: int) -> list[dict[str, Any]]:
    """The chat with an image part at each `<image>`; without marks, before the last words of the user.

    Raises PromptError when marks and images differ in number.
    """
    if not num_images:
        return [dict(message) for message in context.messages]
    marks = sum(message["content"].count(IMAGE_MARK) for message in context.messages)
    users = [i for i, message in enumerate(context.messages) if message["role"] == "user"]
    if marks not in (0, num_images) or not users:
        raise _wrong_number(marks, num_images)
    filled = []
    for i, message in enumerate(context.messages):
        content: list[dict[str, str]] = []
        if not marks and i == users[-1]:
            content = [{"type": "image"}] * num_images
        for k, text in enumerate(message["content"].split(IMAGE_MARK)):
            content += [{"type": "image"}] * (k > 0)
            content += [{"type": "text", "text": text}] * bool(text)
        filled.append({"role": message["role"], "content": content})
    return filled


def _chat_parts(messages: list[dict[str, Any]], open_end: bool) -> list[Part]:
    parts = [part for _, part in message_parts(messages, add_generation_prompt=not open_end)]
    return parts[:-1] if open_end else parts  # without the end token of the assistant's turn


def context_parts(context: str, num_images: int) -> list[Part]:
    """A context from `<|bos|>` on. Images of a plain context without marks stand before it.

    Raises PromptError when marks and images differ in number.
    """
    if isinstance(context, ChatContext):
        return _chat_parts(chat_messages(context, num_images), context.open_end)
    parts: list[Part] = [Special(BOS)]
    texts = context.split(IMAGE_MARK) if num_images else [context]
    if len(texts) == 1:
        parts += [ImageSlot() for _ in range(num_images)]
    elif len(texts) - 1 != num_images:
        raise _wrong_number(len(texts) - 1, num_images)
    for k, text in enumerate(texts):
        parts += [ImageSlot()] * (k > 0) + [text] * bool(text)
    return parts


def _wrong_number(marks: int, num_images: int) -> PromptError:
    return PromptError(
        f"the prompt has {marks} {IMAGE_MARK} marks but the item has {num_images} images; write one mark for each in "
        "doc_to_text, or none"
    )


class Prompts(Protocol):
    """How an engine's tokens are made."""

    def contexts(self, asked: Sequence[tuple[str, int]]) -> list[Ids | NMMError]:
        """Token ids of each (context, number of images), from `<|bos|>` on, one id an image."""
        ...

    def pairs(self, asked: Sequence[tuple[str, str, int]]) -> list[tuple[Ids, Ids] | NMMError]:
        """Each (context, continuation, number of images) cut as lm-eval cuts it: white space at the end of the context
        belongs to the continuation, and the continuation's tokens are those of the whole that the context's leave."""
        ...

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of plain texts, without `<|bos|>`."""
        ...


class LocalPrompts:
    """With the checkpoint's tokenizer."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder = encoder

    def contexts(self, asked: Sequence[tuple[str, int]]) -> list[Ids | NMMError]:
        made: list[Ids | NMMError] = []
        for context, num_images in asked:
            try:
                made.append(self.encoder.parts_to_ids(context_parts(context, num_images)))
            except PromptError as error:
                made.append(error)
        return made

    def pairs(self, asked: Sequence[tuple[str, str, int]]) -> list[tuple[Ids, Ids] | NMMError]:
        made: list[tuple[Ids, Ids] | NMMError] = []
        for context, continuation, num_images in asked:
            try:
                made.append(self._pair(context_parts(context, num_images), continuation))
            except PromptError as error:
                made.append(error)
        return made

    def _pair(self, parts: list[Part], continuation: str) -> tuple[Ids, Ids]:
        last = parts[-1]
        tail = last if type(last) is str else ""
        before = parts[:-1] if type(last) is str else parts
        kept = tail.rstrip()
        context_ids = self.encoder.parts_to_ids([*before, kept] if kept else before)
        whole_ids = self.encoder.parts_to_ids([*before, tail + continuation])
        return context_ids, whole_ids[len(context_ids) :]

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encoder.encode_text(text) for text in texts]


class ServerPrompts:
    """With the tokenizer of a vLLM server, which takes images and chats only as messages."""

    def __init__(self, engine: OpenAIEngine) -> None:
        self.engine = engine

    def contexts(self, asked: Sequence[tuple[str, int]]) -> list[Ids | NMMError]:
        refused = [self._refusal(context, num_images) for context, num_images in asked]
        ids = iter(self.engine.tokenize([c for (c, _), error in zip(asked, refused, strict=True) if error is None]))
        return [next(ids) if error is None else error for error in refused]

    def pairs(self, asked: Sequence[tuple[str, str, int]]) -> list[tuple[Ids, Ids] | NMMError]:
        refused = [self._refusal(context, num_images) for context, _, num_images in asked]
        good = [(c, t) for (c, t, _), error in zip(asked, refused, strict=True) if error is None]
        contexts = dict.fromkeys(context.rstrip() for context, _ in good)  # choices share their context
        context_ids = dict(zip(contexts, self.engine.tokenize(list(contexts)), strict=True))
        whole_ids = iter(self.engine.tokenize([context + continuation for context, continuation in good]))
        pairs = ((context_ids[c.rstrip()], whole) for (c, _), whole in zip(good, whole_ids, strict=True))
        cut = iter([(before, whole[len(before) :]) for before, whole in pairs])
        return [next(cut) if error is None else error for error in refused]

    def texts(self, texts: Sequence[str]) -> list[Ids]:
        return self.engine.tokenize(texts, add_special_tokens=False)

    @staticmethod
    def _refusal(context: str, num_images: int) -> PromptError | None:
        if num_images or isinstance(context, ChatContext):
            return PromptError(
                "a server scores plain text only, no chats or images; evaluate the checkpoint itself with --engine vllm"
            )
        return None


def prompts_for(engine: Any) -> Prompts | None:
    """None for a server that does not tell its tokens: it is given text as it is."""
    if isinstance(engine, OpenAIEngine):
        return ServerPrompts(engine) if engine.is_vllm else None
    encoder = getattr(engine, "processor", None) or getattr(engine, "encoder", None)
    return LocalPrompts(encoder) if encoder is not None else None
