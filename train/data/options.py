"""The options of a mixture file, checked against the constructor that takes them."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from nmm_serve.errors import ConfigError, unknown_name

Paths = list[Path]
"""An option that takes one path or a list of paths; `*` and `**` expand."""


def checked(constructor: Callable, options: Mapping[str, Any], where: str, base: Path) -> dict[str, Any]:
    """Keyword arguments for `constructor` from `options`, converted to the types it names.

    Relative paths start at `base`. Raises ConfigError for an unknown option (with the nearest known one), a missing
    one, and a value of another type.
    """
    parameters = {name: p for name, p in inspect.signature(constructor).parameters.items() if p.kind is p.KEYWORD_ONLY}
    hints = typing.get_type_hints(constructor.__init__ if inspect.isclass(constructor) else constructor)
    for option in options:
        if option not in parameters:
            raise ConfigError(f"{where}: {unknown_name('option', str(option), parameters)}")
    for name, parameter in parameters.items():
        if name not in options and parameter.default is parameter.empty:
            raise ConfigError(f"{where}: option {name!r} is missing. Known: {', '.join(sorted(parameters))}")
    return {option: convert(value, hints[option], f"{where}: {option}", base) for option, value in options.items()}


def convert(value: Any, hint: Any, where: str, base: Path) -> Any:
    """`value` as the type `hint`: int, float, str, Path, Paths, a Literal, or one of these or None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None:
            return None
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{where}: {unknown_name('value', str(value), choices)}")
        return value
    if hint is Path and isinstance(value, str | Path):
        return base / Path(value).expanduser()
    if hint == Paths:
        items = value if isinstance(value, list) else [value]
        if items and all(isinstance(item, str | Path) for item in items):
            return [base / Path(item).expanduser() for item in items]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    expected = {Path: "a path", int: "an integer", float: "a number", str: "text"}.get(
        hint, "a path or a list of paths"
    )
    raise ConfigError(f"{where}: expected {expected}, found {value!r}")
