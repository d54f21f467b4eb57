"""What a tokenizer is trained on."""

import json
import logging

import pytest

from nmm_serve.errors import DataError
from nmm_serve.train.build import build_processor
from nmm_serve.train.config import TokenizerConfig, TrainConfig
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
