"""What the commands show: tables and JSON on stdout, progress bars and notes on stderr."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def stderr_console() -> Console:
    return Console(file=sys.stderr, highlight=False)


def note(message: str) -> None:
    """One line for the reader on stderr, so that stdout stays clean for `--json`. Only a terminal folds it."""
    stderr_console().print(Text(message), soft_wrap=True)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """What libraries print goes to stderr meanwhile, child processes and C code included: stdout is for the result."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def print_json(document: Any) -> None:
    """Exactly one JSON document on stdout. Refuses NaN and infinity, which are not JSON."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, or a terminal that knows ASCII only
        text = json.dumps(document, indent=2, allow_nan=False)
    click.echo(text)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Progress bars with count, time gone and time left, on stderr; silent where stderr is not a terminal."""
    console = stderr_console()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield bars


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    """A table on stdout: the first column left-aligned, the others right-aligned. All of it is plain text, not markup:
    models, files and question types are called as they please."""
    table = Table(title_justify="left", caption_justify="left")
    table.title = Text(title, "table.title") if title else None
    table.caption = Text(caption, "table.caption") if caption else None
    for index, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # Without a terminal (a pipe, a log) rich would fold everything to 80 columns.
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)
