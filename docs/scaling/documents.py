"""Write the documents of photographs.yaml: python docs/scaling/documents.py CAPTIONS OUT

CAPTIONS is a folder with captions_{train,val}.json and images/{train,val}/, as the source kind coco_captions takes it.
The prose is docstrings of Python's standard library and of eight packages of nmm-serve's, so that anybody has it.
Written: OUT/text-{train,val}.jsonl, OUT/interleaved-{train,val}.jsonl and the link OUT/captions.

Validation takes every twentieth module and CAPTIONS' own validation images.
"""

import ast
import json
import random
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

PACKAGES = ("networkx", "numpy", "pandas", "scikit-learn", "scipy", "sympy", "torch", "transformers")
SPLITS = ("train", "val")
SHORT, LONG = 200, 320
"""Characters of the prose in an interleaved document: with two images it fits into 320 tokens."""


def modules() -> Iterator[Path]:
    """Source files: the standard library without its site-packages, then the packages."""
    library = Path(sysconfig.get_path("stdlib"))
    yield from sorted(p for p in library.rglob("*.py") if "-packages" not in str(p) and "test" not in p.parts)
    for package in PACKAGES:
        distribution = metadata.distribution(package)
        print(package, distribution.version)
        yield from sorted(Path(distribution.locate_file(f)) for f in distribution.files or () if f.suffix == ".py")


def docstrings(module: Path) -> Iterator[str]:
    try:
        tree = ast.parse(module.read_text())
    except (SyntaxError, UnicodeDecodeError, OSError):  # templates, and files for other versions of Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def is_prose(paragraph: str) -> bool:
    """Of the right length, and words rather than code or a table."""
    words = sum(c.isalpha() or c.isspace() for c in paragraph)
    return SHORT <= len(paragraph) <= LONG and words >= 0.85 * len(paragraph)


def captions(folder: Path, split: str) -> list[tuple[str, str]]:
    """(image file, caption), every caption of every image."""
    file = folder / f"captions_{split}.json"
    if not file.is_file():
        sys.exit(f"{file} does not exist; expected a folder with captions_train.json and captions_val.json")
    given = json.loads(file.read_text())
    files = {image["id"]: f"captions/images/{split}/{image['file_name']}" for image in given["images"]}
    return [(files[record["image_id"]], record["caption"]) for record in given["annotations"]]


def interleaved(pictures: list[tuple[str, str]], prose: list[str], rng: random.Random) -> Iterator[list[dict]]:
    """A picture and its caption, prose, another picture and its caption: each picture once, with one of its captions
    drawn; as many documents as there is prose for."""
    rng.shuffle(pictures)
    drawn = list(dict(pictures).items())
    rng.shuffle(drawn)
    for (one, says_one), (two, says_two), text in zip(drawn[::2], drawn[1::2], prose, strict=False):
        yield [
            {"type": "image", "path": one},
            {"type": "text", "text": f"{says_one}\n\n{text}\n\n"},
            {"type": "image", "path": two},
            {"type": "text", "text": says_two},
        ]


def main(source: Path, out: Path) -> None:
    warnings.simplefilter("ignore")  # of other people's escape sequences
    pictures = {split: captions(source, split) for split in SPLITS}
    out.mkdir(parents=True)
    (out / "captions").symlink_to(source.resolve())
    rng = random.Random(0)
    texts: dict[str, dict[str, str]] = {split: {} for split in SPLITS}  # by their beginning, so that copies go
    for module in modules():
        split = SPLITS[zlib.crc32("/".join(module.parts[-3:]).encode()) % 20 == 0]
        for text in docstrings(module):
            if len(text) >= SHORT:
                texts[split].setdefault(text[:SHORT], text)
    copies = texts["train"].keys() & texts["val"].keys()
    for split in SPLITS:
        long = [text for start, text in sorted(texts[split].items()) if split == "train" or start not in copies]
        rng.shuffle(long)
        # what stands in an interleaved document stands in no text: they are different docstrings
        half = len(long) // 2
        paragraphs = [p for text in long[:half] for p in text.split("\n\n") if is_prose(p)]
        rng.shuffle(paragraphs)
        _write(out / f"text-{split}.jsonl", [{"text": text} for text in long[half:]])
        mixed = interleaved(pictures[split], paragraphs, rng)
        _write(out / f"interleaved-{split}.jsonl", [{"content": content} for content in mixed])


def _write(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(path, len(records), "documents,", path.stat().st_size // 1000, "kB")


if __name__ == "__main__":
    if len(sys.argv) != 3 or Path(sys.argv[2]).exists():
        sys.exit("usage: documents.py CAPTIONS OUT, where OUT does not exist yet")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
