"""Differences in loss between runs of one size, budget and seed; or, with records alone, how far seeds lie apart:
python docs/scaling/pairs.py RECORDS [FAMILY OTHER-RECORDS OTHER-FAMILY]

A size is known by its first word, so that `nano-modality` meets `nano`. Columns are steps; a number for each seed.
"""

import json
import sys
from collections import defaultdict
from math import sqrt
from pathlib import Path
from statistics import fmean, variance


def read(path: str, family: str | None = None) -> list[dict]:
    runs = map(json.loads, Path(path).read_text().splitlines())
    return [run for run in runs if family in (None, run["family"])]


def seeds(path: str) -> None:
    losses: dict[tuple, list[float]] = defaultdict(list)
    for run in read(path):
        losses[run["family"], run["size"], run["steps"]].append(run["loss"])
    pairs = [pair for pair in losses.values() if len(pair) == 2]
    if not pairs:
        sys.exit(f"{path} has no two seeds of one family, size and budget")
    print(f"{len(pairs)} pairs of seeds; standard deviation of one run {sqrt(fmean(map(variance, pairs))):.4f}")


def key(run: dict) -> tuple[str, int, int]:
    return run["size"].partition("-")[0], run["steps"], run["seed"]


def main(path: str, family: str, other_path: str, other_family: str) -> None:
    others = {key(run): run["loss"] for run in read(other_path, other_family)}
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in read(path, family):
        if key(run) in others:
            found[run["size"].removesuffix("-long")][run["steps"]].append(run["loss"] - others[key(run)])
    for size, by_steps in found.items():
        cells = [f"{steps}: {', '.join(f'{d:+.3f}' for d in pairs)}" for steps, pairs in sorted(by_steps.items())]
        print(size, "|", " | ".join(cells), "| mean", f"{fmean(d for pairs in by_steps.values() for d in pairs):+.3f}")
    every = [d for by_steps in found.values() for pairs in by_steps.values() for d in pairs]
    print(len(every), "pairs", *([f"mean {fmean(every):+.3f}"] if every else []))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        seeds(sys.argv[1])
    elif len(sys.argv) == 5:
        main(*sys.argv[1:])
    else:
        sys.exit("usage: pairs.py RECORDS [FAMILY OTHER-RECORDS OTHER-FAMILY]")
