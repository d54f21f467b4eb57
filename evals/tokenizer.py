"""Tokenise captions as COCO's scores do: the Stanford PTB tokenizer through Java, or a fallback without Java.

Both take plain captions and give one string of space-separated tokens per caption: lower case, Penn Treebank rules,
with COCO's list of punctuation removed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nmm_serve.errors import EngineError, NMMError
from nmm_serve.evals import java, ptb_fallback

_START_S, _PER_CAPTION_S = 120, 0.01


class Tokenizer(Protocol):
    name: str
    """Goes into the record: scores under another tokenizer are other scores."""

    def tokenize(self, captions: Sequence[str]) -> list[str]: ...


def open_tokenizer() -> Tokenizer:
    """The PTB tokenizer where Java runs, else the fallback."""
    try:
        return PTBTokenizer(java.find_java())
    except EngineError as error:
        return FallbackTokenizer(str(error))


def clean(caption: str) -> str:
    """One line, single spaces. A `\\r`, U+2028, VT or FF inside a caption would shift all later ones by a line."""
    return " ".join(caption.split())


class PTBTokenizer:
    """The tokenizer of COCO's caption scores: Stanford CoreNLP's PTBTokenizer from the jar that pycocoevalcap bundles.

    pycocoevalcap's own wrapper writes its temporary file into the installed package, reads text in the locale's
    encoding, and pairs lines with captions without counting them. So the jar is run here: text goes in through stdin.
    """

    name = "PTBTokenizer (Stanford CoreNLP 3.4.1)"

    def __init__(self, java_path: str) -> None:
        self.java_path = java_path

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """Raises EngineError when Java fails or answers with another number of lines."""
        if not captions:
            return []
        jar, removed = _ptb_jar()
        command = [self.java_path, *java.OPTIONS, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
        text = "".join(clean(caption) + "\n" for caption in captions)
        try:
            out = java.run(command, text.encode(), timeout_s=_START_S + _PER_CAPTION_S * len(captions))
        except EngineError as error:
            raise EngineError(f"Java's PTBTokenizer failed: {error}") from None
        # Not splitlines(): a token may hold a character that Python counts as a line break.
        lines = out.decode().split("\n")
        if lines[-1] == "":
            lines.pop()
        if len(lines) != len(captions):
            raise EngineError(f"Java's PTBTokenizer gave {len(lines)} lines for {len(captions)} captions")
        return [_without(removed, line.rstrip().split(" ")) for line in lines]


def _ptb_jar() -> tuple[Path, frozenset[str]]:
    """The jar and the list of punctuation to remove, both from pycocoevalcap."""
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError:
        raise NMMError("caption scores need pycocoevalcap; pip install 'nmm-serve[evals]'") from None
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    return jar, frozenset(ptbtokenizer.PUNCTUATIONS)


def _without(removed: frozenset[str], tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in removed)


class FallbackTokenizer:
    """The same for everyday captions in Python; on the captions that it `covers` it is proven equal to PTBTokenizer."""

    name = "Python fallback for PTBTokenizer"

    def __init__(self, reason: str = "Java was not asked for") -> None:
        self.reason = reason
        """Why Java is not used."""

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        return [ptb_fallback.tokenize(clean(caption)) for caption in captions]

    def covers(self, caption: str) -> bool:
        return ptb_fallback.covers(clean(caption))
