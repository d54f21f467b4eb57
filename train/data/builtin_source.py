"""Source kind `builtin`: the built-in scenes, which need no download."""

from typing import Literal

from nmm_serve.chat import ImageSlot
from nmm_serve.errors import ConfigError
from nmm_serve.train.data import builtin, documents
from nmm_serve.train.data.documents import Document, ImageSource, Kind
from nmm_serve.train.data.sources import Source, Visit


class Builtin(Source):
    """`which` of the built-in kinds; the first `size` examples of `split` (they have no end); `seed` of the examples.

    Captions: one of five an epoch, or all of them in one document. vqa: all questions of an image in one chat, in a new
    order each epoch. `jitter` (pixels that an object may lie off the middle of its cell) and `max_objects` (2 to 5)
    make the pictures of captions and vqa easier than the standard ones.
    """

    def __init__(
        self,
        name: str,
        *,
        which: Kind,
        split: Literal["train", "val", "test"] = "train",
        size: int = 1_000_000,
        seed: int = 0,
        captions: Literal["one", "all"] = "one",
        jitter: int | None = None,
        max_objects: int = 5,
    ) -> None:
        if size < 1:
            raise ConfigError(f"source {name!r}: size {size}; expected 1 or more")
        self.name, self.kind = name, which
        self._split, self._size, self._seed, self._captions = split, size, seed, captions
        self._difficulty = builtin.Difficulty(jitter, max_objects)

    def __len__(self) -> int:
        return self._size

    def item_name(self, index: int) -> str:
        return f"{self.name}:{self._split}#{index}"

    def document(self, index: int, visit: Visit) -> Document:
        name = self.item_name(index)
        if self.kind == "text":
            return documents.text_document(builtin.text_document(self._split, index, self._seed), name=name)
        if self.kind == "interleaved":
            content = builtin.interleaved_document(self._split, index, self._seed)
            images: list[ImageSource] = [part for part in content if not isinstance(part, str)]
            parts = [part if isinstance(part, str) else ImageSlot() for part in content]
            return documents.interleaved_document(parts, images, name=name)
        example = builtin.builtin_images(self._split, index, self._seed, self._difficulty)
        if self.kind == "caption":
            caption = visit.caption(example.captions, self._captions, index)
            return documents.caption_document(example.image, caption, objective=visit.objective, name=name)
        pairs = [(q["question"], q["multiple_choice_answer"]) for q in example.questions]
        visit.rng(index).shuffle(pairs)
        return documents.vqa_document(example.image, pairs, name=name)
