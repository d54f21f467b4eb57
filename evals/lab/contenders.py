"""The models of a comparison: what they are, how large, and whether the same requests mean the same to all of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from nmm_serve.checkpoint import checkpoint_hash, load_config
from nmm_serve.config import NMMConfig
from nmm_serve.errors import DataError
from nmm_serve.sizing import count_params, forward_flops

TEXT_TOKENS = 64
"""Of the sample whose FLOPs are counted, beside one full-size image; and of a training sample."""


@dataclass(frozen=True)
class Contender:
    """One model of a comparison. `match`: by what it equals the early model, None for that model itself."""

    name: str
    match: str | None
    path: Path
    random_weights: bool


@dataclass(frozen=True)
class Group:
    """Models that are compared with their first."""

    label: str
    contenders: tuple[Contender, ...]

    @property
    def baseline(self) -> str:
        return self.contenders[0].name

    @property
    def image_size(self) -> int:
        return load_config(self.contenders[0].path).image_size


def contenders(paths: Sequence[Path]) -> tuple[Contender, ...]:
    """Checkpoints as contenders, each by the last folder in its path that tells it from all others: `early` and `late`
    for runs/early/final and runs/late/final; where no single one does (a/x, a/y, b/x), by as many as it takes. Raises
    DataError where a checkpoint is given twice."""
    parts = [path.resolve().parts[:0:-1] for path in paths]
    for path, found in zip(paths, parts, strict=True):
        if parts.count(found) > 1:
            raise DataError(f"{path} is given twice; give each checkpoint once")
    one = ([folders[i] for folders in parts] for i in range(min(map(len, parts))))
    several = (["/".join(folders[i::-1]) for folders in parts] for i in range(max(map(len, parts))))
    names = next(names for names in chain(one, several) if len(set(names)) == len(parts))
    return tuple(Contender(name, None, path, False) for name, path in zip(names, paths, strict=True))


def check_equal(contenders: Sequence[Contender]) -> None:
    """Raise DataError for models that differ in tokenizer or image tokens: their requests would not be the same."""
    first = contenders[0]
    for other in contenders[1:]:
        for what, read in (("tokenizer", _tokenizer), ("image size and patch size", _image_tokens)):
            if read(first.path) != read(other.path):
                raise DataError(
                    f"{first.path} and {other.path} differ in {what}; a comparison of latency needs the same requests"
                )


def _tokenizer(path: Path) -> str:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{path} lacks tokenizer.json; expected a checkpoint")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _image_tokens(path: Path) -> tuple[int, int]:
    config = load_config(path)
    return config.image_size, config.patch_size


def describe(group: Group) -> list[dict[str, Any]]:
    """What each model is, and how its size relates to the first by every yardstick."""
    rows = []
    configs = [load_config(contender.path) for contender in group.contenders]
    for contender, config in zip(group.contenders, configs, strict=True):
        sizes, first = yardsticks(config), yardsticks(configs[0])
        rows.append(
            {
                "name": contender.name,
                "family": config.family,
                "match": contender.match,
                "random_weights": contender.random_weights,
                "hash": checkpoint_hash(contender.path),
                "sizes": sizes,
                "relative": {name: sizes[name] / first[name] for name in ("total", "flops", "decoder")},
                "shape": {
                    name: getattr(config, name)
                    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_experts")
                }
                | {
                    "vision": config.encoder
                    and {
                        "hidden_size": config.encoder.hidden_size,
                        "num_hidden_layers": config.encoder.num_hidden_layers,
                        "intermediate_size": config.encoder.intermediate_size,
                    }
                },
            }
        )
    return rows


def yardsticks(config: NMMConfig) -> dict[str, int]:
    """Parameters by place, and FLOPs of one forward pass."""
    counts, patches = count_params(config), config.max_image_tokens
    return {
        "total": counts.total,
        "active": counts.active,
        "decoder": counts.decoder,
        "vision": counts.vision,
        "flops": forward_flops(config, [patches], [patches + TEXT_TOKENS]),
    }
