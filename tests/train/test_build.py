"""What a tokenizer is trained on, and what is said of keys that a model to go on from leaves without effect."""

import json
import logging

import pytest
from tiny_checkpoint import make_checkpoint

from nmm_serve.errors import ConfigError, DataError
from nmm_serve.train.build import build, build_processor
from nmm_serve.train.config import TokenizerConfig, TrainConfig, config_from
from nmm_serve.train.data.mixture import parse_mixture


def processor_of(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = TrainConfig(tokenizer=TokenizerConfig(vocab_size=270, documents=4))
    return build_processor(config, parse_mixture({"sources": [{"name": "web", "kind": "text", "path": str(path)}]}))


def test_a_tokenizer_is_trained_without_the_bad_documents(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        processor = processor_of(tmp_path / "a.jsonl", ["a cat", "", "half \ud83d", "a cat"])
    assert "2 of the first 4 documents of source 'web' are bad" in caplog.text
    expected = processor_of(tmp_path / "b.jsonl", ["a cat", "a cat"])
    assert processor.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


def test_a_source_without_one_good_document_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none of the first 4 documents of source 'web' .*a\.jsonl:4: no text"):
        processor_of(tmp_path / "a.jsonl", [""] * 5)


def test_what_a_model_to_go_on_from_is_not_is_told(tmp_path, caplog):
    start = make_checkpoint(tmp_path / "start", image_size=48, num_hidden_layers=4)
    sources = {"sources": [{"kind": "builtin", "which": "text"}]}
    said = {}
    for model in ({}, {"preset": "nano", "image_size": 48}, {"preset": "mini", "image_size": 96, "family": "moe"}):
        config = config_from({"init_from": str(start), "model": model, "data": sources, "context_length": 64})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build(config, parse_mixture(sources))
        said[len(model)] = caplog.text
    assert said[0] == said[2] == ""
    assert "no effect: model.preset 'mini', model.family 'moe', model.image_size 96. " in said[3]


def test_a_second_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"init_from brings its own tokenizer; remove tokenizer\.path"):
        config_from({"init_from": "a", "tokenizer": {"path": "b"}, "data": {"sources": [{"kind": "builtin"}]}})
