"""Records of a sweep, one JSON object a line: what was trained on how much, and the losses it reached."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nmm_serve.errors import DataError, unknown_name
from nmm_serve.evals.scaling.space import Runs

MEAN = "loss"
"""The target of the mean over data types; the others are named after their type."""
_SAME_TOTAL = 1.001
"""Totals of one size that differ by less than this factor are alike: rounding, or the weights of another router."""


@dataclass(frozen=True)
class SweepRecord:
    """One run. `values` is the whole JSON object, keys that nothing here reads included."""

    line: int
    family: str
    n_params: float
    """Active parameters."""
    tokens: float
    flops: float
    losses: dict[str, float]
    """Nats a token by target: MEAN, and each data type."""
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float | None:
        """Share of experts that a token does not visit. None where the record tells neither it nor the experts."""
        given, experts = self.values.get("sparsity"), self.values.get("num_experts")
        if given is not None:
            return float(given)
        return 1 - (self.values.get("num_experts_per_tok") or 1) / experts if experts else None

    @property
    def mixture(self) -> str | None:
        """Name of the data mixture, a number's digits included. None where the record names none."""
        given = self.values.get("mixture")
        return None if given in (None, "") else str(given)


@dataclass(frozen=True)
class Records:
    runs: list[SweepRecord]
    warnings: list[str]
    """What was filled in and what stands twice, in plain words."""

    def families(self) -> list[str]:
        return list(dict.fromkeys(run.family for run in self.runs))

    def of(self, family: str) -> list[SweepRecord]:
        return [run for run in self.runs if run.family == family]

    def mixtures(self) -> list[str]:
        """Data mixtures that the records name."""
        return list(dict.fromkeys(run.mixture for run in self.runs if run.mixture is not None))

    def of_mixture(self, name: str) -> "Records":
        """The runs of one mixture alone. Raises DataError for one that no record names."""
        if name not in self.mixtures():
            raise DataError(unknown_name("mixture of these records", name, self.mixtures()))
        return Records([run for run in self.runs if run.mixture == name], self.warnings)


def targets(runs: Sequence[SweepRecord]) -> list[str]:
    """The mean first, then the data types in order of appearance."""
    names = dict.fromkeys(name for run in runs for name in run.losses)
    return sorted(names, key=lambda name: name != MEAN)


def as_runs(records: Sequence[SweepRecord], target: str) -> Runs:
    held = [r for r in records if target in r.losses]
    columns = np.array([(r.n_params, r.tokens, r.losses[target], r.flops) for r in held], float).reshape(-1, 4)
    return Runs(*columns.T)


def all_params(records: Sequence[SweepRecord]) -> tuple[list[list[float]] | None, str | None]:
    """[active, all] parameters of each size, ascending, and a warning where a size has several numbers of all; the
    largest is given. None where a record tells no `n_params_total`."""
    if any(r.values.get("n_params_total") is None for r in records):
        return None, None
    totals: dict[float, list[float]] = {}
    for r in records:
        totals.setdefault(r.n_params, []).append(float(r.values["n_params_total"]))
    warning = None
    several = {active: found for active, found in totals.items() if max(found) > _SAME_TOTAL * min(found)}
    if several:
        active = max(several)
        warning = (
            f"{len(several)} sizes have several numbers of all parameters, {active:.4g} active ones from "
            f"{min(several[active]):.4g} to {max(several[active]):.4g} (other numbers of experts?): `plan` takes the "
            "most. For the memory of one shape fit the runs of that shape alone"
        )
    return [[active, max(found)] for active, found in sorted(totals.items())], warning


def load_records(path: Path) -> Records:
    """Read a JSON Lines file. Raises DataError naming the line of the first fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; `nmm-train sweep` writes records.jsonl") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name the file, for example {path / 'records.jsonl'}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); expected JSON Lines") from None
    return parse_records(text.split("\n"), str(path))


def parse_records(lines: Iterable[str], source: str) -> Records:
    """Check each line. A record needs family, n_params, tokens, and loss or losses; missing FLOPs are filled with 6ND
    and said so. Raises DataError."""
    runs: list[SweepRecord] = []
    filled: dict[str, list[int]] = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{source}, line {number}"
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg}") from None
        except RecursionError:
            raise DataError(f"{where} is not JSON: nested too deeply") from None
        except ValueError:  # Python's limit on the digits of a whole number
            digits = sys.get_int_max_str_digits()
            raise DataError(f"{where}: a number has more than {digits} digits; write it as 1e9 is written") from None
        if not isinstance(values, dict):
            raise DataError(f"{where} is not a JSON object but a {type(values).__name__}; expected one run a line")
        family = values.get("family")
        if not isinstance(family, str) or not family:
            raise DataError(f"{where}: family must be a name such as 'early', not {family!r}")
        n_params, tokens = _positive(values, "n_params", where), _positive(values, "tokens", where)
        if values.get("flops") is None:
            filled.setdefault(family, []).append(number)
            flops = 6 * n_params * tokens
        else:
            flops = _positive(values, "flops", where)
        _check_sparsity(values, where)
        if values.get("n_params_total") is not None:
            _positive(values, "n_params_total", where)
        runs.append(SweepRecord(number, family, n_params, tokens, flops, _losses(values, where), values))
    if not runs:
        raise DataError(f"{source} holds no records; expected one JSON object a line")
    for family in dict.fromkeys(run.family for run in runs):
        _check_same_types([run for run in runs if run.family == family], source)
    filled_warnings = [_filled_warning(family, numbers) for family, numbers in filled.items()]
    return Records(runs, filled_warnings + _repeated_warning(runs))


def _positive(values: dict[str, Any], key: str, where: str) -> float:
    if key not in values:
        raise DataError(f"{where} lacks {key}; a record needs family, n_params, tokens, flops and loss or losses")
    return _number(values[key], key, where)


def _number(value: Any, key: str, where: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise DataError(f"{where}: {key} must be a positive number, not {value!r}")
    return number


def _losses(values: dict[str, Any], where: str) -> dict[str, float]:
    by_type = values.get("losses")
    if by_type is not None and (not isinstance(by_type, dict) or not by_type):
        raise DataError(f"{where}: losses must map data types to numbers, not {by_type!r}")
    losses = {name: _number(value, f"losses.{name}", where) for name, value in (by_type or {}).items()}
    if MEAN in losses:
        raise DataError(f"{where}: losses has a data type named {MEAN!r}, which is the name of their mean; rename it")
    if values.get("loss") is not None:
        return {MEAN: _number(values["loss"], "loss", where), **losses}
    if not losses:
        raise DataError(f"{where} lacks loss and losses; give one of them")
    return {MEAN: sum(losses.values()) / len(losses), **losses}


def _check_sparsity(values: dict[str, Any], where: str) -> None:
    given = values.get("sparsity")
    if given is not None and not (type(given) in (int, float) and 0 <= given < 1):
        raise DataError(f"{where}: sparsity is the share of idle experts, from 0 to under 1, not {given!r}")
    experts, used = values.get("num_experts"), values.get("num_experts_per_tok")
    for key, value in (("num_experts", experts), ("num_experts_per_tok", used)):
        if value is not None and (type(value) is not int or value < 0):
            raise DataError(f"{where}: {key} must be a whole number, not {value!r}")
    if experts and used is not None and not 1 <= used <= experts:
        raise DataError(f"{where}: num_experts_per_tok {used} must lie between 1 and num_experts {experts}")


def _check_same_types(runs: Sequence[SweepRecord], source: str) -> None:
    """A mean over other data types is another quantity."""
    first = set(runs[0].losses)
    for run in runs:
        if set(run.losses) != first:
            odd = sorted(set(run.losses) ^ first)
            raise DataError(
                f"{source}, line {run.line}: the data types of family {run.family!r} differ from those of line "
                f"{runs[0].line} ({', '.join(odd)}); fit records of one validation set at a time"
            )


def _filled_warning(family: str, numbers: list[int]) -> str:
    late = "; for late fusion that leaves out that text skips the encoder" if family.startswith("late") else ""
    return f"{family}: flops missing in {len(numbers)} records (first: line {numbers[0]}); 6ND was taken{late}"


def _repeated_warning(runs: Sequence[SweepRecord]) -> list[str]:
    """A warning where a record equals an earlier one, none otherwise.

    Two runs never reach equal losses to the last digit, but losses that were rounded may be equal in two runs whose
    records name no seed: so this is no error.
    """
    first: dict[str, int] = {}
    repeated = []
    for run in runs:
        same = (run.family, run.n_params, run.tokens, sorted(run.losses.items()), run.values.get("seed"), run.mixture)
        line = first.setdefault(repr(same), run.line)
        if line != run.line:
            repeated.append(f"{run.line} of {line}")
    if not repeated:
        return []
    named = ", ".join(repeated[:5]) + (", ..." if len(repeated) > 5 else "")
    return [
        f"{len(repeated)} records repeat another in family, size, tokens, losses, seed and mixture (line {named}): a "
        "run that is counted twice makes intervals too narrow and the held-out error too small. Take the copies out; "
        "if they are other runs, give each its seed"
    ]
