"""A Python stand-in for Stanford's PTBTokenizer on everyday captions, for machines without Java.

The rules were found by comparing with the Java tokenizer's output on millions of strings. `covers` tells the range on
which the two are equal (a test that needs Java proves it on a large random sample); outside it (addresses, emoticons,
fractions, tags, symbols) the general rules apply and the tokens nearly always agree, but may differ.
"""

import re
from functools import lru_cache

_LETTER = "A-Za-zÀ-ÖØ-öø-ÿ"
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "`", "’": "'"})

# PTBTokenizer deletes what it cannot tokenise: control and invisible characters, and all beyond 16 bits, such as emoji.
_DELETED = r"\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\U00010000-\U0010ffff"

_END = rf"(?![{_LETTER}0-9])"

# At each place the longest of these wins, and the first on a tie. The length counts what must follow, so that "isn't"
# is "is" before "n't" and not "isn" before "'t"; only the group is the token.
_RULES = tuple(
    re.compile(rule, re.IGNORECASE)
    for rule in (
        rf"(can)not{_END}|(gon|wan)na{_END}|(got)ta{_END}|(lem|gim)me{_END}|('t)(?:is|was){_END}",
        rf"([a-z]*[a-mo-z])n't{_END}",
        rf"([{_LETTER}]+)'(?:s|d|m|ll|re|ve){_END}",
        rf"('(?:s|d|m|ll|re|ve)|n't){_END}",
        rf"([dol]'[{_LETTER}0-9]{{2,}})",
        rf"('(?:em|til|cause|n'?)){_END}|('[2-9]0s)",
        rf"([{_LETTER}](?:\.[{_LETTER}])+\.)",
        rf"([{_LETTER}][{_LETTER}0-9]*(?:[.!?][{_LETTER}][{_LETTER}0-9]*)*)",
        rf"([{_LETTER}0-9]+(?:-[{_LETTER}0-9]+)+)",
        r"([-+]?[.:,]?[0-9]+(?:[.:,/-][0-9]+)*)",
        rf"([0-9]+[{_LETTER}]+[{_LETTER}0-9]*)",
        r"([^\W\d_]+)",
        r"(@[a-z_][a-z0-9_]*)",
        r"([a-z0-9][a-z0-9._+-]*@[a-z0-9-]+(?:\.[a-z0-9-]+)+)",
        r"(https?://[^\s<>\"]*[^\s<>\",.!?;:()])",
        r"(</?[a-z][a-z0-9]*/?>)",
        r"(\.{2,}|-{2,}|[!?]{2,})",
        r"([:;=]-?[()])",
        rf"([^{_DELETED}])",
    )
)
_REMOVED = frozenset({"'", "`", ".", "?", "!", ",", ":", "-", ";", '"', "–", "—", "…"})
_AS_WRITTEN = str.maketrans({"€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4"})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

# Words that keep their period.
_ABBREVIATION_LIST = """
adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co col
colo conn corp cos cpl ct dak dec dept det dr drs ens esq est etc ext feb fla fri ft ga gen gov hon inc ind intl jan
jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mme mo mon mont mr mrs ms mt mtg natl neb
nev nov oct okla penn pfc ph plc pres prof pte pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st
ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
"""
_ABBREVIATIONS = frozenset(_ABBREVIATION_LIST.split())
_CAPITALISED_ABBREVIATIONS = frozenset(["ark", "az", "del", "ill", "la", "mass", "miss", "ore", "pa", "tex", "wash"])

# Whether these keep their period hangs on the next word, even on the next caption's, or on capitals.
_CONTEXT = "(?:art|ca|figs?|mfg|mtg|nos?|op|pp|pte|pty)"

_COVERED = re.compile(
    rf"""
    ["“(]?
    (?! cont['’]d )
    (?! (?:[^.]*-)? (?:[{_LETTER}] | {_CONTEXT}) \. )
    (?:
        [{_LETTER}]+ (?:-[{_LETTER}]+)* (?:['’](?:s|d|m|ll|re|ve))?
      | [a-z]+ [a-mo-z] n['’]t
      | \$? [0-9]+ (?:[.,:][0-9]+)? %?
      | [0-9]+ (?:st|nd|rd|th|s)
      | [0-9]+ (?:-[{_LETTER}]+)+
    )
    (?: ["”]? (?:[.,;:!?] | [!?]{{2,3}} | …)? | [.,!?]? ["”)])
    | & | - | -- | – | —
    """,
    re.IGNORECASE | re.VERBOSE,
)


def tokenize(caption: str) -> str:
    """Tokens of one caption, lower case, COCO's punctuation removed, separated by single spaces."""
    words = caption.translate(_QUOTES).split()
    before_digit = [word[:1].isdigit() for word in [*words[1:], ""]]
    return " ".join(
        token
        for word, is_before_digit in zip(words, before_digit[: len(words)], strict=True)
        for token in _tokens(word, is_before_digit)
    )


def covers(caption: str) -> bool:
    """Is the caption inside the range on which `tokenize` is proven equal to PTBTokenizer?"""
    return all(_COVERED.fullmatch(word) for word in caption.split())


@lru_cache(maxsize=100_000)
def _tokens(word: str, is_before_digit: bool) -> tuple[str, ...]:
    tokens: list[str] = []
    place = 0
    while place < len(word):
        matches = [m for rule in _RULES if (m := rule.match(word, place))]
        if not matches:
            place += 1
            continue
        longest = max(matches, key=lambda m: m.end())
        token = longest[longest.lastindex or 0]
        place += len(token)
        if word.startswith(".", place) and _keeps_period(token, word[place + 1 :], is_before_digit):
            token += "."
            place += 1
        if token not in _REMOVED and not re.fullmatch(r"\.+|-+", token):
            tokens.append("".join(_BRACKETS.get(c, c) for c in token.translate(_AS_WRITTEN)).lower())
    return tuple(tokens)


def _keeps_period(token: str, rest: str, is_before_digit: bool) -> bool:
    if rest[:1].isalnum():
        return False
    low = token.lower()
    if low == "no":
        return not rest and is_before_digit
    return (
        low in _ABBREVIATIONS
        or (len(token) == 1 and token.isalpha())
        or (low in _CAPITALISED_ABBREVIATIONS and token[0].isupper())
    )
