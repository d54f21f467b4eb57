"""nmm-eval compare: which model is better, and whether the data can tell."""

import json
from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Command
from nmm_serve.cli.render import note, print_json, print_table, progress_bars

_FILE = click.Path(path_type=Path)


@click.command(cls=Command)
@click.argument("records", nargs=-1, required=True, type=_FILE)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("-o", "--output", type=_FILE, help="Write the comparison here as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison, and nothing else, on stdout.")
def compare(records: tuple[Path, ...], seed: int, output: Path | None, as_json: bool) -> None:
    """Compare models by their RECORDS: paired tests, intervals, effect sizes, and a ranking that says what it
    cannot tell."""
    from nmm_serve.evals.compare import compare
    from nmm_serve.evals.records import check_place, write_text

    if output is not None:
        check_place(output)
    with progress_bars() as bars:
        bar = bars.add_task("comparing", total=None)
        document = compare(
            records, seed=seed, progress=lambda done, total: bars.update(bar, completed=done, total=total)
        )
    if output is not None:
        write_text(output, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        note(f"Comparison written to {output}")
    if as_json:
        print_json(document)
    else:
        _print_tables(document)
    for name, reason in document["left_out"].items():
        note(f"{name} is left out: {reason}")
    for remark in document["remarks"]:
        note(remark)
    if not document["final"]:
        note("not final: a record was made on part of the data (--limit)")


def _print_tables(document: dict[str, Any]) -> None:
    rows = []
    for metric, found in document["metrics"].items():
        for pair in found["pairs"]:
            rows.append(
                [
                    metric, pair["a"], pair["b"], f"{pair['difference']:+.4g}", _interval(pair["interval"]),
                    _number(pair["p_holm"], ".3f"), _number(pair["effect_size"], "+.2f"),
                    f"{pair['better']} is better" if pair["better"] else "cannot tell",
                ]
            )  # fmt: skip
    columns = ["metric", "a", "b", "a - b", "95 % interval", "p (Holm)", "effect", "verdict"]
    print_table("Pairs", columns, rows)
    rows = []
    for metric, found in document["metrics"].items():
        ranked = [f"{_rank(row['rank'])} {row['model']} {row['value']:.4g}" for row in found["ranking"]]
        rows.append([metric, f"{found['clusters']} {found['unit']}s", "; ".join(ranked), found["conclusion"]])
    print_table("Ranking", ["metric", "drawn", "ranks", "conclusion"], rows)


def _interval(interval: dict[str, Any] | None) -> str:
    return "–" if interval is None else f"{interval['low']:+.4g} to {interval['high']:+.4g}"


def _number(value: float | None, shape: str) -> str:
    return "–" if value is None else format(value, shape)


def _rank(rank: list[int]) -> str:
    low, high = rank
    return f"{low}." if low == high else f"{low}.–{high}."
