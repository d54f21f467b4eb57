"""nmm-serve kernels: measure the mixture-of-experts kernels on this machine."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Subgroup
from nmm_serve.cli.render import note, print_json, print_table, progress_bars, quiet_stdout


@click.group(cls=Subgroup)
def kernels() -> None:
    """Measure and tune the mixture-of-experts kernels."""


@kernels.command()
@click.option(
    "--regime", type=click.Choice(["decode", "prefill", "train", "all"]), default="all", show_default=True,
    help="decode: 1 to 64 tokens; prefill: 1 k to 64 k; train: forward and backward.",
)  # fmt: skip
@click.option(
    "--shapes",
    default="A,B,C,D",
    show_default=True,
    metavar="NAMES",
    help="Layer sizes, smallest first: hidden and expert width A 512/1024, B 1024/2816, C 2048/5632, D 4096/14336.",
)
@click.option(
    "--minutes", type=click.FloatRange(0, min_open=True), default=10, show_default=True,
    help="Time for everything. What it does not suffice for is named.",
)  # fmt: skip
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
    help="cpu: tiny layers and the eager paths, to see that the benchmark works.",
)  # fmt: skip
@click.option(
    "--tune", "tuning", is_flag=True,
    help="First spend half of the time on better tiles for this GPU, and keep them in the kernels' table.",
)  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the record here.")
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of the table.")
def bench(
    regime: str, shapes: str, minutes: float, device: str, tuning: bool, out: Path | None, as_json: bool
) -> None:  # fmt: skip
    """Time the experts layer against every peer on this machine, and against what its GPU could do.

    \b
    nmm-serve kernels bench -o kernels.json
    nmm-serve kernels bench --regime decode --shapes A,B --minutes 3
    """
    import torch

    from nmm_serve.errors import EngineError
    from nmm_serve.evals.records import check_place
    from nmm_serve.kernels.bench.device import CpuDevice, CudaDevice, Device
    from nmm_serve.kernels.bench.measure import DeviceLost
    from nmm_serve.kernels.bench.plan import REGIMES, SHAPES, TINY, TINY_REGIMES, cells
    from nmm_serve.kernels.bench.run import run

    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "no GPU: the benchmark times CUDA kernels; --device cpu shows that the benchmark itself works"
        )
    if tuning and device == "cpu":
        raise click.UsageError("--tune searches tiles for a GPU; --device cpu has none")
    known, regimes = (SHAPES, REGIMES) if device == "cuda" else (TINY, TINY_REGIMES)
    names = [name.strip() for name in shapes.split(",")]
    if device == "cpu" and shapes == "A,B,C,D":
        names = list(known)
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--shapes")
    if out is not None:
        check_place(out)
    chosen = {name: tokens for name, tokens in regimes.items() if regime in (name, "all")}
    plan = cells([known[name] for name in names], chosen)
    place: Device = CudaDevice() if device == "cuda" else CpuDevice()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with progress_bars() as bars:

        def shown(total: int) -> Callable[[int, str], None]:
            task = bars.add_task("", total=total)
            return lambda done, label: bars.update(task, completed=done, description=label)

        tuned = None
        if tuning:
            from nmm_serve.kernels.bench.tune import jobs, tune

            minutes /= 2
            todo = jobs([known[name] for name in names], list(chosen))
            try:
                tuned = tune(todo, place, dtype, minutes, progress=shown(len(todo)))
            except DeviceLost as error:
                raise EngineError(
                    f"{error}; the tiles found until then are in the table: run the command again"
                ) from error

        def keep(found: dict[str, Any]) -> None:
            if out is not None:
                write(describe(found | {"tuned": tuned}), out)

        try:
            with quiet_stdout():  # some peers talk
                found = run(plan, place, dtype, minutes, progress=shown(len(plan)), keep=keep)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"{place.name} has too little free memory to be measured (about 3 GB): end what else runs on it"
            ) from error
    record = describe(found | {"tuned": tuned})
    if out is not None:
        write(record, out)
        note(f"Record: {out}")
    if as_json:
        print_json(record)
    else:
        show(record)


@kernels.command()
@click.argument("records", nargs=-1, required=True, type=click.Path(path_type=Path))
def choose(records: Sequence[Path]) -> None:
    """Let RECORDS of the benchmark decide whose kernels vLLM uses on the GPUs that they were measured on.

    The decision is kept in a table within the installed package, and replaces an older one on the same layer: give all
    records of a layer at once. Ours are chosen where no cell of decode and prefill was lost, and both were measured.

    \b
    nmm-serve kernels choose kernels.json
    """
    import json

    from nmm_serve.errors import DataError
    from nmm_serve.evals.annotations import read_json
    from nmm_serve.evals.records import write_text
    from nmm_serve.vllm_plugin.moe_choice import OURS, TABLE, THEIRS, merged, read_table, rows_of

    read: list[dict[str, Any]] = []
    for path in records:
        record = read_json(path)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise DataError(f"{path} is no record of `nmm-serve kernels bench -o`; expected the format {FORMAT!r}")
        try:
            rows = rows_of([record])
        except (KeyError, TypeError, AttributeError):
            raise DataError(f"{path} is a damaged record; run the benchmark again") from None
        if not rows:
            raise DataError(
                f"{path} has no cell that {OURS} and {THEIRS} were both timed in; install vLLM and repeat it"
            )
        read.append(record)
    table = merged(read_table(TABLE), rows_of(read))
    write_text(TABLE, json.dumps({"rows": table}, indent=2) + "\n")
    lines = [
        [" ".join(str(value) for value in row["layer"].values()), str(row["cells"]), number(row["worst_ratio"]),
         "nmm-serve" if row["faster"] else f"vllm: {row['reason']}"]
        for row in table
    ]  # fmt: skip
    print_table(
        "Experts under vLLM",
        ("gpu, dtype, hidden, intermediate, experts, top-k", "cells", "worst ratio", "kernels"),
        lines,
    )


FORMAT = "nmm-serve/kernels/1"


def describe(found: dict[str, Any]) -> dict[str, Any]:
    """The record: the benchmark's numbers with time, seeds and versions."""
    from datetime import UTC, datetime

    from nmm_serve.evals.records import environment

    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": {"weights": 0, "inputs": 1},
        "environment": environment(),
        **found,
    }


def write(record: dict[str, Any], out: Path) -> None:
    import json

    from nmm_serve.evals.records import write_text

    write_text(out, json.dumps(record, indent=2, allow_nan=False) + "\n")


def show(record: dict[str, Any]) -> None:
    """One row a cell: our times, the roofline, the best of the others."""
    rows = [row(cell) for cell in record["cells"]]
    columns = ("cell", "roofline µs", "graph µs [IQR]", "eager µs [IQR]", "of roofline", "best peer", "its µs", "ratio")
    ceiling = record["roofline"]
    rates = f"{ceiling['bandwidth'] / 1e12:.3g} TB/s and {ceiling['flop_rate'] / 1e12:.3g} TFLOP/s measured"
    print_table(f"{record['device']['name']}, {record['dtype']}: {rates}", columns, rows)
    means = record["geometric_mean"]
    click.echo("Ratio to the best peer, geometric mean: " + ", ".join(f"{k} {number(v)}" for k, v in means.items()))
    for name, state in record["peers"].items():
        if state != "measured":
            click.echo(f"{name}: {state}")
    for cell in record["cells"]:
        for result in cell["results"]:
            if result["reason"] and result["reason"].startswith("wrong"):
                click.echo(f"{cell['shape']} {cell['regime']} T={cell['tokens']}: {result['peer']} {result['reason']}")
    if record["not_measured"]:
        click.echo(f"Not measured, {len(record['not_measured'])}: {'; '.join(record['not_measured'])}")


def row(cell: dict[str, Any]) -> Sequence[str]:
    from nmm_serve.kernels.bench.peers import OURS

    results = {result["peer"]: result for result in cell["results"]}
    mine, best = results.get(OURS, {}), results.get(cell["best_peer"], {})
    modes = [mine[mode] for mode in ("graph", "eager") if mode in mine]
    theirs = [best[mode]["median_s"] for mode in ("graph", "eager") if mode in best]
    return [
        f"{cell['shape']} {cell['regime']} T={cell['tokens']} k={cell['top_k']} {cell['routing']}",
        number(cell["roofline"]["seconds"] * 1e6),
        spread(mine.get("graph")),
        spread(mine.get("eager")),
        f"{max(mode['of_roofline'] for mode in modes):.1%}" if modes else "-",
        cell["best_peer"] or "-",
        number(min(theirs) * 1e6) if theirs else "-",
        number(cell["ratio_to_best_peer"]),
    ]


def spread(mode: dict[str, Any] | None) -> str:
    if mode is None:
        return "-"
    low, high = (number(1e6 * seconds) for seconds in mode["quartiles_s"])
    return f"{number(1e6 * mode['median_s'])} [{low}, {high}]"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
