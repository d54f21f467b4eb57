"""What a user did wrong. The commands print these as one line and exit 1, or 2 for usage; `assert` is for our own
invariants."""

import difflib
from collections.abc import Iterable


class NMMError(Exception):
    """Base of every error that a user can mend. The message says what is wrong, which value was
    seen, what was expected, and what to do next."""


class ConfigError(NMMError):
    """A configuration file, key, value or option."""


class UsageError(ConfigError):
    """A command-line option that does not exist or contradicts another one."""


class CheckpointError(NMMError):
    """A checkpoint directory that is missing, incomplete, damaged or of another kind."""


class ImageError(NMMError):
    """An image that cannot be read or used. Messages never carry a decoder's own text: it can leak memory addresses."""


class DataError(NMMError):
    """A data source, file or record."""


class PromptError(NMMError):
    """A prompt that the model cannot take: too long, wrong number of images, unknown role."""


class EngineError(NMMError):
    """An engine that is not installed, not reachable, or refused to start."""


class TrainingError(NMMError):
    """A training run that cannot go on."""


def first_line(error: BaseException) -> str:
    """What another library's error says, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for a name that does not exist, with the nearest existing one."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}"
