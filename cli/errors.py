"""How the commands end: one line and exit 1 for what a user can mend, 2 for usage, a traceback only with --debug.

Usage is a command line that does not parse, lacks an option or contradicts itself. A value that parses and is refused
by what it is given to (an unknown engine, a size that does not fit) is an error like any other, as from a YAML file.
"""

import difflib
import errno
import io
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from nmm_serve.errors import NMMError, UsageError

USAGE = click.UsageError.exit_code
INTERRUPTED = 130
"""Exit status of a command stopped with Ctrl-C, as shells count it (128 + SIGINT)."""


ADVICE = {
    errno.EEXIST: "A file is where a folder must be: give another path",
    errno.ENOTDIR: "A file is where a folder must be: give another path",
    errno.EISDIR: "It is a folder, and a file is expected",
    errno.ENOENT: "Check the path, and make the folder if it is one to write into",
    errno.EACCES: "You have no right to it: give another path, or change its permissions",
}


class ItemsFailed(NMMError):
    """The command ran to its end and wrote its results, but some items failed. They are named in the message."""


def _set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    root = ctx.find_root().command
    if value and isinstance(root, Group):
        root.debug = True


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_debug,
        help="Show the traceback of an error.",
    )


class Command(click.Command):
    """A command that takes `-h` and `--debug`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {}).setdefault("help_option_names", ["-h", "--help"])
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


class Subgroup(click.Group):
    """A group of commands below a console script's root."""

    command_class = Command


class Group(click.Group):
    """The root of a console script: `@click.group(cls=Group)`. Its commands become `Command`s by themselves."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", {}).setdefault("help_option_names", ["-h", "--help"])
        super().__init__(*args, **kwargs)
        self.debug = False
        self.params.append(_debug_option())
        click.version_option(package_name="nmm-serve", message="%(prog)s %(version)s")(self)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            close = difflib.get_close_matches(args[0], known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint} Commands: {', '.join(known)}.")
        return super().resolve_command(ctx, args)

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        self.debug = False
        if isinstance(sys.stdout, io.TextIOWrapper):  # an answer may hold what the terminal cannot show
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            result = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.ClickException as error:
            if self.debug:
                traceback.print_exc()
            error.show()
            sys.exit(error.exit_code)
        except (KeyboardInterrupt, click.Abort):
            click.echo("Stopped.", err=True)
            sys.exit(INTERRUPTED)
        except Exception as error:
            self._fail(error)
        sys.exit(result if isinstance(result, int) else 0)

    def _fail(self, error: Exception) -> NoReturn:
        if self.debug:
            traceback.print_exc()
        click.echo(f"Error: {describe(error)}", err=True)
        sys.exit(USAGE if isinstance(error, UsageError) else 1)


def describe(error: Exception) -> str:
    """One line (or a few, where an NMMError has them) saying what went wrong and what to do next."""
    if isinstance(error, NMMError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("nmm_serve"):
        return (
            f"this needs the package {error.name.partition('.')[0]!r}, which is not installed. What every command "
            "needs comes with pip install nmm-serve (without --no-deps), the rest with its extras: "
            "nmm-serve[train,evals,onnx]"
        )
    if isinstance(error, OSError) and error.errno is not None:
        where = f": {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"disk full{where}. Free some space, or write to another disk; nothing half-written was kept"
        if error.errno == errno.EADDRINUSE:
            return f"the port is in use{where}. Stop what listens there or choose another --port"
        advice = f". {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        return f"{(error.strerror or type(error).__name__).lower()}{where}{advice}"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}\nThis was not expected; run again with --debug to see where it happened."
