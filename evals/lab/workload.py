"""What is asked of an engine: requests of a stated shape, each with images of its own, the same for every engine."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nmm_serve.engines.base import Engine, Request, SamplingParams
from nmm_serve.errors import ConfigError, ImageError, NMMError
from nmm_serve.images import FORMATS, load_image

SYNTHETIC_SIZE = (640, 480)
"""Width and height of synthetic pictures: what most photographs of COCO have."""
_MARK = 16
_LEVELS = 32
"""The mark of a round is a square of one colour, 32 levels a channel: JPEG leaves them apart."""
_WORDS = ("one", "two", "red", "green", "small", "large", "left", "right", "above", "below", "round", "near")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The shape of one request.

    `resolution`: images are scaled to about resolution x resolution pixels in place of the model's own `image_size`;
    `prompt_words` None: the words of `prompt`.
    """

    images: int = 1
    resolution: int | None = None
    prompt: str = "Describe the image."
    prompt_words: int | None = None
    output_tokens: int = 32

    def __post_init__(self) -> None:
        least = {"images": 0, "resolution": 1, "prompt_words": 1, "output_tokens": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"latency {name} is {value}; expected at least {lowest}")

    def with_value(self, field: str, value: int) -> "Workload":
        """The same with one number changed."""
        changed: dict[str, Any] = {field: value}
        return replace(self, **changed)

    @property
    def width(self) -> int:
        """How many numbers a request takes: each image has one of its own."""
        return max(1, self.images)

    def take(self, numbers: Iterator[int], count: int) -> list[int]:
        """The first number of each of `count` requests. No two requests share a number, whatever their shapes."""
        own = (list(islice(numbers, self.width)) for _ in range(count))
        return [first for first, *_ in own]

    def request(self, pictures: "Pictures", first: int) -> Request:
        """The request whose numbers begin at `first`; no two requests share an image, or the beginning of a prompt."""
        words = self.prompt
        if self.prompt_words is not None:
            words = " ".join(_WORDS[i % len(_WORDS)] for i in range(self.prompt_words))
        if not self.images:
            words = f"{first} {words}"  # without an image in front, only this keeps a prefix cache from answering
        content: list[dict[str, Any]] = [{"type": "image"}] * self.images
        content.append({"type": "text", "text": words})
        return Request(
            messages=[{"role": "user", "content": content}],
            images=tuple(pictures.picture(first + i) for i in range(self.images)),
            sampling=SamplingParams(max_tokens=self.output_tokens, ignore_eos=True),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Pictures:
    """Endless distinct pictures, by number: files in turn, or without any, synthetic JPEGs.

    They come as opened but not decoded files, so that an engine's time has the decoding in it.
    """

    def __init__(self, files: Sequence[Any] = (), seed: int = 0) -> None:
        self.files = tuple(files)
        self.seed = seed

    def describe(self) -> str:
        if self.files:
            return (
                f"{len(self.files)} files in turn ({self._fingerprint()}); from the second round on a corner square "
                "tells the rounds apart"
            )
        width, height = SYNTHETIC_SIZE
        return f"synthetic JPEGs of {width}x{height} pixels, seed {self.seed}"

    def _fingerprint(self) -> str:
        """Of names and sizes, so that it takes no reading: two records of one and of another folder are not alike."""
        digest = hashlib.sha256()
        for file in map(Path, self.files):
            size = file.stat().st_size if file.exists() else None
            digest.update(f"{file.name}\0{size}\0".encode(errors="surrogateescape"))
        return f"names and sizes: {digest.hexdigest()[:12]}"

    def picture(self, index: int) -> Image.Image:
        """Raises ImageError for a file that is no image."""
        if not self.files:
            return _open(_synthetic(self.seed, index), "a synthetic picture")
        file, round_ = self.files[index % len(self.files)], index // len(self.files)
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise ImageError(f"{file} cannot be read: {error.strerror}") from None
        image = _open(data, str(file))
        return image if round_ == 0 else _open(_marked(image, round_), str(file))


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # a damaged header raises anything
        raise ImageError(f"{name} is not a readable image; supported: {', '.join(FORMATS)}") from None


def _synthetic(seed: int, index: int) -> bytes:
    """Smooth colours with some noise: compresses about like a photograph."""
    rng = np.random.default_rng((seed, index))
    width, height = SYNTHETIC_SIZE
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(coarse, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    return _encoded(Image.fromarray(pixels), "JPEG")


def _marked(image: Image.Image, round_: int) -> bytes:
    """The same picture with a square that is this round's, in the same file format."""
    if round_ >= _LEVELS**3:
        raise ImageError("more rounds over the images than a mark can tell apart; give more images")
    kind = "JPEG" if image.format == "JPEG" else "PNG"
    image = load_image(image)
    step = 256 // _LEVELS
    colour = tuple(step * (round_ // _LEVELS**power % _LEVELS) for power in (2, 1, 0))
    image.paste(colour, (0, 0, min(_MARK, -(-image.width // 2)), min(_MARK, -(-image.height // 2))))
    return _encoded(image, kind)


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


def set_resolution(engine: Engine, resolution: int | None) -> None:
    """Make an engine scale images to about `resolution` squared pixels; None: the model's own size.

    Fewer patches than a model was trained on need no other weights. Raises ConfigError for an engine whose images
    cannot be scaled from here, and for more patches than the model's size.
    """
    holders = _image_sizes(engine)
    if not holders:
        if resolution is None:
            return
        raise ConfigError(f"engine {engine.name!r} scales images by itself; leave out the resolution")
    for holder in holders:
        own = holder.__dict__.setdefault("own_image_size", holder.image_size)
        if resolution is not None and (resolution > own or resolution % holder.patch_size):
            raise ConfigError(
                f"resolution {resolution} must be a multiple of the patch size {holder.patch_size} and at most the "
                f"model's image size of {own}"
            )
        holder.image_size = own if resolution is None else resolution


def _image_sizes(engine: Engine) -> list[Any]:
    """The objects of an engine whose `image_size` says how large images become."""
    if engine.name == "onnx":
        return [engine.encoder]  # type: ignore[attr-defined]
    if engine.name == "torch":
        return [engine.processor.image_processor]  # type: ignore[attr-defined]
    if engine.name == "vllm":
        renderer = engine.llm.renderer  # type: ignore[attr-defined]
        if renderer.mm_processor is None:
            raise NMMError("this vLLM engine has no image processor")
        inner = renderer.mm_processor.info.get_hf_processor()
        return [engine.processor.image_processor, inner.image_processor]  # type: ignore[attr-defined]
    return []
