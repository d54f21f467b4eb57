"""Source kind `webdataset`: tar shards in which files of one name and different endings make a sample."""

import json
import logging
import tarfile
from array import array
from itertools import accumulate
from pathlib import Path
from typing import Any

from nmm_serve.errors import DataError
from nmm_serve.train.data.documents import Document, caption_document
from nmm_serve.train.data.files import ReadAt, decode, expand, locate
from nmm_serve.train.data.options import Paths
from nmm_serve.train.data.sources import Source, Visit

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
ABSENT = -1


class TarShards(Source):
    """Captioned images: `KEY.jpg` (or png, webp, ...) with its caption in `KEY.txt`, or in `KEY.json` under `field`.

    `path` is a shard, a folder of shards, a pattern, or a list of these. Only headers are read at the start; a sample
    costs 32 bytes and its key. Samples without an image or a caption count as bad documents, and so do images of keys
    that have none: KEY ends at the first dot, so that `a.b.jpg` is the `b.jpg` of `a`. Raises DataError for two images
    or two captions of one key in a shard, and for a shard that is damaged or cut short.
    """

    kind = "caption"

    def __init__(self, name: str, *, path: Paths, field: str = "caption") -> None:
        self.name = name
        files = expand(path, (".tar",), f"source {name!r}")
        self._shards = [_Shard(file, field) for file in files]
        self._ends = list(accumulate(len(shard) for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def item_name(self, index: int) -> str:
        shard, place = locate(index, self._ends)
        return f"{self.name}:{self._shards[shard].name(place)}"

    def document(self, index: int, visit: Visit) -> Document:
        shard, place = locate(index, self._ends)
        name = self.item_name(index)
        image, caption = self._shards[shard].sample(place, name)
        return caption_document(image, caption, objective=visit.objective, name=name)


class _Shard:
    def __init__(self, path: Path, field: str) -> None:
        self._path, self._field, self._read = path, field, ReadAt(path)
        spans: dict[str, dict[str, tuple[int, int]]] = {}
        unused: list[tuple[str, str]] = []
        members = 0
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    members += 1
                    if member.isdir():
                        continue
                    key, slot = _slot(member.name)
                    if slot in ("image", "txt", "json"):
                        sample = spans.setdefault(key, {})
                        if not member.isfile():  # a link: the sample lacks what it should have held
                            continue
                        if slot in sample:
                            first = next(m.name for m in tar.getmembers() if _slot(m.name) == (key, slot))
                            raise DataError(
                                f"{path} has two files for the {slot} of {key!r}, {first} and {member.name}; give each "
                                "sample a key of its own in its shard"
                            )
                        sample[slot] = member.offset_data, member.size
                    elif slot.rpartition(".")[2] in IMAGES:
                        unused.append((key, member.name.rpartition(".")[0]))
                _check_end(path, tar.offset, members)
        except tarfile.TarError:
            if members:
                raise DataError(f"{path} is damaged or cut short after {members} members; copy it again") from None
            raise DataError(f"{path} is not a plain tar file (compressed shards must be unpacked: gunzip)") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        for key, name in unused:
            if key not in spans:  # else it is a further image of a sample, or that sample is bad already
                spans[name] = {}
        self._keys = list(spans)
        self._is_json = bytearray()
        self._spans = array("q")  # start and size of the image, then of the caption
        for sample in spans.values():
            self._is_json.append("txt" not in sample)
            caption = sample.get("txt") or sample.get("json") or (ABSENT, ABSENT)
            self._spans.extend((*sample.get("image", (ABSENT, ABSENT)), *caption))

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, index: int) -> str:
        return f"{self._path.name}/{self._keys[index]}"

    def sample(self, index: int, name: str) -> tuple[bytes, str]:
        """The image file's bytes and the caption."""
        image, image_size, text, text_size = self._spans[4 * index : 4 * index + 4]
        if "." in (file := self._keys[index].rpartition("/")[2]):
            key, _, rest = file.partition(".")
            raise DataError(
                f"{name} is no sample: a key ends at the first dot, so this is {rest!r} of {key!r}; rename it"
            )
        if image == ABSENT or text == ABSENT:
            wanted = f"an image ({', '.join(IMAGES)})" if image == ABSENT else "a caption (txt or json)"
            raise DataError(f"{name} has no member with {wanted}; links are not followed")
        caption = decode(self._read(text, text_size), name)
        return self._read(image, image_size), self._from_json(caption, name) if self._is_json[index] else caption

    def _from_json(self, text: str, name: str) -> str:
        try:
            record: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f"{name}.json is not JSON, or too deeply nested") from None
        caption = record.get(self._field) if isinstance(record, dict) else None
        if not isinstance(caption, str):
            raise DataError(f"{name}.json: expected an object with text under {self._field!r}")
        return caption


def _check_end(path: Path, end: int, members: int) -> None:
    """Raise DataError for what stands behind the last member: tarfile stops without a word at a damaged header, and at
    the end of the first of several archives in one file."""
    with path.open("rb") as file:
        file.seek(end)
        rest = False
        while block := file.read(2**20):
            rest = True
            if block.strip(b"\0"):
                raise DataError(
                    f"{path}: what stands behind its first {members} members, from byte {end} on, cannot be read as a "
                    "member. If it was copied, copy it again; if several archives were joined, give them one by one"
                )
    if not rest:
        logger.warning("%s does not end as a tar file does: it may have been cut short after %d members", path, members)


def _slot(member: str) -> tuple[str, str]:
    """Key, and what of the sample it is: "image", or the ending, which is empty for a hidden file. WebDataset's rule:
    the key ends at the first dot of the file name, the folder belongs to it."""
    folder, slash, file = member.rpartition("/")
    stem, _, ending = file.partition(".")
    ending = ending.lower() if stem else ""
    return folder + slash + stem, "image" if ending in IMAGES else ending
