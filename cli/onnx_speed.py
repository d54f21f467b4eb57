"""nmm-eval onnx-speed: exported models against torch eager on this machine's CPU."""

from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Command
from nmm_serve.cli.records import cell, keep
from nmm_serve.cli.render import note, print_json, print_table, progress_bars, quiet_stdout

_FILE = click.Path(path_type=Path)
_COUNT = click.IntRange(1)


@click.command(name="onnx-speed", cls=Command)
@click.option("--preset", default="base", show_default=True, help="Size of the models; their weights are random.")
@click.option(
    "--family", "families", type=click.Choice(["early", "moe"]), multiple=True, default=("early",), show_default=True,
    help="Give it twice to compare experts with their dense active twin.",
)  # fmt: skip
@click.option(
    "--quant", "quantizations", type=click.Choice(["none", "int8", "int4"]), multiple=True,
    default=("none", "int8", "int4"), show_default=True,
)  # fmt: skip
@click.option("--threads", type=_COUNT, default=2, show_default=True)
@click.option("--rounds", type=_COUNT, default=10, show_default=True, help="Timed rounds; one more warms up.")
@click.option("--prompt-tokens", type=_COUNT, default=256, show_default=True)
@click.option("--new-tokens", type=_COUNT, default=32, show_default=True)
@click.option("--folder", type=_FILE, help="Where the models are put meanwhile. Default: the system's folder for that.")
@click.option("-o", "--output", type=_FILE, help="Write the record here.")
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of the table.")
def onnx_speed(preset: str, folder: Path | None, output: Path | None, as_json: bool, **options: Any) -> None:
    """Time prefill and decode of exported models, in turns with torch eager and the memory's speed.

    \b
    nmm-eval onnx-speed --preset large -o speed.json
    nmm-eval onnx-speed --preset base --family early --family moe -o experts.json
    """
    import tempfile

    from nmm_serve.evals.onnx_speed import measure
    from nmm_serve.evals.records import blank_record, check_place, no_checkpoint

    if output is not None:
        check_place(output)
    place = tempfile.TemporaryDirectory(prefix="nmm-onnx-speed-", dir=folder)
    with place, quiet_stdout(), progress_bars() as bars:
        bar = bars.add_task("rounds", total=options["rounds"] + 1)
        section = measure(Path(place.name), preset, progress=lambda count: bars.advance(bar, count), **options)
    model = no_checkpoint(None, preset, "weights are random")
    record = blank_record(model, {"name": "onnx", "threads": section["threads"]}, seed=0)
    record["tasks"] = {"onnx_speed": section}
    keep(record, output)
    if as_json:
        print_json(record)
        return
    names = ("prefill_tokens_per_s", "prefill_x_torch", "decode_tokens_per_s", "decode_x_torch", "bandwidth_share",
             "x_dense")  # fmt: skip
    rows = [[row["family"], row["variant"], *(cell(row[name]) for name in names)] for row in section["variants"]]
    heads = ["family", "variant", "prefill tok/s", "x torch", "decode tok/s", "x torch", "of bandwidth", "x dense"]
    print_table(f"{preset}, {section['threads']} threads", heads, rows)
    note(f"reading: {cell(section['read_gib_per_s'])} GiB/s")
