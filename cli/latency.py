"""`nmm-eval latency --compare`, the deployment ledger, and the page of a comparison."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.progress import Progress

from nmm_serve.cli.errors import Command, ItemsFailed
from nmm_serve.cli.render import note, print_json, print_table, progress_bars, quiet_stdout

_FILE = click.Path(path_type=Path)
_COMPARED = ("compared", "models", "presets", "match", "moe", "image_size", "training", "resume")


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


def _listed(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").split(",")))


def comparison_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of `latency --compare`."""
    for decorate in reversed(
        (
            click.argument("models", nargs=-1, type=_FILE),
            click.option(
                "--compare", "compared", is_flag=True,
                help="Measure MODELS, or models made of --preset, in turn; ratios are to the first. --engine takes "
                "several: torch,vllm,onnx.",
            ),
            click.option(
                "--preset", "presets", multiple=True,
                help="Compare models of this size with random weights; give it several times.",
            ),
            click.option(
                "--match", callback=_listed, default="total,flops,decoder", show_default=True,
                help="By what the late model equals the early one of --preset.",
            ),
            click.option("--moe", is_flag=True, help="Also a mixture of experts of --preset's active size."),
            click.option(
                "--image-size", type=click.IntRange(14), default=224, show_default=True,
                help="Image size of the models of --preset.",
            ),
            click.option(
                "--training/--no-training", default=True, show_default=True,
                help="Also time training steps of the compared models.",
            ),
            click.option(
                "--resume", is_flag=True, help="Go on with the unfinished comparison at --output; its cells stay."
            ),
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The comparison's own options, None when one model is measured, and the others."""
    own = {name: options[name] for name in _COMPARED}
    rest = {name: value for name, value in options.items() if name not in _COMPARED}
    _refuse(("limit",), "is of items to score; times are taken of --requests requests")
    if not own["compared"]:
        _refuse(("match", "image_size", "training"), "belongs to --compare")
        if own["models"] or own["presets"] or own["moe"] or own["resume"]:
            raise click.UsageError(
                "MODELS, --preset, --moe and --resume belong to --compare; one model is named by --model"
            )
        return None, rest
    _refuse(("batch_size", "name"), "is not for --compare: models are named by their folders, loads by --concurrency")
    if own["models"]:
        _refuse(("match", "moe", "image_size"), "is of models made of --preset; MODELS are as they are")
    if rest["model"] is not None:
        raise click.UsageError("with --compare, name the models without --model: nmm-eval latency --compare A B")
    if bool(own["models"]) == bool(own["presets"]):
        raise click.UsageError("--compare takes either MODELS or --preset")
    if own["models"] and len(own["models"]) < 2:
        raise click.UsageError("--compare needs at least two MODELS")
    if rest["rates"]:
        raise click.UsageError("--rate is an open loop, which waits for nobody: measure each model alone, with --model")
    return own, rest


def _refuse(names: Sequence[str], why: str) -> None:
    """Raise UsageError where one of these options was given, which would otherwise be dropped."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and context.get_parameter_source(parameter.name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"{parameter.opts[0]} {why}")


def compare_latency(compared: dict[str, Any], options: dict[str, Any]) -> None:
    """Measure several models in turn and print their ratios."""
    from nmm_serve.evals.lab import contenders, document, partners, versus
    from nmm_serve.evals.latency import Load
    from nmm_serve.evals.records import check_place

    out = options["output"] or Path("latency-comparison.json")
    check_place(out)
    engines = _listed(None, None, options["engine"] or "torch")  # type: ignore[arg-type]
    for engine in engines:
        if engine not in versus.ENGINES:
            raise click.UsageError(f"--compare takes engines {', '.join(versus.ENGINES)}, not {engine!r}")
    load = Load(
        concurrencies=options["concurrency"], requests=options["requests"], warmup=options["warmup"],
        output_tokens=options["output_tokens"], sweep=options["sweep"], slo=options["slo"],
    )  # fmt: skip
    files = _images(options)
    with quiet_stdout(), tempfile.TemporaryDirectory(prefix="nmm-latency-") as folder, progress_bars() as bars:
        if compared["models"]:
            groups = [contenders.Group("checkpoints", contenders.contenders(compared["models"]))]
        else:
            built = bars.add_task("models", total=len(compared["presets"]))
            groups = []
            for preset in compared["presets"]:
                models = partners.build(
                    preset, compared["match"], Path(folder), moe=compared["moe"], image_size=compared["image_size"],
                    seed=options["seed"],
                )  # fmt: skip
                groups.append(contenders.Group(preset, tuple(models)))
                bars.advance(built)
        start_task = _tasks(bars, len(groups) * (len(engines) + compared["training"]))
        measured = versus.compare(
            groups, engines, load, out, Path(folder), training=compared["training"], resume=compared["resume"],
            files=files, seed=options["seed"], start_task=start_task,
        )  # fmt: skip
    if options["as_json"]:
        print_json(measured)
    else:
        _print(measured)
    note(f"Comparison written to {out}")
    failed = document.failed(measured)
    if failed:
        raise ItemsFailed("parts of the comparison failed:\n  " + "\n  ".join(failed))


def _tasks(bars: Progress, count: int) -> Callable[[str, int], Callable[[int], None]]:
    """A bar for each of `count` tasks and one for all; without a terminal, a line when a task begins."""
    whole = bars.add_task("comparison", total=count)
    begin = time.monotonic()
    begun: list[str] = []

    def start_task(task: str, total: int) -> Callable[[int], None]:
        bars.update(whole, completed=len(begun))
        gone = time.monotonic() - begin
        if bars.disable and begun:
            left = gone / len(begun) * (count - len(begun))
            note(f"{len(begun)} of {count} done in {gone / 60:.1f} min, about {left / 60:.0f} min left; now {task}")
        elif bars.disable:
            note(f"{count} parts; now {task}")
        begun.append(task)
        bar = bars.add_task(task, total=total)
        return lambda done: bars.advance(bar, done)

    return start_task


def _images(options: dict[str, Any]) -> tuple[Path, ...]:
    """Image files of the data options; none without them, and pictures are then made up."""
    from nmm_serve.errors import DataError
    from nmm_serve.evals.datasets import find_files
    from nmm_serve.evals.run import Options, load_data

    named = {name: options[name] for name in ("images", "captions", "questions", "annotations")}
    if options["data"] is None and not any(named.values()):
        return ()
    files = find_files(options["data"], options["split"], **named)
    found = load_data(Options(tasks=("latency",), files=files, out=Path("unused.json"))).latency_images
    if not found:
        raise DataError("the data holds no images")
    return found


def _print(document: dict[str, Any]) -> None:
    from nmm_serve.evals.lab import tables

    for title, columns, rows in tables.all_tables(document):
        print_table(title, columns, rows)


@click.command(cls=Command)
@click.argument("models", nargs=-1, required=True, type=_FILE)
@click.option("--engine", callback=_listed, default="torch,vllm,onnx", show_default=True, help="Engines, by commas.")
@click.option("--json", "as_json", is_flag=True, help="Print the ledger as JSON.")
def ledger(models: tuple[Path, ...], engine: tuple[str, ...], as_json: bool) -> None:
    """What must be built, shipped and kept to serve each of MODELS (checkpoints) with each engine."""
    from nmm_serve.evals.lab import tables, versus
    from nmm_serve.evals.lab.contenders import contenders
    from nmm_serve.evals.lab.ledger import DEFINITIONS

    with quiet_stdout(), tempfile.TemporaryDirectory(prefix="nmm-ledger-") as folder, progress_bars() as bars:
        bar = bars.add_task("ledger", total=len(models) * len(engine))
        rows = []
        for model in contenders(models):
            for name in engine:
                rows.append(versus.ledger_row(model, name, Path(folder)))
                bars.advance(bar)
    if as_json:
        print_json({"definitions": DEFINITIONS, "rows": rows})
    else:
        print_table(*tables.ledger_table(rows))


@click.command(name="latency-report", cls=Command)
@click.argument("comparison", type=_FILE)
@click.option(
    "--quality", type=_FILE, multiple=True,
    help="Records of vqa or caption whose models are those compared: adds quality against latency and memory.",
)  # fmt: skip
@click.option("-o", "--output", type=_FILE, default=Path("latency-report"), show_default=True, help="Folder to write.")
def latency_report(comparison: Path, quality: tuple[Path, ...], output: Path) -> None:
    """Write a COMPARISON of latency as Markdown tables and SVG plots."""
    from nmm_serve.evals.lab.document import load_comparison
    from nmm_serve.evals.lab.page import write_page
    from nmm_serve.evals.records import load_record

    page = write_page(load_comparison(comparison), [load_record(path) for path in quality], output)
    note(f"Tables and plots written to {page}")
