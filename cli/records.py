"""What commands that write a record share: its name, what they say of it, and its figures as cells of a table."""

import json
from pathlib import Path
from typing import Any

from nmm_serve.cli.errors import ItemsFailed
from nmm_serve.cli.render import note

SHOWN_FAILURES = 5


def file_name(model: str) -> str:
    last = (
        model.rstrip("/").rpartition("/")[2]
        if model.startswith(("http://", "https://"))
        else Path(model).resolve().name
    )
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in last) or "model"


def raise_failures(record: dict[str, Any], out: Path) -> None:
    from nmm_serve.evals.run import failures

    failed = failures(record)
    if failed:
        more = f"\n  and {len(failed) - SHOWN_FAILURES} more, all in {out}" if len(failed) > SHOWN_FAILURES else ""
        shown = "\n  ".join(failed[:SHOWN_FAILURES])
        raise ItemsFailed(f"items or tasks failed, so these tasks have no score:\n  {shown}{more}")


def keep(record: dict[str, Any], output: Path | None) -> None:
    """Write a record that was asked for."""
    from nmm_serve.evals.records import write_text

    if output is not None:
        write_text(output, json.dumps(record, indent=2, allow_nan=False) + "\n")
        note(f"Record written to {output}")


def cell(found: dict[str, Any] | None) -> str:
    """A measured value with its interval; a dash where there is none."""
    if found is None:
        return "-"
    interval = found["interval"]
    around = f" [{interval['low']:.3g}, {interval['high']:.3g}]" if interval else ""
    return f"{found['value']:.3g}{around}"
