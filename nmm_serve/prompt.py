"""Messages and images to token ids and pixels, without torch: the one definition for training and for every engine."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from nmm_serve.chat import IMAGE, IMAGE_END, IMAGE_START, ImageSlot, Part, Special, message_parts
from nmm_serve.errors import CheckpointError, PromptError
from nmm_serve.images import fit_to_patches

ImageSource = Image.Image | Path | str | bytes
"""An image, its file, or the file's bytes, which are opened when its turn comes."""


@dataclass(frozen=True)
class Prompt:
    """Token ids with one placeholder a patch, and the pixels [H, W, 3] (uint8, whole patches) of each image."""

    input_ids: list[int]
    pixels: tuple[np.ndarray, ...] = ()
    image_s: float = field(default=0.0, compare=False)
    """Seconds that decoding and scaling the images took."""


def checked(text: str) -> str:
    """Raises PromptError for a text that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise PromptError(
            f"the text holds half of a surrogate pair ({half}), which is no character; take it out"
        ) from None
    return text


class _Images:
    """The images of one prompt, made ready as their places come up."""

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []
        self.seconds = 0.0

    def prompt(self, input_ids: list[int]) -> Prompt:
        return Prompt(input_ids, tuple(self.pixels), self.seconds)


class PromptEncoder:
    """What to do with text, special tokens and images, for a tokenizer that a subclass brings.

    A subclass gives `encode_text`, `encode_marked`, `token_id` and the two sizes.
    """

    patch_size: int
    image_size: int
    pool_image: bool = False
    """An image is one token, and not one a patch."""
    native_resolution: bool = False
    """Images keep their size: see `image_grid`."""

    def encode_text(self, text: str) -> list[int]:
        """Plain text; characters that spell a special token stay characters."""
        raise NotImplementedError

    def encode_marked(self, text: str) -> list[int]:
        """Text in which special tokens are special, after `<|bos|>`."""
        raise NotImplementedError

    def token_id(self, token: str) -> int:
        raise NotImplementedError

    def image_ids(self, num_patches: int) -> list[int]:
        """Start, one placeholder a patch or one in all, end."""
        num_tokens = 1 if self.pool_image else num_patches
        return [self.token_id(IMAGE_START), *[self.token_id(IMAGE)] * num_tokens, self.token_id(IMAGE_END)]

    def prompt_of_parts(
        self,
        parts: Iterable[Part],
        images: Sequence[ImageSource] = (),
        fit: Callable[[ImageSource], np.ndarray] | None = None,
    ) -> tuple[Prompt, list[int]]:
        """Encode parts in order, taking images as their slots come up. `fit` makes an image into whole patches in its
        own way, as augmentation does; the default is `fit_to_patches`.

        Returns the prompt and, for each part, the position where it ends.

        Raises PromptError when slots and images differ in number.
        """
        ids: list[int] = []
        done = _Images()
        ends, used = [], 0
        for part in parts:
            if isinstance(part, ImageSlot):
                if used < len(images):
                    ids += self._add_image(images[used], done, fit)
                used += 1
            elif isinstance(part, Special):
                ids.append(self.token_id(str(part)))
            else:
                ids += self.encode_text(part)
            ends.append(len(ids))
        if used != len(images):
            raise PromptError(
                f"the prompt has {used} image places but {len(images)} images were given; give one image for each"
            )
        return done.prompt(ids), ends

    def prompt_of_chat(self, messages: Iterable[dict[str, Any]], images: Sequence[ImageSource] = ()) -> Prompt:
        """A chat up to the assistant's turn."""
        return self.prompt_of_parts([part for _, part in message_parts(messages, True)], images)[0]

    def prompt_of_text(self, text: str | Sequence[int], images: Sequence[ImageSource] = ()) -> Prompt:
        """A raw prompt, as `prompt_ids` reads it, with its images."""
        return self.prompt_of_ids(self.prompt_ids(text), images)

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """A raw prompt with one `<|image|>` for each image. Special tokens in a text are special, and `<|bos|>` is put
        before it; token ids are taken as they are."""
        return self.encode_marked(prompt) if isinstance(prompt, str) else list(prompt)

    def continuation_ids(self, continuation: str | Sequence[int]) -> list[int]:
        """What is scored after a prompt: plain text, or token ids as they are."""
        return self.encode_text(continuation) if isinstance(continuation, str) else list(continuation)

    def parts_to_ids(self, parts: Iterable[Part]) -> list[int]:
        """Like `prompt_of_parts`, but each image is one `<|image|>`; the patches are put in later."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, ImageSlot):
                ids.append(self.token_id(IMAGE))
            elif isinstance(part, Special):
                ids.append(self.token_id(str(part)))
            else:
                ids += self.encode_text(part)
        return ids

    def prompt_of_ids(self, marked: Sequence[int], images: Sequence[ImageSource] = ()) -> Prompt:
        """Token ids with one `<|image|>` for each image."""
        placeholder = self.token_id(IMAGE)
        marks = sum(token == placeholder for token in marked)
        if marks != len(images):
            raise PromptError(
                f"the prompt has {marks} {IMAGE} marks but {len(images)} images were given; give one for each"
            )
        ids: list[int] = []
        done = _Images()
        for token in marked:
            ids += [token] if token != placeholder else self._add_image(images[len(done.pixels)], done)
        return done.prompt(ids)

    def _add_image(
        self, image: ImageSource, done: _Images, fit: Callable[[ImageSource], np.ndarray] | None = None
    ) -> list[int]:
        start = time.perf_counter()
        if fit is not None:
            pixels_HWC = fit(image)
        else:
            pixels_HWC = fit_to_patches(image, self.patch_size, self.image_size, self.native_resolution)
        done.seconds += time.perf_counter() - start
        done.pixels.append(pixels_HWC)
        return self.image_ids(pixels_HWC.shape[0] * pixels_HWC.shape[1] // self.patch_size**2)


class TokenizerFile(PromptEncoder):
    """The encoder of a checkpoint's `tokenizer.json`, by the tokenizers library alone.

    Raises CheckpointError for a file that cannot be read.
    """

    def __init__(self, folder: str | Path, patch_size: int, image_size: int):
        file = Path(folder) / "tokenizer.json"
        self.patch_size, self.image_size = patch_size, image_size
        try:
            # two of them: whether special tokens are special is a setting inside the tokenizer
            self.tokenizer, self._plain = (Tokenizer.from_file(str(file)) for _ in range(2))
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        for tokenizer in (self.tokenizer, self._plain):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._plain.encode_special_tokens = True

    def encode_text(self, text: str) -> list[int]:
        return self._plain.encode(checked(text), add_special_tokens=False).ids

    def encode_marked(self, text: str) -> list[int]:
        return self.tokenizer.encode(checked(text)).ids

    def token_id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(
                f"the tokenizer has no token {token}; use the tokenizer that the model was trained with"
            )
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
