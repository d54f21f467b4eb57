"""The PTB tokenizer through Java, and the fallback against it."""

import random

import pytest
from eval_fakes import put_java

from nmm_serve.errors import EngineError
from nmm_serve.evals import java, tokenizer
from nmm_serve.evals.tokenizer import FallbackTokenizer, PTBTokenizer

HOSTILE = [
    "a dog\ron grass",
    "a cat",
    "two\u2028lines\u2029here",
    "tab\tand\x0bvertical\x0cform\x85next\x1cfile",
    "",
    "   ",
    ".",
    "a bird",
    "日本語 😀 ok",
]

WORD_LIST = """
a an the man woman dog dogs cat on in of with sitting standing next to grey red colour theatre t-shirt black-and-white
well-known don't isn't can't won't it's dog's they're we've i'm I'm he'd she'll cannot gonna wanna gotta lemme gimme St
Mr etc Mass miss Miss co mt ave I A x 2 3 10 1990s 1st 3.5 1,000 10:30 $5 50% 10-year-old 2-story e-mail x-ray vs TV
café naïve Dr jan Sun sat may ill la pa del U.S. a.m. No. e.g. 1/2 :) @home #1 o'clock
"""
WORDS = WORD_LIST.split()
LEADS = ("", "", "", "", '"', "(", "“", "'")
TRAILS = (
    "",
    "",
    "",
    ".",
    ",",
    "!",
    "?",
    ";",
    ":",
    "...",
    "!!",
    "?!",
    '."',
    ",'",
    ").",
    ")",
    '"',
    '".',
    "…",
    '?"',
    "'s",
    "’s",
)
CHARACTERS = "abcdeiIsStTnmolrvd''.-,!?:;()\"$%&0123459’“”–…é"


def sample(count: int) -> list[str]:
    """Captions like people's, mixed with strings that nobody would write."""
    rng = random.Random(0)

    def word() -> str:
        if rng.random() < 0.1:
            return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, 7)))
        text = rng.choice(WORDS)
        change = rng.random()
        if change < 0.1:
            text = text.capitalize()
        elif change < 0.15:
            text = text.upper()
        elif change < 0.25:
            text += "-" + rng.choice(WORDS)
        return rng.choice(LEADS) + text + rng.choice(TRAILS)

    return [" ".join(word() for _ in range(rng.randint(1, 8))) for _ in range(count)]


@pytest.fixture
def ptb():
    return PTBTokenizer(java.find_java())


@pytest.mark.java
def test_fallback_equals_ptb_where_it_says_so(ptb):
    captions = sample(30_000)
    fallback = FallbackTokenizer()
    covered = [fallback.covers(caption) for caption in captions]
    assert sum(covered) > 4_000
    pairs = zip(captions, covered, ptb.tokenize(captions), fallback.tokenize(captions), strict=True)
    assert [(caption, a, b) for caption, inside, a, b in pairs if inside and a != b] == []


ODD_LIST = """
1/2 :) @home #1 U.S. a.m. e.g. no. fig. art. a@b.com http://x.y/z?q=1 <b> </S> ... -- --- ( ) [ ] { } '' ` " ' ! ?! ; :
& * ~ ^ _ \\ / + = % | 😀 ½ ² ™ € £ ¥ — – • '90s 日本語 привет naïve ||| \u200b \u00ad \ufeff \x1b[0m \x00 dog red.
"""
ODD = ODD_LIST.split()


@pytest.mark.java
def test_fallback_and_hostile_strings(ptb):
    """Where it says that it is equal it is, and where it does not it nearly always is."""
    rng = random.Random(1)
    captions = [" ".join(rng.choice(ODD) for _ in range(rng.randint(1, 9))) for _ in range(4_000)]
    captions += ["".join(chr(rng.choice([rng.randint(32, 126), rng.randint(0x300, 0xD7FF)])) for _ in range(12))
                 for _ in range(4_000)]  # fmt: skip
    expected, found = ptb.tokenize(captions), FallbackTokenizer().tokenize(captions)
    assert len(expected) == len(found) == len(captions)
    equal = [a == b for a, b in zip(expected, found, strict=True)]
    covers = FallbackTokenizer().covers
    assert [c for c, same in zip(captions, equal, strict=True) if covers(c) and not same] == []
    assert sum(equal[:4_000]) > 3_600


@pytest.mark.java
def test_one_line_out_for_each_caption_in(ptb):
    tokens = ptb.tokenize(HOSTILE)
    assert len(tokens) == len(HOSTILE)
    assert tokens[0] == "a dog on grass"
    assert tokens[1] == "a cat"
    assert tokens[2] == "two lines here"
    assert tokens[4:7] == ["", "", ""]
    assert tokens[7] == "a bird"


@pytest.mark.java
def test_nothing_is_written_into_the_installed_package(ptb):
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = tokenizer.Path(ptbtokenizer.__file__).parent
    before = sorted(path.name for path in folder.iterdir())
    ptb.tokenize(["a dog"])
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man, sitting on the dog's t-shirt.", "a man sitting on the dog 's t-shirt"),
        ("It isn't; they cannot!", "it is n't they can not"),
        ('A sign reading "stop" (red).', "a sign reading stop -lrb- red -rrb-"),
        ("Mr. Smith at 10:30 with 1,000 dogs... wow!!", "mr. smith at 10:30 with 1,000 dogs wow !!"),
        ("$5, 50% - a 10-year-old's", "$ 5 50 % a 10-year-old 's"),
        ("it’s “so” nice…", "it 's so nice"),
        ("日本語 at @home, mail a@b.com!", "日本語 at @home mail a@b.com"),
        ("http://x.y/z?q=1. <b> ½ for €3", "http://x.y/z?q=1 <b> 1/2 for $ 3"),
        ("", ""),
    ],
)
def test_fallback_by_hand(caption, tokens):
    assert FallbackTokenizer().tokenize([caption]) == [tokens]


@pytest.mark.parametrize("caption", ["look :)", "see www.a.com", "at 2 1/2", "<b>", "plate A.", "😀", "a@b.com", "no."])
def test_fallback_says_what_it_does_not_cover(caption):
    assert not FallbackTokenizer().covers(caption)


def test_fallback_keeps_lines_apart():
    assert len(FallbackTokenizer().tokenize(HOSTILE)) == len(HOSTILE)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("script", "reason"),
    [("exit 7", "exit status 7"), ("sleep 600", "did not finish within"), ("kill -9 $$", "exit status -9")],
)
def test_a_java_that_does_not_run_is_no_java(tmp_path, monkeypatch, script, reason):
    put_java(tmp_path, monkeypatch, script)
    monkeypatch.setattr(java, "_VERSION_TIMEOUT_S", 0.5)
    found = tokenizer.open_tokenizer()
    assert isinstance(found, FallbackTokenizer)
    assert reason in found.reason


def test_a_java_that_is_no_program_is_no_java(tmp_path, monkeypatch):
    put_java(tmp_path, monkeypatch, "exit 0")
    (tmp_path / "java").write_bytes(b"\0\1\2")
    with pytest.raises(EngineError, match="could not be started"):
        java.find_java()


def test_no_java_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="no java on the PATH; install Java"):
        java.find_java()


def test_java_that_loses_lines_is_an_error(tmp_path, monkeypatch):
    path = put_java(tmp_path, monkeypatch, "cat >/dev/null; echo one line")
    with pytest.raises(EngineError, match="gave 1 lines for 2 captions"):
        PTBTokenizer(path).tokenize(["a", "b"])


def test_java_that_dies_is_an_error(tmp_path, monkeypatch):
    path = put_java(tmp_path, monkeypatch, "echo out of memory >&2; exit 3")
    with pytest.raises(EngineError, match="exit status 3: out of memory"):
        PTBTokenizer(path).tokenize(["a"])


@pytest.mark.timeout(60)
def test_java_that_hangs_is_stopped(tmp_path, monkeypatch):
    path = put_java(tmp_path, monkeypatch, "sleep 600")
    monkeypatch.setattr(tokenizer, "_START_S", 0.3)
    with pytest.raises(EngineError, match="was stopped"):
        PTBTokenizer(path).tokenize(["a"])
