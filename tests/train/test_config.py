import dataclasses

import pytest
import yaml

from nmm_serve.errors import ConfigError
from nmm_serve.train.config import TrainConfig, load_config, recipe_names

SOURCE = {"sources": [{"kind": "builtin", "which": "text"}]}


def write(path, **values):
    path.write_text(yaml.safe_dump({"data": SOURCE, **values}))
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name):
    assert load_config(name).name == name


def test_overrides_win_over_the_file_and_numbers_may_be_written_short(tmp_path):
    path = write(tmp_path / "c.yaml", steps=50, optimizer={"lr": "1e-4"}, schedule={"warmup_steps": 5})
    config = load_config(path, ["steps=70", "model.family=late", "optimizer.betas=[0.8, 0.9]"])
    assert (config.steps, config.model.family, config.optimizer.lr) == (70, "late", 1e-4)
    assert config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", r"unknown config key stepz\. Did you mean steps\?"),
        ("model.familly=late", r"unknown config key model\.familly\. Did you mean model\.family\?"),
        ("model.family=lat", r"model\.family: unknown value 'lat'\. Did you mean 'late'\?"),
        ("steps=0", "steps must be at least 1, not 0"),
        ("steps=many", "steps must be of type int, not 'many'"),
        ("steps=true", "steps must be of type int, not True"),
        ("optimizer.lr=.nan", r"optimizer\.lr must be finite"),
        ("optimizer.betas=[1]", r"optimizer\.betas must be a list of 2 values"),
        ("model=tiny", "model must be a section"),
        ("steps.x=1", "'steps' is not a section"),
        ("data.sources=[]", r"data\.sources is empty"),
        ("schedule.warmup_steps=999", "do not fit into the run"),
        ("schedule.cooldown=2", "share of the steps"),
        ("steps", "not of the form key=value"),
        ("optimizer.lr=0", r"optimizer\.lr must be over 0, not 0; leave it out"),
        ("optimizer.lr=-1", r"optimizer\.lr must be over 0, not -1"),
        ("optimizer.grad_clip=0", r"optimizer\.grad_clip .* not 0; to switch clipping off"),
        ("optimizer.betas=[0.9, 1]", r"optimizer\.betas must be 0 or more and below 1, not \[0\.9, 1\.0\]"),
        ("optimizer.eps=0", r"optimizer\.eps must be over 0"),
        ("optimizer.weight_decay=-1", r"optimizer\.weight_decay must be 0"),
        ("schedule.warmup_steps=-5", r"schedule\.warmup_steps must be 0 or more, not -5"),
        ("max_bad_steps=0", "max_bad_steps must be at least 1, not 0"),
        ("data.validation_documents=0", r"data\.validation_documents must be at least 1, not 0"),
        ("tokenizer.documents=-1", r"tokenizer\.documents must be at least 1, not -1"),
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    path = write(tmp_path / "c.yaml", steps=50, schedule={"warmup_steps": 5})
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="unknown recipe 'dmo'. Did you mean 'demo'"):
        load_config("dmo")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(tmp_path / "bad.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="bytes.yaml is not a text file"):
        load_config(str(tmp_path / "bytes.yaml"))
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(str(tmp_path / "list.yaml"))


def test_every_field_reaches_the_saved_config():
    values = TrainConfig(data=None).to_dict()
    assert set(values) == {f.name for f in dataclasses.fields(TrainConfig)}
