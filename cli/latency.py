"""What `nmm-eval latency` does beside measuring one model: its options' forms."""

import click


def parse_sweep(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """`resolution=112,224` to a name and its values."""
    found = []
    for text in values:
        name, _, listed = text.partition("=")
        try:
            found.append((name, tuple(int(value) for value in listed.split(","))))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not NAME=NUMBER,NUMBER, for example resolution=112,224") from None
    return tuple(found)


def parse_slo(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[tuple[str, float], ...]:
    """`ttft=200,tpot=30` in milliseconds to names and seconds."""
    found = []
    for limit in text.split(",") if text else ():
        name, _, number = limit.partition("=")
        try:
            found.append((name, float(number) / 1000))
        except ValueError:
            raise click.BadParameter(f"{limit!r} is not NAME=MILLISECONDS, for example ttft=200,tpot=30") from None
    return tuple(found)
