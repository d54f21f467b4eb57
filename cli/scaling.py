"""nmm-train sweep and fit: train many sizes and budgets, and fit scaling laws to them."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nmm_serve.cli.errors import Command
from nmm_serve.cli.render import note, print_json, print_table, progress_bars, stderr_console
from nmm_serve.errors import UsageError

if TYPE_CHECKING:
    from nmm_serve.train.sweep.run import Sweep


@click.command(cls=Command)
@click.argument("records", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as a JSON file, for `plan`.")
@click.option(
    "--bootstraps", type=click.IntRange(20), default=200, show_default=True, help="Resamples behind each interval."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the resamples.")
@click.option("--mixture", metavar="NAME", help="Only the runs of this mixture of data.")
@click.option(
    "--plots", type=click.Path(path_type=Path, file_okay=False), help="Draw the plots as PNG into this folder."
)
def fit(
    records: Path,
    as_json: bool,
    output: Path | None,
    bootstraps: int,
    seed: int,
    mixture: str | None,
    plots: Path | None,
) -> None:
    """Fit L = E + A/N^alpha + B/D^beta to RECORDS, a JSON Lines file with one run a line.

    A run has at least family, n_params (active), tokens, flops, and loss or losses by data type.

    \b
    Examples:
      nmm-train fit sweep/records.jsonl
      nmm-train fit sweep/records.jsonl --json -o fits.json
    """
    from nmm_serve.evals.scaling.records import load_records
    from nmm_serve.evals.scaling.study import fit_records, with_runs

    loaded = load_records(records)
    if mixture is not None:
        loaded = loaded.of_mixture(mixture)
    with progress_bars() as bars:
        task = bars.add_task("fitting", total=None)

        def show(what: str, done: int, of: int) -> None:
            bars.update(task, description=what, completed=done, total=of)

        document = fit_records(loaded, bootstraps=bootstraps, seed=seed, progress=show)
        bars.update(task, completed=len(document["fits"]), total=len(document["fits"]))
    if output is not None:
        _write_json(output, with_runs(document, loaded))
        note(f"fits: {output}")
    if plots is not None:
        _write_plots(plots, with_runs(document, loaded))
    if as_json:
        print_json(document)
    else:
        _print_fits(document)


@click.command(cls=Command)
@click.argument("plan")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder of the sweep; --estimate needs none.")
@click.option("--estimate", "only_estimate", is_flag=True, help="Say what it will cost, and stop.")
@click.option("--ray", metavar="ADDRESS", help="Train on a Ray cluster that shares OUT; 'auto' finds a running one.")
@click.option(
    "--gpu-share",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="GPUs that each run takes, with --ray; 0 without GPUs.",
)
def sweep(plan: str, out: Path | None, only_estimate: bool, ray: str | None, gpu_share: float) -> None:
    """Train every run of PLAN, a shipped plan's name or a YAML file, into OUT; write OUT/records.jsonl for `fit`.

    Each size is trained once, at a constant rate; its budgets branch off with a cool-down. A sweep that was stopped or
    killed goes on when you type the same command again. Shipped plans: compact (2 cores, hours), gpu-20min, paper.

    \b
    Examples:
      nmm-train sweep compact --estimate
      nmm-train sweep compact --out sweep
    """
    from nmm_serve.train.sweep.plan import load_plan
    from nmm_serve.train.sweep.pools import LocalPool, Pool, RayPool
    from nmm_serve.train.sweep.run import Sweep, check_plan

    loaded = load_plan(plan)
    if only_estimate:
        if out is not None:
            check_plan(loaded, out)
        with tempfile.TemporaryDirectory(prefix="nmm-estimate-") as folder:
            _tell_cost(Sweep(loaded, Path(folder)))
        return
    if out is None:
        raise UsageError("give the sweep's folder with --out")
    study = Sweep(loaded, out)
    _tell_cost(study)
    pool: Pool
    if ray is not None:
        pool = RayPool(ray, loaded.workers, loaded.threads, gpu_share)
    else:
        pool = LocalPool(loaded.workers, loaded.threads)
    try:
        with SweepTable() as table:
            records = study.train(pool, table)
    finally:
        pool.close()
    note(f"records: {records}")


def _tell_cost(study: "Sweep") -> None:
    """What the sweep will take, at the matrix rate of this machine."""
    import torch

    from nmm_serve.train.sweep.estimate import count_all, estimate
    from nmm_serve.train.throughput import gemm_rate

    plan, runs = study.plan, list(study.runs.values())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(plan.threads)
    rate = gemm_rate(device, torch.bfloat16 if device == "cuda" else torch.float32)
    cost = estimate(plan, runs, count_all(runs, study.processor), rate)
    small, large = cost.smallest.active / 1e6, cost.largest.active / 1e6
    note(f"{cost.runs} runs off {cost.trunks} trunks, {small:.2f}M to {large:.2f}M active parameters")
    note(f"{cost.flops:.2e} FLOPs ({cost.flops_alone:.2e} without shared trunks), {cost.disk / 1e9:.2f} GB on disk")
    note(
        f"about {cost.seconds / 3600:.1f} h with {plan.workers} at a time, "
        f"if each reaches {plan.utilisation:.0%} of the {rate / 1e9:.0f} GFLOP/s measured on {device}"
    )


@click.command(cls=Command)
@click.option("--flops", type=float, required=True, help="Training budget, e.g. 1e21.")
@click.option("--family", default="early", show_default=True, help="Family to plan; the others are compared with it.")
@click.option("--records", type=click.Path(path_type=Path), help="Fit these records first.")
@click.option("--coefficients", type=click.Path(path_type=Path), help="A file of `nmm-train fit -o`, or your own.")
@click.option(
    "--hardware", "device", default="h100", show_default=True, help="h100, h200, b200, a100, l40s, rtx4090 or mi300x."
)
@click.option("--devices", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--mfu",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of the hardware's peak that training is assumed to reach.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
def plan(
    flops: float,
    family: str,
    records: Path | None,
    coefficients: Path | None,
    device: str,
    devices: int,
    mfu: float,
    as_json: bool,
) -> None:
    """Say what a budget of FLOPs buys: size, tokens, loss, hours, memory; early against late against MoE.

    Without --records or --coefficients the paper's own coefficients are used, with their inconsistencies noted.

    \b
    Examples:
      nmm-train plan --flops 1e21 --family early
      nmm-train plan --flops 3e15 --family moe --coefficients fits.json --hardware rtx4090
    """
    from nmm_serve.evals.scaling.plan import (
        hardware,
        load_coefficients,
        make_plan,
        paper_coefficients,
    )  # fmt: skip
    from nmm_serve.evals.scaling.records import load_records
    from nmm_serve.evals.scaling.study import fit_records

    chosen = hardware(device)
    if records is not None and coefficients is not None:
        raise click.UsageError("give --records or --coefficients, not both")
    if records is not None:
        document, source = fit_records(load_records(records)), str(records)
    elif coefficients is not None:
        document, source = load_coefficients(coefficients), str(coefficients)
    else:
        document, source = paper_coefficients(), "arXiv 2504.07951"
    made = make_plan(document, source, flops=flops, family=family, device=chosen, devices=devices, utilisation=mfu)
    if as_json:
        print_json(made)
    else:
        _print_plan(made)


def _print_plan(made: dict[str, Any]) -> None:
    rows = []
    for row in (made["plan"], *made["others"]):
        held = row["intervals"] or {}
        multiplier = made["multipliers"].get(row["family"])
        rows.append([
            row["family"],
            _count(row["n_params"], held.get("n_params")),
            _count(row["n_params_total"], None),
            _count(row["tokens"], held.get("tokens")),
            _with_interval(row["loss"], held.get("loss")),
            f"{row['hours']:.3g}",
            f"{row['training_bytes_per_device'] / 1e9:.3g}",
            f"{row['weights_bytes'] / 1e9:.3g}",
            "1" if row is made["plan"] else "-" if multiplier is None else f"{multiplier:.3g}",
        ])  # fmt: skip
    device = made["hardware"]
    titles = [
        "family",
        "active params",
        "all params",
        "tokens",
        "loss",
        "hours",
        "GB training",
        "GB weights",
        "compute",
    ]
    caption = (
        f"{device['devices']} x {device['title']}, {device['peak'] / 1e12:.0f} TFLOP/s peak at an assumed "
        f"{device['utilisation']:.0%}; compute: what the family needs for the first one's loss, over this budget"
    )
    print_table(f"{made['flops']:.3g} FLOPs, by {made['source']}", titles, rows, caption)
    for row in (made["plan"], *made["others"]):
        for warning in row["warnings"]:
            note(f"warning: {row['family']}: {warning}")
    for remark in made["notes"]:
        note(f"note: {remark}")


def _count(value: float, interval: list[float] | None) -> str:
    def short(number: float) -> str:
        for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
            if number >= unit:
                return f"{number / unit:.3g}{letter}"
        return f"{number:.3g}"

    return short(value) + (f" [{short(interval[0])}, {short(interval[1])}]" if interval else "")


class SweepTable:
    """The live table of a sweep's runs; without a terminal, a line for each run that starts, ends or fails."""

    def __enter__(self) -> "SweepTable":
        import time

        from rich.live import Live

        console = stderr_console()
        self.live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        self.told: dict[str, tuple[str, int]] = {}
        self.began = time.monotonic()
        self.steps_before: int | None = None
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, sweep: Any) -> None:
        for name, state in sweep.states.items():
            news = (state.status, len(state.problems))
            if self.told.get(name, ("waiting", 0)) != news:
                problem = f": {state.problems[-1]}" if len(state.problems) > self.told.get(name, ("", 0))[1] else ""
                if problem or self.live is None:
                    note(f"{name}: {state.status}{problem}")
            self.told[name] = news
        if self.live is not None:
            self.live.update(self._table(sweep))

    def _table(self, sweep: Any) -> Any:
        from rich.table import Table

        from nmm_serve.train.log import progress

        count = dict.fromkeys(("done", "running", "waiting", "failed"), 0)
        for state in sweep.states.values():
            count[state.status] += 1
        table = Table(title=", ".join(f"{n} {status}" for status, n in count.items()) + self._left(sweep))
        for column in ("run", "step", "loss", "tries", ""):
            table.add_column(column, justify="left" if column in ("run", "") else "right")
        for name, state in sweep.states.items():
            if state.status not in ("running", "failed"):
                continue
            seen = progress(sweep.folder(name))
            step = f"{seen.step} / {seen.steps}" if seen else "-"
            loss = f"{seen.loss:.3f}" if seen and seen.loss is not None else "-"
            table.add_row(name, step, loss, str(len(state.problems) + 1), state.status)
        return table

    def _left(self, sweep: Any) -> str:
        import time

        steps = sum(sweep.steps_done(name) for name in sweep.runs)
        if self.steps_before is None:
            self.steps_before = steps
        made, left = steps - self.steps_before, sum(r.own_steps for r in sweep.runs.values()) - steps
        if not made:
            return ""
        return f"; about {left / made * (time.monotonic() - self.began) / 60:.0f} min left at the speed so far"


def _write_json(path: Path, document: dict[str, Any]) -> None:
    import json

    from nmm_serve.evals.records import write_text

    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _write_plots(folder: Path, document: dict[str, Any]) -> None:
    from nmm_serve.evals.scaling.plots import PLOTS, left_out

    folder.mkdir(parents=True, exist_ok=True)
    for stem, _, _, draw in PLOTS:
        drawn = draw(document)
        if drawn is not None:
            (folder / f"{stem}.png").write_bytes(drawn.png())
    note(f"plots: {folder}")
    for stem, reason in left_out(document).items():
        note(f"{stem} leaves out {reason}")


def _print_fits(document: dict[str, Any]) -> None:
    columns = ("E", "alpha", "beta", "a", "c")
    rows = []
    for fit in document["fits"]:
        cells = [_with_interval(fit[name], fit["intervals"].get(name)) for name in columns]
        errors = [_cell(fit["mae_pct"], ".2f"), _cell(fit["r2"], ".3f")]
        rows.append([f"{fit['family']}, {fit['target']}", str(fit["n"]), *cells, *errors])
    titles = ["family, target", "n", "E", "alpha", "beta", "a (N ~ C^a)", "c (L ~ C^c)", "MAE %", "R2"]
    print_table("L = E + A/N^alpha + B/D^beta", titles, rows, "95 % intervals; MAE and R2 on runs the fit did not see")
    for warning in document["warnings"]:
        note(f"warning: {warning}")
    said: dict[tuple[str, str], list[str]] = {}  # what holds for several targets of a family is said once
    for fit in document["fits"]:
        for warning in fit["warnings"]:
            said.setdefault((fit["family"], warning), []).append(fit["target"])
    for (family, warning), targets in said.items():
        note(f"warning: {family}, {', '.join(targets)}: {warning}")


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
