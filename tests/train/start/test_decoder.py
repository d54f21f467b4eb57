import json

import pytest
import torch
from tiny_hf import LLAMA, QWEN3, write_encoder, write_language_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nmm_serve.errors import ConfigError
from nmm_serve.train.config import config_from
from nmm_serve.train.start.build import build_started
from nmm_serve.train.start.decoder import read_decoder_config

MISTRAL, MIXTRAL = (MistralConfig, MistralForCausalLM), (MixtralConfig, MixtralForCausalLM)
QWEN3_MOE = (Qwen3MoeConfig, Qwen3MoeForCausalLM)


def started(path, encoder=None, **model):
    values = {
        "start": {"decoder": str(path), "encoder": encoder and str(encoder)},
        "optimizer": {"lr": 1e-3}, "context_length": 128, "model": model,
        "data": {"sources": [{"kind": "builtin", "which": "text"}]},
    }  # fmt: skip
    model, processor = build_started(config_from(values), pytest.fail)
    return model.eval(), processor


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        (LLAMA, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
        (MISTRAL, {"sliding_window": None}),
        (QWEN3, {"head_dim": 64}),  # heads are wider together than the model
    ],
)
def test_logits_are_those_of_the_original(tmp_path, kind, fields):
    path = write_language_model(tmp_path / "lm", kind, **fields)
    original = AutoModelForCausalLM.from_pretrained(path).eval()
    model, processor = started(path)
    ids = torch.randint(0, 290, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = original(ids).logits, model(ids).logits
    torch.testing.assert_close(actual[..., :290], expected[..., :290], rtol=1e-5, atol=1e-5)
    assert model.config.vocab_size == 320
    assert processor.image_token_id == model.config.image_token_id >= 290


@pytest.mark.parametrize(
    ("kind", "fields", "family"),
    [
        (MIXTRAL, {"num_local_experts": 4}, "moe"),  # the best two
        (QWEN3_MOE, {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True}, "late-moe"),
        (QWEN3_MOE, {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False, "head_dim": 64}, "moe"),
    ],
)
def test_logits_of_mixtures_are_those_of_the_original(tmp_path, kind, fields, family):
    if kind is QWEN3_MOE:
        fields = {"head_dim": 32, "moe_intermediate_size": 48} | fields
    path = write_language_model(tmp_path / "lm", kind, **fields)
    original = AutoModelForCausalLM.from_pretrained(path).eval()
    model, _ = started(path, family=family)
    assert model.config.family == family
    ids = torch.randint(0, 290, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = original(ids, output_router_logits=True), model(ids, output_router_logits=True)
    torch.testing.assert_close(actual.logits[..., :290], expected.logits[..., :290], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(actual.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "experts", [{"num_experts": 3, "num_experts_per_tok": 2}, {"num_experts": 2, "router": "modality"}]
)
def test_a_dense_model_whose_layers_are_copied_into_experts_says_the_same(tmp_path, experts):
    path = write_language_model(tmp_path / "lm")
    original = AutoModelForCausalLM.from_pretrained(path).eval()
    model, _ = started(path, family="moe", **experts)
    ids = torch.randint(0, 290, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :290], original(ids).logits[..., :290], rtol=1e-5, atol=1e-5)


def test_a_mixture_takes_an_encoder_too(tmp_path):
    mixture = write_language_model(tmp_path / "mixture", MIXTRAL, num_local_experts=4)
    model, _ = started(mixture, write_encoder(tmp_path / "clip", "clip"), family="late-moe", image_size=32)
    assert (model.config.family, model.config.num_experts) == ("late-moe", 4)
    assert model.config.encoder.pretrained["model_type"] == "clip_vision_model"


def test_experts_and_family_must_fit(tmp_path):
    dense = write_language_model(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"dense and would be copied.*num_experts_per_tok 1.*set it to 2 or more"):
        started(dense, family="moe")
    mixture = write_language_model(tmp_path / "mixture", MIXTRAL, num_local_experts=4)
    with pytest.raises(ConfigError, match=r"mixture of 4 experts.*'early'; set model.family to moe or late-moe"):
        started(mixture)
    with pytest.raises(ConfigError, match="brings a learned router"):
        started(mixture, family="moe", router="modality", num_experts=2)


@pytest.mark.parametrize("specials", [("<s>", "</s>"), ("<|endoftext|>",)])
def test_the_tokenizer_comes_along(tmp_path, specials):
    path = write_language_model(tmp_path / "lm", specials=specials, vocab_size=290)
    theirs, original = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    model, processor = started(path)
    text = "the red circle </s> <s> <|endoftext|> <|image|>"
    assert processor.decode(processor.encode_text(text)) == text, "what a user types is never a special token"
    plain = "a small circle, 12 blue"
    assert processor.encode_text(plain) == theirs.encode(plain, add_special_tokens=False)
    # the end token has a new name and its old id, so the model goes on knowing it
    assert model.config.eos_token_id == processor.tokenizer.eos_token_id == theirs.eos_token_id
    assert model.config.vocab_size == 320
    table, old = model.model.embed_tokens.weight, original.model.embed_tokens.weight
    torch.testing.assert_close(table[processor.image_token_id], old.mean(0))
    bos = processor.tokenizer.bos_token_id
    assert torch.equal(table[bos], old[theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2', whose blocks are not ours"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_a_nearly_matching_model_is_refused_by_the_field(tmp_path, changes, message):
    fields = LlamaConfig(hidden_size=64, num_attention_heads=2).to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="start.decoder: .*" + message):
        read_decoder_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen2MoeConfig(), "shared_expert_intermediate_size 5632"),
        (Qwen3MoeConfig(mlp_only_layers=[0]), r"mlp_only_layers \[0\]"),
        (Qwen3MoeConfig(decoder_sparse_step=2), "decoder_sparse_step 2"),
        (MixtralConfig(router_jitter_noise=0.1), "router_jitter_noise 0.1"),
        (MixtralConfig(sliding_window=4096), "sliding_window 4096"),
        (DeepseekV3Config(), "n_shared_experts 1"),
        (OlmoeConfig(), "model_type 'olmoe', whose blocks are not ours"),
    ],
)
def test_a_nearly_matching_mixture_is_refused_by_the_field(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="start.decoder: .*" + message):
        read_decoder_config(tmp_path)


def test_heads_that_no_engine_knows_and_long_contexts_are_refused(tmp_path):
    path = write_language_model(tmp_path / "lm", hidden_size=96)
    with pytest.raises(ConfigError, match="head_dim 48 is not supported"):
        started(path)
    path = write_language_model(tmp_path / "short", max_position_embeddings=64)
    with pytest.raises(ConfigError, match="context_length 128 is over max_position_embeddings 64"):
        started(path)


def test_missing_directories_and_weights_are_named(tmp_path):
    with pytest.raises(ConfigError, match="directory nowhere does not exist"):
        started("nowhere")
    path = write_language_model(tmp_path / "lm")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="the weights in .* cannot be loaded"):
        started(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        started(path)


def test_weights_of_another_shape_are_refused(tmp_path):
    path = write_language_model(tmp_path / "lm")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="do not fit config.json: missing keys: model.layers.2"):
        started(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_from": "ckpt"}, "init_from brings a whole model"),
        ({"tokenizer": {"path": "tok"}}, "remove tokenizer.path"),
        ({"optimizer": {}}, "set optimizer.lr"),
        ({"optimizer": {"lr": 1e-3, "decoder_lr_scale": -1}}, "decoder_lr_scale must be 0"),
    ],
)
def test_contradictions_in_the_configuration(values, message):
    data = {"sources": [{"kind": "builtin", "which": "text"}]}
    base = {"start": {"decoder": "lm"}, "optimizer": {"lr": 1e-3}, "data": data}
    with pytest.raises(ConfigError, match=message):
        config_from(base | values)
