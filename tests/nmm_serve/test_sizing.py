import pytest
import torch
from parity_checkpoint import FAMILIES, TORCH_ONLY

from nmm_serve.config import HEAD_DIMS, NMMConfig, default_head_dim
from nmm_serve.errors import ConfigError
from nmm_serve.matching import FAMILIES as FAMILY_NAMES
from nmm_serve.matching import MATCH_BY, partner
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.presets import COMPACT, PAPER, preset
from nmm_serve.sizing import count_params, forward_flops, paper_flops

# Table 6 of arXiv 2504.07951, as printed. It prints 468M where its own rule and the rest of the paper say 464M.
PRINTED = {
    "early-275m": "275M", "early-464m": "464M", "early-932m": "932M", "early-1.63b": "1.63B", "early-2.28b": "2.28B",
    "early-3.35b": "3.35B", "early-8.13b": "8.13B", "late-1b": "1B", "late-1.75b": "1.75B", "late-2.43b": "2.43B",
    "late-3.7b": "3.7B",
}  # fmt: skip
OFF_BY_ONE = {"late-289m": 289e6, "late-494m": 494e6}
"""The rule that gives every other size gives 289.8M and 493.4M here; no count gives both as printed."""


def config_of(name, **fields):
    shape = preset(name)
    vision = shape.vision_hidden_size and {"hidden_size": shape.vision_hidden_size, "num_hidden_layers": 24}
    return NMMConfig(
        hidden_size=shape.hidden_size, num_hidden_layers=shape.num_hidden_layers, vision_config=vision,
        intermediate_size=shape.intermediate_size, **fields,
    )  # fmt: skip


def printed(count, like):
    digits = len(like.split(".")[1][:-1]) if "." in like else 0
    unit = 1e6 if like.endswith("M") else 1e9
    return f"{count / unit:.{digits}f}{like[-1]}"


@pytest.mark.parametrize("name", PRINTED)
def test_paper_sizes_to_the_printed_digit(name):
    assert printed(count_params(config_of(name)).paper, PRINTED[name]) == PRINTED[name]


@pytest.mark.parametrize("name", OFF_BY_ONE)
def test_paper_sizes_that_its_rule_misses_by_less_than_one_million(name):
    assert abs(count_params(config_of(name)).paper - OFF_BY_ONE[name]) < 1e6


def test_moe_active_size_is_the_dense_size():
    for name in ("early-275m", "early-3.35b"):
        dense, moe = config_of(name), config_of(name, num_experts=8)
        assert count_params(moe).paper == count_params(dense).paper
    assert round(count_params(config_of("early-275m", num_experts=8)).total / 1e9, 1) == 1.2


@pytest.mark.parametrize("family", [*FAMILIES, *TORCH_ONLY])
def test_closed_form_counts_the_real_modules(family):
    config = NMMConfig(
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=3,
        patch_size=8,
        image_size=64,
        **(FAMILIES | TORCH_ONLY)[family],
    )
    with torch.device("meta"):
        model = NMMForConditionalGeneration(config)
    assert model.num_parameters() == count_params(config).total


@pytest.mark.parametrize("name", [*PAPER, *COMPACT])
def test_heads_have_a_size_that_every_engine_supports(name):
    config = config_of(name)
    assert config.head_dim in HEAD_DIMS
    assert config.num_attention_heads * config.head_dim == config.hidden_size
    if config.vision_config is not None:
        assert config.vision_config.head_dim in HEAD_DIMS


def test_unsupported_widths_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        default_head_dim(100)
    with pytest.raises(Exception, match="head_dim 48"):
        NMMConfig(hidden_size=96, head_dim=48)


@pytest.mark.parametrize("name", ["tiny", "small", "large"])
@pytest.mark.parametrize("by", MATCH_BY)
def test_partners_match(name, by):
    shape = preset(name)
    early = NMMConfig(
        vocab_size=1024, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers, patch_size=8, image_size=64,
    )  # fmt: skip
    late = partner(early, "late", by)
    if by == "total":
        assert count_params(late).total / count_params(early).total == pytest.approx(1, abs=0.01)
    elif by == "flops":
        cost = [forward_flops(c, [64], [128]) for c in (late, early)]
        assert cost[0] / cost[1] == pytest.approx(1, abs=0.01)
    else:
        assert (late.hidden_size, late.intermediate_size) == (early.hidden_size, early.intermediate_size)
    assert late.vision_config.num_hidden_layers == early.num_hidden_layers
    assert late.vision_config.hidden_size / late.hidden_size == pytest.approx(0.5, abs=0.08)
    moe = partner(early, "moe", by)
    assert count_params(moe).active / count_params(early).active == pytest.approx(1, abs=0.005)
    both = partner(early, "late-moe", by)
    assert (both.family, both.vision_config.hidden_size) == ("late-moe", late.vision_config.hidden_size)


@pytest.mark.parametrize(("patch_size", "image_size"), [(8, 64), (14, 112), (24, 72)])
def test_smallest_preset_matches_too(patch_size, image_size):
    shape = preset("nano")
    early = NMMConfig(
        vocab_size=448, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers, patch_size=patch_size, image_size=image_size,
    )  # fmt: skip
    # one step of 32 in a SwiGLU width is 1 to 4 % of so small a model
    assert count_params(partner(early, "late")).total / count_params(early).total == pytest.approx(1, abs=0.015)


def test_partner_refuses_what_it_cannot_match():
    early = NMMConfig(vocab_size=512, hidden_size=128, num_hidden_layers=2)
    with pytest.raises(ConfigError, match="Did you mean 'late'"):
        partner(early, "lte")
    with pytest.raises(ConfigError, match="dense early"):
        partner(partner(early, "moe"), "late")
    assert set(FAMILY_NAMES) == {"early", "late", "moe", "late-moe"}


def test_paper_flops_is_6nd():
    config = config_of("early-275m")
    assert paper_flops(config, 256, 768) == 6 * count_params(config).paper * 1024
    late = config_of("late-289m")
    counts = count_params(late)
    assert paper_flops(late, 256, 768) == 6 * (counts.vision * 256 + (counts.paper - counts.vision) * 1024)
