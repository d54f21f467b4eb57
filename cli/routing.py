"""nmm-eval routing: which experts tokens go to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Command
from nmm_serve.cli.records import file_name, raise_failures
from nmm_serve.cli.render import note, print_json, print_table, progress_bars, quiet_stdout

_FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--model", help="Checkpoint directory of a mixture-of-experts model.")
@click.option("--name", help="How tables call the model. Default: the directory's name.")
@click.option(
    "--data",
    type=_FILE,
    help="Folder as for vqa, a training configuration (.yaml), or .jsonl, .txt, .parquet or .tar files.",
)
@click.option("--split", default="val", show_default=True, help="Which split of a --data folder.")
@click.option("--log", type=_FILE, help="A run's folder or log.jsonl, in place of --model and --data.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N documents of each source; not final then.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Documents at once.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("-o", "--output", type=_FILE, help="Where the record goes. Default: NAME-routing.json here.")
@click.option("--json", "as_json", is_flag=True, help="Print the record, and nothing else, on stdout.")
def routing(**options: Any) -> None:
    """Which experts image and text tokens go to, layer by layer: specialisation and load balance."""
    from nmm_serve.evals import routing as task
    from nmm_serve.evals.records import (
        blank_record,
        check_default_place,
        check_place,
        new_record,
        no_checkpoint,
        write_record,
    )
    from nmm_serve.train.data.paths import sources_at

    model, log, name = options["model"], options["log"], options["name"]
    if (log is None) == (model is None) or (model is None) != (options["data"] is None):
        raise click.UsageError("give --model with --data, or --log")
    out = options["output"] or Path(f"{file_name(name or model or str(log))}-routing.json")
    check_place(out)
    if options["output"] is None:
        check_default_place(out, model or str(log))
    if log is not None:
        label = name or (log if log.is_dir() else log.parent).resolve().name
        about = no_checkpoint(label, str(log), "measured from a training log")
        record = blank_record(about, {"name": "training log"}, seed=options["seed"])
        record["tasks"]["routing"] = task.from_log(log)
    else:
        task.check_sparse(model)
        readings, total = _limited(sources_at(options["data"], options["split"]), options["limit"])
        with quiet_stdout(), progress_bars() as bars, _torch_engine(model) as engine:
            bar = bars.add_task("routing", total=len(readings))
            record = new_record(engine, name=name, seed=options["seed"])
            record["tasks"]["routing"] = task.measure(
                engine, readings, total=total, seed=options["seed"], batch_size=options["batch_size"],
                progress=lambda count: bars.advance(bar, count),
            )  # fmt: skip
        record["final"] = record["tasks"]["routing"]["complete"]
    write_record(record, (), out)
    if options["as_json"]:
        print_json(record)
    else:
        _print_routing(record)
    note(f"Record written to {out}")
    raise_failures(record, out)


def _limited(sources: Sequence[Any], limit: int | None) -> tuple[list[Any], int]:
    """Documents that have not been read yet, and how many there are without the limit."""
    from nmm_serve.train.data.paths import readings

    return list(readings(sources, limit=limit)), sum(map(len, sources))


def routing_of(model: str, plan: Any, start_task: Callable[[str, int], Callable[[int], None]]) -> dict[str, Any]:
    """Routing over the data of the other tasks, by torch, which is closed again before another engine opens."""
    from nmm_serve.evals.routing import measure
    from nmm_serve.train.data.paths import sources_of

    files = plan.files
    named = {name: getattr(files, name) for name in ("images", "captions", "questions", "annotations")}
    readings, total = _limited(sources_of(**named), plan.limit)
    with _torch_engine(model) as engine:
        progress = start_task("routing", len(readings))
        return measure(engine, readings, total=total, seed=plan.seed, progress=progress)


def _torch_engine(model: str) -> Any:
    from nmm_serve.engines.torch import TorchEngine

    return TorchEngine(model)


def _print_routing(record: dict[str, Any]) -> None:
    from nmm_serve.evals.table import remarks, routing_table

    columns, rows, caption = routing_table(record)
    print_table(record["model"]["name"], columns, rows, caption)
    for line in remarks([record]):
        note(line)
