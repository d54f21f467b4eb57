"""A run of eight steps on built-in data: a second or two on one core."""

from pathlib import Path

import yaml

TINY = {
    "steps": 8, "context_length": 320, "rows": 1, "accumulate": 2, "log_every": 1, "eval_every": 4, "save_every": 3,
    "model": {"preset": "nano"},
    "tokenizer": {"vocab_size": 320, "documents": 30},
    "schedule": {"warmup_steps": 2},
    "data": {
        "sources": [
            {"name": "vqa", "kind": "builtin", "which": "vqa", "weight": 2, "size": 6},
            {"name": "text", "kind": "builtin", "which": "text"},
        ],
        "validation": [{"name": "caption", "kind": "builtin", "which": "caption", "split": "val"}],
        "validation_documents": 4,
    },
}  # fmt: skip


def write_recipe(path: Path) -> str:
    path.write_text(yaml.safe_dump(TINY))
    return str(path)
