"""What a budget of FLOPs buys: optimal size, tokens, loss, hours and memory, from a fit; and families at equal cost."""

import json
import math
import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nmm_serve.errors import ConfigError, DataError, unknown_name
from nmm_serve.evals.scaling.law import Cost, Law, log_optimal_size
from nmm_serve.evals.scaling.optimise import Array
from nmm_serve.evals.scaling.records import MEAN
from nmm_serve.evals.scaling.resample import FEWEST_RESAMPLES, resampled_interval

EXPERTS = 8
_VOCABULARY = 50432
_LAYERS = 24
TRAINING_BYTES = 18
"""A parameter in mixed precision: bf16 weight and fp32 gradient, master weight and two moments."""
_WEIGHT_BYTES = 2
_RESAMPLED = ("log_A", "alpha", "log_B", "beta", "log_E")
DEFINITIONS = {
    "n_params": "compute-optimal active parameters of the law under the family's cost",
    "hours": "FLOPs / (devices x peak x utilisation); utilisation (MFU) is an assumption, not a measurement",
    "training_bytes": "18 bytes a parameter, experts included, spread over all devices; activations come on top",
    "weights_bytes": "bf16 weights, experts included: what serving needs before its cache",
    "n_params_total": "the active size times the share of the runs that were fitted, between their sizes by its "
    "logarithm, beyond them as at the last; where they do not tell: the active size, and for MoE the paper's shape "
    "(24 layers, vocabulary 50432, 8 experts a layer) at it",
    "multiplier": "compute that the other family needs for the same loss, over this budget; null at or under its E",
    "intervals": "95 %, percentiles over the fit's resamples",
}


@dataclass(frozen=True)
class Hardware:
    title: str
    peak: float
    """Dense bf16 FLOP/s."""
    memory: float
    """Bytes."""


@dataclass(frozen=True)
class Coefficients:
    """A family's law with what is known of its uncertainty."""

    family: str
    law: Law
    cost: Cost
    resampled: dict[str, Array] | None
    """ln A, alpha, ln B, beta, ln E of each resample; None where the source tells no joint uncertainty."""
    warnings: list[str]
    flops_range: tuple[float, float] | None
    sizes_S2: Array | None = None
    """Active and all parameters of each size that was fitted; None where the source does not tell."""

    def all_params(self, active: float) -> float:
        if self.sizes_S2 is not None:
            active_S, all_S = self.sizes_S2.T
            return active * float(np.interp(math.log(active), np.log(active_S), all_S / active_S))
        return paper_moe_params(active) if self.family.endswith("moe") else active


def hardware(name: str) -> Hardware:
    """Raises ConfigError for a name that is not in the table."""
    table = _shipped("hardware.yaml")
    if name not in table:
        raise ConfigError(unknown_name("hardware", name, table))
    return Hardware(**table[name])


def hardware_names() -> list[str]:
    return list(_shipped("hardware.yaml"))


@cache
def _shipped(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(files("nmm_serve.evals.scaling").joinpath(name).read_text(encoding="utf-8"))
    return loaded


def paper_coefficients() -> dict[str, Any]:
    """The paper's printed fits, with the inconsistencies among them under `notes`."""
    return _shipped("paper.yaml")


def load_coefficients(path: Path) -> dict[str, Any]:
    """A JSON or YAML file with a `fits` list, as `nmm-train fit -o` writes. Raises DataError."""
    try:
        document = (
            yaml.safe_load(path.read_text(encoding="utf-8"))
            if path.suffix != ".json"
            else json.loads(path.read_text(encoding="utf-8"))
        )
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; `nmm-train fit RECORDS -o {path}` writes one") from None
    except (yaml.YAMLError, ValueError, RecursionError, IsADirectoryError) as error:
        raise DataError(f"{path} cannot be read as coefficients: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not isinstance(document.get("fits"), list):
        raise DataError(f"{path} has no list `fits`; `nmm-train fit RECORDS -o FILE` writes one")
    for key in ("notes", "warnings"):
        if not isinstance(document.get(key, []), list):
            raise DataError(f"{path}: {key} must be a list of sentences, not {document[key]!r}")
    return document


def families(document: dict[str, Any], source: str) -> tuple[dict[str, Coefficients], dict[str, str]]:
    """The mean-loss law of each family, and why other families have none that can be planned with.

    Raises DataError where no family has one, naming what is missing or impossible in each.
    """
    found, left_out = {}, {}
    for position, fit in enumerate(document["fits"]):
        if not isinstance(fit, dict) or "family" not in fit:
            raise DataError(f"{source}: fits[{position}] has no family")
        if fit.get("target", MEAN) != MEAN:
            continue
        family = str(fit["family"])
        try:
            found[family] = _coefficients(fit)
        except DataError as error:
            left_out[family] = f"{source}: {family}: {error}"
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError):
            left_out[family] = (
                f"{source}: {family}: cost, all_params, resampled, range or warnings are not as `nmm-train fit -o` "
                "writes them; leave them out or write the file again"
            )
    if not found:
        raise DataError("; ".join(left_out.values()) or f"{source} holds no fit of a mean loss")
    return found, left_out


def _coefficients(fit: dict[str, Any]) -> Coefficients:
    """Raises DataError for a value that is out of its range, and what Python raises for one of another type."""
    warnings = fit.get("warnings", [])
    if not isinstance(warnings, list):
        raise DataError(f"warnings must be a list of sentences, not {warnings!r}")
    if fit.get("E", 0) is None:
        raise DataError("; ".join(map(str, warnings)) or "no law was fitted to it")
    law = Law(**{name: _positive(fit.get(name), name) for name in ("E", "A", "alpha", "B", "beta")})
    cost = Cost(**{name: _positive(value, f"cost.{name}") for name, value in fit.get("cost", {}).items()})
    resampled, reach, sizes = fit.get("resampled"), fit.get("range", {}).get("flops"), fit.get("all_params")
    columns = {k: np.array(resampled[k], float) for k in _RESAMPLED} if resampled else None
    if columns and any(column.shape != (columns["log_E"].size,) for column in columns.values()):
        lengths = ", ".join(f"{column.size} of {name}" for name, column in columns.items())
        raise DataError(f"resampled must be lists of one length, not {lengths}")
    sizes_S2 = np.array(sizes, float).reshape(-1, 2) if sizes else None
    if sizes_S2 is not None and not (np.isfinite(sizes_S2) & (sizes_S2 > 0)).all():
        raise DataError(f"all_params must be pairs of positive numbers, active and all, not {sizes!r}")
    return Coefficients(
        family=str(fit["family"]),
        law=law,
        cost=cost,
        resampled=columns,
        warnings=[str(warning) for warning in warnings],
        flops_range=(float(reach[0]), float(reach[1])) if reach else None,
        sizes_S2=None if sizes_S2 is None else sizes_S2[np.argsort(sizes_S2[:, 0])],
    )


def _positive(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise DataError(f"{name} must be a positive number, not {value!r}")
    return float(value)


def make_plan(
    document: dict[str, Any],
    source: str,
    *,
    flops: float,
    family: str,
    device: Hardware,
    devices: int,
    utilisation: float,
) -> dict[str, Any]:
    """The plan for one budget, and the other families of the document at the same one. A family that cannot be planned
    for is left out and noted; asked for, it raises DataError."""
    if not (math.isfinite(flops) and flops > 0):
        raise ConfigError(f"--flops must be a positive number, not {flops!r}")
    known, left_out = families(document, source)
    if family in left_out:
        raise DataError(left_out[family])
    if family not in known:
        raise ConfigError(f"{source}: {unknown_name('family', family, known)}")
    rows = [
        budget(known[name], flops, device, devices, utilisation) for name in sorted(known, key=lambda n: n != family)
    ]
    return {
        "flops": flops,
        "source": source,
        "hardware": {**device.__dict__, "devices": devices, "utilisation": utilisation},
        "plan": rows[0],
        "others": rows[1:],
        "multipliers": {
            other: _multiplier(known[family], known[other], flops) for other in known if other != family
        },
        "notes": [
            *document.get("notes", []),
            *document.get("warnings", []),
            *(f"left out: {reason}" for reason in left_out.values()),
        ],
        "definitions": DEFINITIONS,
    }  # fmt: skip


def budget(known: Coefficients, flops: float, device: Hardware, devices: int, utilisation: float) -> dict[str, Any]:
    """Optimal size, tokens, loss and cost of one family."""
    n, d = (float(v) for v in known.law.optimum(flops, known.cost))
    total = known.all_params(n)
    warnings = list(known.warnings)
    if known.flops_range is not None and not known.flops_range[0] <= flops <= known.flops_range[1]:
        low, high = known.flops_range
        times = flops / high if flops > high else low / flops
        warnings.append(f"{flops:.3g} FLOPs lie {times:.3g} times outside the runs' range, {low:.3g} to {high:.3g}")
    fits = TRAINING_BYTES * total / devices < device.memory
    if not fits:
        least = math.ceil(TRAINING_BYTES * total / device.memory)
        warnings.append(f"weights and optimiser do not fit on {devices} x {device.title}; {least} are the least")
    intervals = _intervals(known, flops)
    if intervals is None:
        warnings.append("no intervals: the source tells no joint uncertainty of its coefficients")
    return {
        "family": known.family,
        "n_params": n,
        "n_params_total": total,
        "tokens": d,
        "tokens_per_param": d / n,
        "loss": float(known.law.loss(n, d)),
        "intervals": intervals,
        "hours": flops / (devices * device.peak * utilisation) / 3600,
        "training_bytes": TRAINING_BYTES * total,
        "training_bytes_per_device": TRAINING_BYTES * total / devices,
        "weights_bytes": _WEIGHT_BYTES * total,
        "fits_in_memory": fits,
        "warnings": warnings,
    }


def _intervals(known: Coefficients, flops: float) -> dict[str, list[float]] | None:
    drawn = known.resampled
    if drawn is None:
        return None
    usable = (drawn["alpha"] > 0) & (drawn["beta"] > 0)
    if usable.sum() < FEWEST_RESAMPLES:
        return None
    log_A, alpha, log_B, beta, log_E = (drawn[k][usable] for k in _RESAMPLED)
    log_n = log_optimal_size(log_A, alpha, log_B, beta, np.log(flops), known.cost)
    log_d = np.log(flops / (6 * known.cost.factor)) - known.cost.exponent * log_n
    loss = np.exp(log_E) + np.exp(log_A - alpha * log_n) + np.exp(log_B - beta * log_d)
    columns = {"n_params": np.exp(log_n), "tokens": np.exp(log_d), "loss": loss}
    return {name: list(resampled_interval(column)) for name, column in columns.items()}


def _multiplier(known: Coefficients, other: Coefficients, flops: float) -> float | None:
    """Compute that `other` needs for the loss that `known` reaches, over `flops`."""
    needed = other.law.compute_for(float(known.law.best_loss(flops, known.cost)), other.cost)
    return needed / flops if math.isfinite(needed) and needed < 1e60 else None


def paper_moe_params(active: float, experts: int = EXPERTS) -> float:
    """All parameters of the paper's MoE of so many active ones: N = 24 (4 d^2 + 3 d h) + 2 V d with h = 8 d / 3."""
    square, linear = _LAYERS * 12.0, 2.0 * _VOCABULARY
    width = (-linear + math.sqrt(linear**2 + 4 * square * active)) / (2 * square)
    return _LAYERS * (4 + 8 * experts) * width**2 + linear * width
