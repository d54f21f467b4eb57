"""Differences in loss between runs of one size, budget and seed:
python docs/scaling/pairs.py RECORDS FAMILY OTHER-RECORDS OTHER-FAMILY

A size is known by its first word, so that `nano-modality` meets `nano`. Columns are steps; a number for each seed.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean


def read(path: str, family: str) -> list[dict]:
    return [run for run in map(json.loads, Path(path).read_text().splitlines()) if run["family"] == family]


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
    if len(sys.argv) != 5:
        sys.exit("usage: pairs.py RECORDS FAMILY OTHER-RECORDS OTHER-FAMILY")
    main(*sys.argv[1:])
