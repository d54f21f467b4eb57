"""How commands end: exit status, one clear line, a traceback only on demand."""

import errno
import io
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nmm_serve.cli.errors import Group, ItemsFailed, describe
from nmm_serve.errors import DataError


@click.group(cls=Group)
def tool():
    """A tool."""


@tool.command()
def say():
    """Say something."""
    click.echo("r\u00e9sum\u00e9 \u2588")


@tool.command()
@click.option("--limit", type=int)
@click.option("--fail", type=click.Choice(["data", "disk", "port", "path", "bug", "items", "stop"]))
def work(limit, fail):
    """Do work."""
    if fail == "data":
        raise DataError("x.json is not JSON")
    if fail == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "/data/out.json")
    if fail == "port":
        raise OSError(errno.EADDRINUSE, "Address already in use")
    if fail == "path":
        Path("/no/such/file").read_text()
    if fail == "bug":
        raise ZeroDivisionError("division by zero")
    if fail == "items":
        raise ItemsFailed("3 items failed")
    if fail == "stop":
        raise KeyboardInterrupt
    click.echo("done")


def run(*args):
    return CliRunner().invoke(tool, args)


def test_what_a_terminal_cannot_show_is_shown_otherwise(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    with pytest.raises(SystemExit) as end:
        tool.main(["say"])
    assert end.value.code == 0
    assert written.getvalue() == b"r\xe9sum\xe9 \\u2588\n"


def test_success():
    result = run("work")
    assert (result.exit_code, result.stdout) == (0, "done\n")


@pytest.mark.parametrize(
    ("fail", "line"),
    [
        ("data", "Error: x.json is not JSON"),
        ("disk", "Error: disk full: /data/out.json"),
        ("port", "Error: the port is in use"),
        ("path", "Error: no such file or directory: /no/such/file"),
        ("bug", "Error: ZeroDivisionError: division by zero"),
        ("items", "Error: 3 items failed"),
    ],
)
def test_failure_is_one_line_on_stderr(fail, line):
    result = run("work", "--fail", fail)
    assert result.exit_code == 1
    assert result.stderr.startswith(line)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("args", [("--debug", "work", "--fail", "data"), ("work", "--fail", "data", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(args):
    result = run(*args)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "Error: x.json is not JSON" in result.stderr
    assert "Traceback" not in run("work", "--fail", "data").stderr  # the next run starts afresh


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("work", "--limt", "3"), "--limit"),
        (("wrok",), "Did you mean 'work'?"),
        (("work", "--limit", "many"), "not a valid integer"),
        (("work", "--fail", "nothing"), "'data'"),
    ],
)
def test_usage_errors_exit_2_and_name_the_nearest(args, hint):
    result = run(*args)
    assert result.exit_code == 2
    assert hint in result.stderr


def test_interrupt():
    result = run("work", "--fail", "stop")
    assert result.exit_code == 130
    assert "Stopped" in result.stderr


@pytest.mark.parametrize("args", [("-h",), ("--help",), ("work", "-h"), ("work", "--help")])
def test_help(args):
    result = run(*args)
    assert result.exit_code == 0
    assert "--debug" in result.stdout


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("tool ")


def test_a_missing_package_is_named():
    said = describe(ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets"))
    assert "needs the package 'sklearn', which is not installed" in said
    assert "nmm-serve[train,evals,onnx]" in said
    ours = describe(ModuleNotFoundError("No module named 'nmm_serve.gone'", name="nmm_serve.gone"))
    assert ours.startswith("ModuleNotFoundError")


def test_describe_keeps_to_the_first_line_of_a_stranger():
    assert describe(RuntimeError("first\nsecond")).splitlines()[0] == "RuntimeError: first"
