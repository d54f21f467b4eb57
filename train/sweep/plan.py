"""A sweep's plan: what it trains, and the runs that follow from it.

One size is trained once, at a constant rate, for all its budgets: the trunk. Each budget branches off it where its
cool-down starts (Hägele et al., arXiv 2405.18392), and is the same run, bit for bit on a CPU, as one trained alone.
"""

import copy
import difflib
import itertools
import math
import typing
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nmm_serve.errors import ConfigError, unknown_name
from nmm_serve.matching import FAMILIES
from nmm_serve.presets import preset
from nmm_serve.train.config import TrainConfig, config_from, read_config_text

Values = dict[str, Any]


@dataclass(kw_only=True)
class Plan:
    name: str
    families: dict[str, Values]
    """Family -> keys of the training configuration that differ for it."""
    sizes: dict[str, Values]
    """Label -> keys; a label that is a preset needs none. `only` limits a size to some families, and `tokens` gives it
    budgets of its own, as isoFLOP curves need."""
    tokens: list[float]
    """Budgets, in tokens (positions of packed rows)."""
    mixtures: dict[str, dict[str, float]]
    """Name -> weight of each source of `base.data.sources`. Empty: the weights that stand there."""
    seeds: list[int] = field(default_factory=lambda: [0])
    cooldown: float = 0.2
    """Share of a budget spent cooling down."""
    workers: int = 1
    """Runs side by side, on one GPU or on the cores."""
    threads: int = 1
    """CPU threads of each."""
    retries: int = 2
    utilisation: float = 0.25
    """Share of the measured matrix-product rate that the time estimate assumes."""
    base: Values = field(default_factory=dict)
    """What all runs share: keys of the training configuration."""


@dataclass(frozen=True)
class Run:
    """A trunk, or a branch of one. `at` is the step it branches off."""

    name: str
    family: str
    size: str
    mixture: str
    seed: int
    config: TrainConfig
    trunk: str | None = None
    at: int = 0

    @property
    def own_steps(self) -> int:
        return self.config.steps - self.at


def plan_names() -> list[str]:
    folder = resources.files("nmm_serve.train.sweep")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_plan(source: str) -> Plan:
    """A shipped plan's name or a YAML file. Raises ConfigError naming the key, the value and what was expected."""
    if source in plan_names():
        text = (resources.files("nmm_serve.train.sweep") / f"{source}.yaml").read_text()
    elif source.endswith((".yaml", ".yml")):
        if not Path(source).is_file():
            raise ConfigError(f"plan {source} does not exist")
        text = read_config_text(Path(source))
    else:
        raise ConfigError(unknown_name("plan", source, plan_names()) + "; or give a .yaml file")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must be a mapping of keys to values, not {values!r}")
    known = [f.name for f in fields(Plan)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(f"unknown key {key!r} in {source}." + (f" Did you mean {close[0]}?" if close else ""))
    values.setdefault("name", Path(source).stem)
    for key in ("families", "sizes", "tokens"):
        if not values.get(key):
            raise ConfigError(f"{source} lacks {key}; a plan needs families, sizes and tokens")
    plan = Plan(**{**values, **_lists(values, source)})
    _check(plan, source)
    return plan


def _lists(values: Values, source: str) -> Values:
    """Names in a list are names without changes."""
    read: Values = {}
    for key in ("families", "sizes", "mixtures"):
        given = values.get(key) or {"": {}}
        if isinstance(given, list):
            given = dict.fromkeys(map(str, given))
        if not isinstance(given, dict) or not all(isinstance(v or {}, dict) for v in given.values()):
            raise ConfigError(f"{source}: {key} must be a list of names or a mapping of names to keys, not {given!r}")
        read[key] = {str(name): dict(changes or {}) for name, changes in given.items()}
    for label, changes in read["sizes"].items():
        if "tokens" in changes:
            changes["tokens"] = _budgets(changes["tokens"], f"{source}: sizes: {label}")
    read["tokens"] = _budgets(values["tokens"], source)
    return read


def _budgets(given: Any, where: str) -> list[float]:
    tokens = given if isinstance(given, list) else [given]
    try:
        budgets = sorted({float(t) for t in tokens})
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: tokens must be numbers, not {tokens!r}") from None
    if not budgets or not all(math.isfinite(t) and t > 0 for t in budgets):
        raise ConfigError(f"{where}: tokens must be positive, not {tokens}")
    return budgets


def _check(plan: Plan, source: str) -> None:
    for family in plan.families:
        if family not in FAMILIES:
            raise ConfigError(f"{source}: {unknown_name('family', family, FAMILIES)}")
    for label, changes in plan.sizes.items():
        for family in _only(changes, plan):
            if family not in FAMILIES:
                raise ConfigError(f"{source}: sizes: {label}: only: {unknown_name('family', str(family), FAMILIES)}")
    if not isinstance(plan.seeds, list) or not all(type(s) is int and s >= 0 for s in plan.seeds) or not plan.seeds:
        raise ConfigError(f"{source}: seeds must be a list of whole numbers, not {plan.seeds!r}")
    if len(set(plan.seeds)) < len(plan.seeds):
        raise ConfigError(f"{source}: seeds names a seed twice: {plan.seeds}; the two runs would be one, so remove it")
    if not isinstance(plan.cooldown, float | int) or not 0 < plan.cooldown < 1:
        raise ConfigError(f"{source}: cooldown is a share of each budget, between 0 and 1, not {plan.cooldown!r}")
    for key, least in (("workers", 1), ("threads", 1), ("retries", 0)):
        if type(getattr(plan, key)) is not int or getattr(plan, key) < least:
            raise ConfigError(f"{source}: {key} must be a whole number from {least}, not {getattr(plan, key)!r}")
    if not isinstance(plan.utilisation, float | int) or not 0 < plan.utilisation <= 1:
        raise ConfigError(f"{source}: utilisation is a share between 0 and 1, not {plan.utilisation!r}")
    if not isinstance(plan.base, dict):
        raise ConfigError(f"{source}: base must be keys of the training configuration, not {plan.base!r}")
    sections = [f.name for f in fields(TrainConfig) if is_dataclass(f.default_factory)]
    for where, keys in (
        ("base", plan.base),
        *((f"families: {name}", keys) for name, keys in plan.families.items()),
        *((f"sizes: {name}", keys) for name, keys in plan.sizes.items()),
    ):
        for key in sections:
            if not isinstance(keys.get(key, {}), dict):  # it would take the place of all keys of the section
                raise ConfigError(
                    f"{source}: {where}: {key} must be a section of keys, not {keys[key]!r}; or remove it"
                )


def _only(of_size: Values, plan: Plan) -> list[Any]:
    """The families that a size is limited to: a name or a list of names."""
    only = of_size.get("only", list(plan.families))
    return only if isinstance(only, list) else [only]


def expand(plan: Plan, tokenizer: str | None = None) -> list[Run]:
    """The runs of a plan, each trunk before its branches. `tokenizer`: a directory that all runs share."""
    runs: list[Run] = []
    for (family, of_family), (size, of_size), (mixture, weights), seed in itertools.product(
        plan.families.items(), plan.sizes.items(), plan.mixtures.items(), plan.seeds
    ):
        changes = {key: value for key, value in of_size.items() if key != "only"}
        if family not in _only(of_size, plan):
            continue
        tokens = changes.pop("tokens", plan.tokens)
        if "preset" not in changes.get("model", {}):
            preset(size)  # an unknown name ends here, before anything is trained
            changes = merged({"model": {"preset": size}}, changes)
        values = merged(plan.base, of_family, changes, {"seed": seed, "model": {"family": family}})
        if tokenizer is not None:
            values = merged(values, {"tokenizer": {"path": tokenizer}})
        if weights:
            values = merged(values, {"data": {"sources": _weighted(values, mixture, weights)}})
        # the first seed goes without saying, so that others may be added to a sweep later
        parts = (family, size, mixture, f"s{seed}" if seed != plan.seeds[0] else "")
        budgeted = replace(plan, tokens=tokens)
        runs += _trunk_and_branches(budgeted, "-".join(filter(None, parts)), family, size, mixture, seed, values)
    if not runs:
        raise ConfigError("the plan leaves no run: `only` of the sizes excludes every family")
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise ConfigError(f"two runs of the plan would be named {run.name!r}; rename a size or a mixture")
        seen.add(run.name)
    return runs


def _trunk_and_branches(
    plan: Plan, name: str, family: str, size: str, mixture: str, seed: int, values: Values
) -> list[Run]:
    for key in ("init_from", "lora", "soft_token"):
        if values.get(key) not in (None, False):
            raise ConfigError(
                f"{name}: {key} has no place in a plan: a sweep trains each size from scratch; remove it, or train one "
                "model with nmm-train run"
            )
    probe = config_from(merged(values, {"schedule": {"cooldown": 0.0}, "steps": 10**9}))
    if not probe.data.validation:
        raise ConfigError(
            f"{name}: data.validation names no source, and a sweep records validation losses; name sources under "
            "base.data.validation"
        )
    positions = probe.rows * probe.accumulate * probe.context_length
    budgets: dict[int, float] = {}
    for tokens in plan.tokens:
        steps = max(1, round(tokens / positions))
        for others, other in budgets.items():
            if steps == others or _short(tokens) == _short(other):
                raise ConfigError(
                    f"{name}: the budgets {other} and {tokens} cannot be told apart: {others} and {steps} steps of "
                    f"{positions} positions, named {_short(other)} and {_short(tokens)}; remove one of them"
                )
        budgets[steps] = tokens
    starts = {steps: steps - round(plan.cooldown * steps) for steps in budgets}
    for steps, at in starts.items():
        if at < max(1, probe.schedule.warmup_steps) or at == steps:
            raise ConfigError(
                f"{name}: {budgets[steps]:g} tokens are {steps} steps of {positions} positions; warm-up "
                f"{probe.schedule.warmup_steps} and a cool-down over {plan.cooldown:.0%} do not fit; "
                "raise the budget or shorten schedule.warmup_steps"
            )
    last = max(starts.values())
    quiet = {"eval_every": last + 1, "name": name, "steps": last, "save_at": sorted(set(starts.values()))}
    trunk = config_from(merged(values, quiet, {"schedule": {"cooldown": 0.0}}))
    runs = [Run(name, family, size, mixture, seed, trunk)]
    for steps, at in sorted(starts.items()):
        own: Values = {"name": f"{name}-{_short(budgets[steps])}", "steps": steps, "eval_every": steps, "save_at": []}
        config = config_from(merged(values, own, {"schedule": {"cooldown": float(plan.cooldown)}}))
        runs.append(Run(config.name, family, size, mixture, seed, config, trunk=name, at=at))
    return runs


def _short(tokens: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.4g}{letter}"
    return f"{tokens:.4g}"


def _weighted(values: Values, mixture: str, weights: typing.Mapping[str, float]) -> list[Values]:
    sources = values.get("data", {}).get("sources", [])
    names = [source.get("name") for source in sources]
    for name in weights:
        if name not in names:
            raise ConfigError(f"mixture {mixture!r}: {unknown_name('source', name, map(str, names))}")
    return [{**source, "weight": weights[source["name"]]} for source in sources if weights.get(source["name"])]


def merged(*layers: Values) -> Values:
    """Nested mappings laid over each other; later ones win."""
    result: Values = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            if isinstance(old, dict) and isinstance(value, dict):
                result[key] = merged(old, value)
            else:
                result[key] = copy.deepcopy(value)
    return result
