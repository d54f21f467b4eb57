"""docs/CONFIGURATION.md names what there is."""

import re
from pathlib import Path

import pytest

from nmm_serve.presets import PRESETS
from nmm_serve.train.config import LoraConfig, TrainConfig, load_config
from nmm_serve.train.data.sources import KINDS

PAGE = (Path(__file__).parents[1] / "docs/CONFIGURATION.md").read_text()
ROWS = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]


def keys(section: object, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in vars(section).items():
        if name == "lora":
            value = LoraConfig()
        found |= keys(value, f"{prefix}{name}.") if hasattr(value, "__dataclass_fields__") else {prefix + name: value}
    return found


def test_every_key_is_there_with_its_default():
    told = {key: row[1].strip() for row in ROWS for key in re.findall(r"`([^`]+)`", row[0])}
    defaults = keys(TrainConfig())
    assert not defaults.keys() - told.keys()
    for key, default in defaults.items():
        if default is None or default in ([], ()) or key.startswith("lora."):
            assert told[key] == "", key
        else:
            shown = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            assert told[key] == (shown.lower() if isinstance(default, bool) else shown), key


def test_every_preset_and_kind_of_data_is_there():
    assert not [name for name in (*PRESETS, *KINDS) if f"`{name}`" not in PAGE]


@pytest.mark.parametrize("number", [0, 1])
def test_its_examples_are_valid(number, tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[number])
    assert load_config(str(path)).name.startswith("mine")
