"""nmm-train: train models and make data."""

from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Group, Subgroup
from nmm_serve.cli.merging import interpolate, merge
from nmm_serve.cli.render import note, print_table, progress_bars
from nmm_serve.cli.scaling import fit, plan, sweep
from nmm_serve.cli.speed import speed


@click.group(cls=Group)
def main() -> None:
    """Train native multimodal models, from scratch or from parts of others, and fit their scaling laws."""


main.add_command(sweep)
main.add_command(fit)
main.add_command(plan)
main.add_command(merge)
main.add_command(interpolate)
main.add_command(speed)


@main.command()
@click.argument("config")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. model.family=late.")
def run(config: str, out: Path, overrides: tuple[str, ...]) -> None:
    """Train CONFIG, a recipe's name or a YAML file, into the folder OUT; its checkpoint is OUT/final.

    A run that was killed goes on where its last resume checkpoint stands: type the same command again.

    \b
    Examples:
      nmm-train run demo --out runs/early
      nmm-train run demo --out runs/late --set model.family=late
      torchrun --nproc-per-node 8 --no-python nmm-train run demo --out runs/early --set parallel.strategy=fsdp
    """
    import os

    from nmm_serve.train.config import load_config
    from nmm_serve.train.loop import train

    loaded = load_config(config, overrides)
    if loaded.objective == "sft" and loaded.init_from is None and loaded.start.decoder is None:
        note("fine-tuning a model from scratch: to go on from a checkpoint, --set init_from=RUN/final")
    if os.environ.get("RANK", "0") != "0":  # torchrun started several of us: the first one shows what happens
        train(loaded, out)
        return
    with progress_bars() as bars:
        view = RunView(bars, loaded.steps)
        final = train(loaded, out, view)
    note(f"checkpoint: {final}")


class RunView:
    """Shows a run's events: a bar with loss and speed, and a line for each validation."""

    def __init__(self, bars: Any, steps: int):
        self.bars = bars
        self.task = bars.add_task("training", total=steps)

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "start":
            several = f", {event['processes']} processes ({event['strategy']})" if event["processes"] > 1 else ""
            place = f"{event['device']}, {event['dtype']}{several}"
            resumed = f", going on from step {event['step']}" if event["step"] else ""
            trained, frozen = event["trained_params"], event["params"] - event["trained_params"]
            note(
                f"{event['family']}: {event['params'] / 1e6:.2f}M parameters, "
                f"{event['active_params'] / 1e6:.2f}M active"
                + (f", {trained:,} trained and the rest frozen" if frozen else "")
                + f"; {place}; {event['steps']} steps{resumed}"
            )
            self.bars.update(self.task, completed=event["step"])
        elif kind == "train":
            text = (
                f"loss {event['loss']:.3f}  {event['tokens_per_s']:,.0f} tok/s  {event['mfu']:.0%} of GEMM"
                + (f"  data wait {event['data_wait']:.0%}" if event["data_wait"] > 0.05 else "")
            )  # fmt: skip
            self.bars.update(self.task, completed=event["step"], description=text)
            if self.bars.disable:
                note(f"step {event['step']}: {text}")
        elif kind == "validation":
            losses = "  ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in event.items() if k.startswith("loss_"))
            note(f"step {event['step']}: validation loss: {losses}")
        elif kind == "bad_step":
            note(f"step {event['step']}: loss {event['loss']}, gradient norm {event['grad_norm']}: step skipped")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
def watch(runs: tuple[Path, ...]) -> None:
    """Show the progress of RUNS, folders that `nmm-train run` trains into or will, until all are done."""
    import time

    from nmm_serve.train.log import progress

    with progress_bars() as bars:
        tasks = {run: bars.add_task(f"{run}: waiting", total=None) for run in runs}
        shown: dict[Path, int] = {}
        while tasks:
            for run in list(tasks):
                state = progress(run)
                if state is None:
                    continue
                if run not in shown:
                    bars.reset(tasks[run])
                text = f"{run}: loss {state.loss:.3f}" if state.loss is not None else f"{run}: starting"
                bars.update(tasks[run], completed=state.step, total=state.steps, description=text)
                if bars.disable and state.step // 100 > shown.get(run, -1):
                    note(f"{text}, step {state.step} of {state.steps}")
                shown[run] = state.step // 100
                if state.done:
                    del tasks[run]
            time.sleep(1)


@main.command()
def recipes() -> None:
    """List the recipes that ship with the project, and what each wants to be given."""
    from nmm_serve.train.config import load_config, recipe_about, recipe_names

    rows = []
    for name in recipe_names():
        config = load_config(name)
        rows.append([name, config.objective, config.model.preset, f"{config.steps:,}", f"{config.context_length}"])
    print_table("", ["recipe", "objective", "preset", "steps", "context"], rows)
    for name in recipe_names():
        click.echo(f"{name}: {recipe_about(name)}")


@main.group(cls=Subgroup)
def data() -> None:
    """Make data sets."""


@data.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--split",
    type=click.Choice(["train", "val", "test"]),
    default="test",
    show_default=True,
    help="Splits have no picture in common.",
)
@click.option("--images", type=click.IntRange(1), default=500, show_default=True, help="How many pictures.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other pictures.")
@click.option(
    "--jitter",
    type=click.IntRange(0),
    help="Pixels that an object may lie off the middle of its cell: few make an easy set.  [default: the whole cell]",
)
@click.option(
    "--max-objects",
    type=click.IntRange(2, 5),
    default=5,
    show_default=True,
    help="Most objects in a picture; fewer are easier.",
)
def builtin(out: Path, split: str, images: int, seed: int, jitter: int | None, max_objects: int) -> None:
    """Write a split of the built-in data to OUT as images, COCO captions and VQA v2 files."""
    from nmm_serve.train.data.builtin import Difficulty, export

    export(out, split, images, seed, Difficulty(jitter, max_objects))
    note(f"{images} images of split {split}: {out}")


if __name__ == "__main__":  # for `torchrun -m`
    main()
