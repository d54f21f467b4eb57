"""Named sizes: the paper's table 6, and compact ones that train on a laptop."""

from dataclasses import dataclass

from nmm_serve.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Preset:
    """Widths and depth. `vision_hidden_size` is the encoder's width when the preset is a late-fusion one."""

    hidden_size: int
    num_hidden_layers: int
    vision_hidden_size: int | None = None
    intermediate_size: int = 0
    """0: the paper's rule, from the width."""
    peak_lr: float = 1e-3


PAPER = {
    "early-275m": Preset(800, 24, peak_lr=1.5e-3),
    "early-464m": Preset(1088, 24, peak_lr=1.5e-3),
    "early-932m": Preset(1632, 24, peak_lr=5e-4),
    "early-1.63b": Preset(2208, 24, peak_lr=4.2e-4),
    "early-2.28b": Preset(2624, 24, peak_lr=4e-4),
    "early-3.35b": Preset(3232, 24, peak_lr=3.5e-4),
    "early-8.13b": Preset(5120, 24, peak_lr=2.4e-4),
    "late-289m": Preset(768, 24, 384, peak_lr=1.5e-3),
    "late-494m": Preset(1024, 24, 512, peak_lr=1.5e-3),
    "late-1b": Preset(1536, 24, 768, peak_lr=5e-4),
    "late-1.75b": Preset(2048, 24, 1024, peak_lr=4.2e-4),
    "late-2.43b": Preset(2464, 24, 1184, peak_lr=3.8e-4),
    "late-3.7b": Preset(3072, 24, 1536, peak_lr=3.3e-4),
}
"""Table 6 (8.13b: held out, from arXiv 2507.09404). MoE models take the early sizes: those are their active ones."""

COMPACT = {
    "atto": Preset(32, 2, intermediate_size=96, peak_lr=4e-3),
    "femto": Preset(64, 2, intermediate_size=192, peak_lr=4e-3),
    "pico": Preset(96, 3, intermediate_size=256, peak_lr=3e-3),
    "nano": Preset(128, 4, intermediate_size=352, peak_lr=2e-3),
    "tiny": Preset(192, 6, intermediate_size=512, peak_lr=2e-3),
    "mini": Preset(256, 8, intermediate_size=704, peak_lr=1.5e-3),
    "small": Preset(384, 12, intermediate_size=1024, peak_lr=1e-3),
    "base": Preset(512, 16, intermediate_size=1376, peak_lr=1e-3),
    "large": Preset(768, 16, intermediate_size=2048, peak_lr=8e-4),
}
"""About 0.03M to 110M parameters besides the embeddings. SwiGLU width near 8/3 of the model's, in steps of 32."""

PRESETS = {**PAPER, **COMPACT}


def preset(name: str) -> Preset:
    """Raises ConfigError for a name that does not exist."""
    if name not in PRESETS:
        raise ConfigError(unknown_name("model preset", name, PRESETS))
    return PRESETS[name]
