"""nmm-train merge and interpolate: mix checkpoints of one architecture."""

from pathlib import Path

import click

from nmm_serve.cli.errors import Command
from nmm_serve.cli.render import note, print_json, print_table, progress_bars


@click.command(cls=Command)
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Directory of the new checkpoint.")
@click.option("--weights", help="One number for each checkpoint, with commas: 1,1,2.  [default: all the same]")
def merge(checkpoints: tuple[Path, ...], out: Path, weights: str | None) -> None:
    """Average CHECKPOINTS of one configuration and tokenizer, weight by weight, into OUT.

    \b
    Examples:
      nmm-train merge runs/a/final runs/b/final -o merged
      nmm-train merge runs/a/checkpoints/step-* -o averaged
    """
    from nmm_serve.train.merging import merge as merge_checkpoints

    shares = merge_checkpoints(checkpoints, out, None if weights is None else _numbers(weights))
    for path, share in zip(checkpoints, shares, strict=True):
        note(f"{share:.1%} {path}")
    note(f"checkpoint: {out}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,1,2", param_hint="--weights") from None


@click.command(cls=Command)
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--points", type=click.IntRange(2), default=11, show_default=True, help="On the line, ends included.")
@click.option("--data", help="Recipe or YAML file with the validation data.  [default: what A was trained with]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of --data.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the record as a JSON file.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the losses into this PNG file.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def interpolate(
    a: Path,
    b: Path,
    points: int,
    data: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure the validation loss on the straight line from the weights of A to those of B.

    \b
    Example:
      nmm-train interpolate runs/a/final runs/b/final --data demo-sft -o path.json --plot path.png
    """
    import json

    from nmm_serve.errors import UsageError
    from nmm_serve.evals.records import check_place
    from nmm_serve.train.config import load_config
    from nmm_serve.train.merging import interpolate as measure
    from nmm_serve.train.merging import training_config

    for place in (output, plot):
        if place is not None:
            check_place(place)
    if overrides and data is None:
        raise UsageError("--set overrides keys of --data; name a recipe or a YAML file there")
    config = training_config(a) if data is None else load_config(data, overrides)
    with progress_bars() as bars:
        task = bars.add_task("measuring", total=points)

        def show(done: int, losses: dict[str, float]) -> None:
            bars.update(task, completed=done, description=f"mean loss {losses['loss_avg']:.3f}")

        record = measure(a, b, config, points, show)
    if output is not None:
        output.write_text(json.dumps(record, indent=2) + "\n")
        note(f"record: {output}")
    if plot is not None:
        from nmm_serve.evals.loss_path import loss_path

        plot.write_bytes(loss_path(record).png())
        note(f"plot: {plot}")
    if as_json:
        print_json(record)
        return
    names = list(record["points"][0]["losses"])
    rows = [[f"{p['t']:.2f}", *(f"{p['losses'][name]:.4f}" for name in names)] for p in record["points"]]
    rows.append(["barrier", *(f"{record['barrier'][name]:.4f}" for name in names)])
    print_table("", ["t", *(name.removeprefix("loss_") for name in names)], rows, "nats a token; A at 0, B at 1")
