import pytest
import torch
from parity_checkpoint import FAMILIES

from nmm_serve.config import NMMConfig
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.train.config import OptimizerConfig, ScheduleConfig
from nmm_serve.train.optim import build_optimizer, lr_factor, set_lr


def test_schedule_warms_up_stays_and_cools_down_to_zero():
    schedule = ScheduleConfig(warmup_steps=10, cooldown=0.2)
    factors = [lr_factor(step, 100, schedule) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:80] == [1.0] * 71
    assert factors[80:] == sorted(factors[80:], reverse=True)
    assert 0 < factors[99] < 0.05
    assert factors[89] == pytest.approx(1 - (10 / 21) ** 0.5)


def test_decay_is_decoupled_from_the_peak_rate():
    """p <- p * (1 - weight_decay * lr / peak): with zero gradients the peak rate must not matter."""
    config = NMMConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    for peak in (1e-3, 1e-1):
        model = NMMForConditionalGeneration(config)
        optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5), peak)
        before = model.lm_head.weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        set_lr(optimizer, 0.4)
        optimizer.step()
        torch.testing.assert_close(model.lm_head.weight.detach(), before * (1 - 0.5 * 0.4))
        assert torch.equal(model.model.norm.weight, torch.ones(32)), "norms are not decayed"


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_hold_every_parameter_once_and_slow_only_the_encoder(family):
    config = NMMConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, **FAMILIES[family])
    model = NMMForConditionalGeneration(config)
    optimizer = build_optimizer(model, OptimizerConfig(vision_lr_scale=0.01), 1.0)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: g["peak_lr"] for g in optimizer.param_groups for p in g["params"]}
    assert set(rates) == set(names.values())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)
    slow = {n for n, rate in rates.items() if rate == 0.01}
    late = config.vision_config is not None
    expected = {n for n in rates if late and (".vision." in n or ".patch_embed." in n)}
    assert slow == expected
