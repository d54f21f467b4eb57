"""Partners for a fair comparison: the late or MoE model that matches an early one by a stated yardstick."""

import copy
from typing import Any

from nmm_serve.config import NMMConfig, default_head_dim
from nmm_serve.errors import ConfigError, unknown_name
from nmm_serve.sizing import count_params, forward_flops

FAMILIES = ("early", "late", "moe", "late-moe")
MATCH_BY = ("total", "flops", "decoder")
DEFAULT_EXPERTS = 8


def partner(
    early: NMMConfig, family: str, by: str = "total", *, image_tokens: int | None = None, text_tokens: int = 64
) -> NMMConfig:
    """The `family` model that matches the dense early model.

    - MoE takes the early model's shape, 8 experts, top-1: equal active parameters but for the router.
    - Late fusion gets a ViT of the same depth and half the width (arXiv 2504.07951, section 2.1). `by="total"`: a
      narrower decoder, so that ViT and decoder together have the early model's parameters; `"flops"`: so that a
      sample of one image and `text_tokens` costs the same forward FLOPs; `"decoder"`: the early model's decoder, the
      ViT on top.

    Widths are multiples of 32, where every engine has kernels; the SwiGLU width takes up the rest in steps of 32, so
    that compact models match within about one percent too. Raises ConfigError when no width comes within 5%.
    """
    if family not in FAMILIES:
        raise ConfigError(unknown_name("family", family, FAMILIES))
    if by not in MATCH_BY:
        raise ConfigError(unknown_name("way to match", by, MATCH_BY))
    if early.family != "early":
        raise ConfigError(f"partners are built for a dense early model, not for a {early.family} one")
    experts = DEFAULT_EXPERTS if family.endswith("moe") else 0
    if not family.startswith("late"):
        return _with(early, num_experts=experts)
    late = _late(early, early.hidden_size, early.intermediate_size)
    if by == "decoder":
        return _with(late, num_experts=experts)

    image_tokens = early.max_image_tokens if image_tokens is None else image_tokens

    def cost(config: NMMConfig) -> int:
        return (
            count_params(config).total
            if by == "total"
            else forward_flops(config, [image_tokens], [image_tokens + text_tokens])
        )

    goal = cost(early)
    ratio = early.intermediate_size / early.hidden_size

    def misfit(config: NMMConfig) -> float:
        # a mismatch in cost counts most; among equals, the early model's own proportions
        proportion = abs(config.intermediate_size / config.hidden_size / ratio - 1)
        return abs(cost(config) / goal - 1) + 0.01 * proportion

    widths = range(64, early.hidden_size + 1, 32)
    candidates = [
        _late(early, width, size)
        for width in widths
        for size in range(max(32, _to_32(0.6 * ratio * width)), _to_32(1.5 * ratio * width) + 1, 32)
    ]
    best = min(candidates, key=misfit)
    # steps of 32 are coarse in small models: near the best, let the encoder's SwiGLU width vary by itself
    around = [
        _late(early, width, size, vision_size)
        for width in range(max(64, best.hidden_size - 32), min(early.hidden_size, best.hidden_size + 32) + 1, 32)
        for size in range(max(32, best.intermediate_size - 64), best.intermediate_size + 65, 32)
        for vision_size in range(_to_32(0.3 * ratio * width), _to_32(0.8 * ratio * width) + 1, 32)
    ]
    best = min([best, *around], key=misfit)
    off = cost(best) / goal - 1
    if abs(off) > 0.05:
        raise ConfigError(
            f"no late-fusion width matches {by} of the early model within 5%: the nearest is {off:+.1%} off"
        )
    return _with(best, num_experts=experts)


def _to_32(size: float) -> int:
    return max(32, round(size / 32) * 32)


def _late(early: NMMConfig, width: int, intermediate: int, vision_intermediate: int = 0) -> NMMConfig:
    vision_width = _to_32(width / 2)
    return _with(
        early,
        hidden_size=width,
        intermediate_size=intermediate,
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": vision_intermediate or _to_32(vision_width * intermediate / width),
            "num_hidden_layers": early.num_hidden_layers,
            "rms_norm_eps": early.rms_norm_eps,
        },
    )


def _with(config: NMMConfig, **changes: Any) -> NMMConfig:
    values = copy.deepcopy({k: v for k, v in config.to_dict().items() if k in _FIELDS}) | changes
    if "hidden_size" in changes:
        head_dim = default_head_dim(changes["hidden_size"])
        heads = changes["hidden_size"] // head_dim
        values |= {"head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": heads}
    return NMMConfig(**values)


_FIELDS = set(NMMConfig.__dataclass_fields__)
