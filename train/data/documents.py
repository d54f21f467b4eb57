"""A document: what one training example says, before it is turned into tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from nmm_serve.chat import BOS, EOS, ImageSlot, Part, Special, message_parts
from nmm_serve.errors import DataError

Kind = Literal["caption", "vqa", "interleaved", "text"]
KINDS: tuple[Kind, ...] = ("caption", "vqa", "interleaved", "text")
Objective = Literal["pretrain", "sft"]
"""What carries loss. pretrain: every token but image patches. sft: the assistant's parts alone."""

ImageSource = str | Path | bytes | Image.Image
CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True, slots=True)
class Document:
    """Parts in order, each with the role that says it, and the images that fill the slots in order.

    `name` finds the document again in a log: "coco:000000000123.jpg".
    """

    parts: list[tuple[str, Part]]
    kind: Kind
    name: str
    images: list[ImageSource] = field(default_factory=list)


def caption_document(image: ImageSource, caption: str, *, objective: Objective, name: str) -> Document:
    """An image and its caption: `<|bos|>{image}{caption}<|eos|>` in pretraining; in fine-tuning a chat whose user
    asks "Describe the image.". Raises DataError for a caption without a word, or that is no text."""
    caption = checked_text(caption, f"{name}: the caption").strip()
    if not caption:
        raise DataError(f"{name}: the caption is empty")
    if objective == "pretrain":
        return Document(_plain([ImageSlot(), caption]), "caption", name, [image])
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]}
    return Document(message_parts([user, {"role": "assistant", "content": caption}]), "caption", name, [image])


def vqa_document(image: ImageSource, pairs: Sequence[tuple[str, str]], *, name: str) -> Document:
    """One chat about one image, a turn for each (question, answer). The image stands in the first turn and is paid for
    once. Raises DataError for no question, or a question or answer that is empty or no text."""
    if not pairs:
        raise DataError(f"{name}: no questions")
    messages: list[dict] = []
    for question, answer in pairs:
        checked_text(question, f"{name}: the question")
        checked_text(answer, f"{name}: the answer to {question!r}")
        if not question.strip() or not answer.strip():
            raise DataError(f"{name}: empty question or answer ({question!r}, {answer!r})")
        content = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image"})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return Document(message_parts(messages), "vqa", name, [image])


def interleaved_document(content: Sequence[str | ImageSlot], images: Sequence[ImageSource], *, name: str) -> Document:
    """Text and images in any order. Raises DataError without text, or for a part that is none."""
    for part in content:
        if not isinstance(part, ImageSlot):
            checked_text(part, f"{name}: a part")
    if not any(isinstance(part, str) and part.strip() for part in content):
        raise DataError(f"{name}: no text")
    return Document(_plain(content), "interleaved", name, list(images))


def text_document(text: str, *, name: str) -> Document:
    """Text alone. Raises DataError when there is none."""
    if not checked_text(text, f"{name}: the document").strip():
        raise DataError(f"{name}: no text")
    return Document(_plain([text]), "text", name)


def checked_text(value: object, what: str) -> str:
    """The same value. Raises DataError unless it is text that has a UTF-8 form, as tokenizers need."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {value!r}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not Unicode text: character {error.start} is half a surrogate pair ({value[error.start]!a}); "
            "mend or remove it"
        ) from None
    return value


def _plain(content: Sequence[str | ImageSlot]) -> list[tuple[str, Part]]:
    """`<|bos|>...<|eos|>`. The text counts as the assistant's, so that text mixed into fine-tuning is learned too."""
    body: list[tuple[str, Part]] = [
        ("user", part) if isinstance(part, ImageSlot) else ("assistant", part) for part in content
    ]
    return [("system", Special(BOS)), *body, ("assistant", Special(EOS))]
