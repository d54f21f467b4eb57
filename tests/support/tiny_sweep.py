"""A sweep of one tiny size and two budgets: a few seconds on one core."""

import copy
from pathlib import Path
from typing import Any

import yaml

from nmm_serve.train.sweep.plan import load_plan
from nmm_serve.train.sweep.pools import train_job
from nmm_serve.train.sweep.run import Sweep

PLAN: dict[str, Any] = {
    "families": ["early"],
    "sizes": ["atto"],
    "tokens": [3200, 6400],
    "cooldown": 0.4,
    "base": {
        "context_length": 320, "rows": 2, "log_every": 1, "save_every": 2,
        "model": {"patch_size": 24, "image_size": 72, "match": "decoder"},
        "tokenizer": {"vocab_size": 320, "documents": 30},
        "schedule": {"warmup_steps": 2},
        "data": {
            "sources": [
                {"name": "caption", "kind": "builtin", "which": "caption", "size": 8},
                {"name": "text", "kind": "builtin", "which": "text", "size": 50},
            ],
            "validation": [{"name": "text", "kind": "builtin", "which": "text", "split": "val"}],
            "validation_documents": 4,
        },
    },
}  # fmt: skip


class InlinePool:
    """Trains each job in this process, at once. `broken`: how often each named job fails first."""

    def __init__(self, broken: dict[str, int] | None = None) -> None:
        self.broken, self.ended, self.order = dict(broken or {}), [], []

    @property
    def free(self) -> int:
        return 1 - len(self.ended)

    def submit(self, name, values, out):
        self.order.append(name)
        if self.broken.get(name, 0) > 0:
            self.broken[name] -= 1
            self.ended.append((name, "no space left on device"))
        else:
            self.ended.append((name, train_job(values, str(out))))

    def results(self, seconds):
        ended, self.ended = self.ended, []
        return ended

    def close(self):
        pass


def write_plan(path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(copy.deepcopy(PLAN) | changes))
    return str(path)


def sweep_once(plan: str, out: str) -> None:
    import torch

    torch.set_num_threads(1)
    Sweep(load_plan(plan), Path(out)).train(InlinePool())
