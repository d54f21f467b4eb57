"""nmm-train fit: scaling laws from the records of a sweep."""

from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Command
from nmm_serve.cli.render import note, print_json, print_table, progress_bars


@click.command(cls=Command)
@click.argument("records", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as a JSON file, for `plan`.")
@click.option("--bootstraps", type=click.IntRange(20), default=200, show_default=True, help="Resamples an interval.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the resamples.")
def fit(records: Path, as_json: bool, output: Path | None, bootstraps: int, seed: int) -> None:
    """Fit L = E + A/N^alpha + B/D^beta to RECORDS, a JSON Lines file with one run a line.

    A run has at least family, n_params (active), tokens, flops, and loss or losses by data type.

    \b
    Examples:
      nmm-train fit sweep/records.jsonl
      nmm-train fit sweep/records.jsonl --json -o fits.json
    """
    from nmm_serve.evals.scaling.records import load_records
    from nmm_serve.evals.scaling.study import fit_records

    loaded = load_records(records)
    with progress_bars() as bars:
        task = bars.add_task("fitting", total=None)

        def show(what: str, done: int, of: int) -> None:
            bars.update(task, description=what, completed=done, total=of)

        document = fit_records(loaded, bootstraps=bootstraps, seed=seed, progress=show)
        bars.update(task, completed=len(document["fits"]), total=len(document["fits"]))
    if output is not None:
        _write_json(output, document)
        note(f"fits: {output}")
    if as_json:
        print_json(document)
    else:
        _print_fits(document)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    import json

    from nmm_serve.evals.records import write_text

    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


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
    for fit in document["fits"]:
        for warning in fit["warnings"]:
            note(f"warning: {fit['family']}, {fit['target']}: {warning}")


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
