"""nmm-train speed: a training step against a plain Hugging Face Trainer, the machine's matrix rate, and experts."""

from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Command
from nmm_serve.cli.records import cell, keep
from nmm_serve.cli.render import print_json, print_table, progress_bars, quiet_stdout

_FILE = click.Path(path_type=Path)
_COUNT = click.IntRange(1)
_VARIANTS = ("dense", "hf_padded", "hf_packed", "moe")
GIB = 2**30


@click.command(cls=Command)
@click.option("--preset", default="base", show_default=True, help="Size of the models; their weights are random.")
@click.option(
    "--variant", "variants", type=click.Choice(_VARIANTS), multiple=True, default=_VARIANTS, show_default=True,
    help="Give it again for each variant to be timed.",
)  # fmt: skip
@click.option("--threads", type=_COUNT, help="Threads of a step.  [default: as many as torch takes]")
@click.option("--rows", type=_COUNT, default=4, show_default=True, help="Packed rows in a step.")
@click.option("--context", "context_length", type=click.IntRange(2), default=512, show_default=True)
@click.option("--rounds", type=_COUNT, default=5, show_default=True, help="Timed rounds; one more warms up.")
@click.option("-o", "--output", type=_FILE, help="Write the record here.")
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of the tables.")
def speed(
    preset: str, variants: tuple[Any, ...], threads: int | None, output: Path | None, as_json: bool, **options: Any
) -> None:
    """Time training steps in turns: ours, a plain Hugging Face Trainer's on the same documents, padded and packed, and
    a mixture of experts of equal active parameters.

    \b
    Examples:
      nmm-train speed -o speed.json
      nmm-train speed --preset large --variant dense --variant hf_padded --variant hf_packed
      nmm-train speed --rows 8 --variant dense --variant moe
    """
    import torch

    from nmm_serve.evals.records import blank_record, check_place, no_checkpoint
    from nmm_serve.train.speed import measure

    if output is not None:
        check_place(output)
    threads = threads or torch.get_num_threads()
    with quiet_stdout(), progress_bars() as bars:
        bar = bars.add_task("steps", total=(options["rounds"] + 1) * len(set(variants)))
        section = measure(preset, variants, threads=threads, progress=lambda n: bars.advance(bar, n), **options)
    record = blank_record(no_checkpoint(None, preset, "weights are random"), {"name": "train"}, seed=0)
    record["tasks"] = {"train_speed": section}
    keep(record, output)
    if as_json:
        print_json(record)
        return
    print_table(
        f"{preset}, {threads} threads, {options['rows']} x {options['context_length']}",
        ["variant", "parameters", "active", "seconds a step", "tokens/s", "padding", "of GEMM rate", "peak GiB"],
        [
            [
                row["variant"],
                f"{row['parameters'] / 1e6:.1f}M",
                f"{row['active'] / 1e6:.1f}M",
                cell(row["seconds"]),
                cell(row["tokens_per_s"]),
                f"{sum(row['padding']) / (sum(row['padding']) + sum(row['tokens'])):.0%}",
                cell(row["gemm_share"]),
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f}",
            ]
            for row in section["variants"]
        ],
    )
    print_table(
        "",
        ["comparison", "value", "bar", "reached"],
        [
            [row["name"], cell(row), row["bar"] or "-", {None: "-", True: "yes", False: "no"}[row["reached"]]]
            for row in section["comparisons"]
        ],
    )
