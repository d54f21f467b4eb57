import json

import pytest
import torch
from parity_checkpoint import noise_image
from tiny_hf import ENCODERS, write_encoder, write_language_model

from nmm_serve.checkpoint import load_model, load_processor, save_checkpoint
from nmm_serve.engines.base import Request, SamplingParams
from nmm_serve.engines.torch import TorchEngine
from nmm_serve.errors import ConfigError, EngineError, PromptError
from nmm_serve.onnx.export import export
from nmm_serve.sizing import count_params
from nmm_serve.train.build import build
from nmm_serve.train.config import OptimizerConfig, config_from
from nmm_serve.train.data.mixture import parse_mixture
from nmm_serve.train.optim import build_optimizer
from nmm_serve.train.start.encoder import read_encoder

SOURCES = {"sources": [{"kind": "builtin", "which": "text"}]}


def started(encoder, decoder=None, **model):
    values = {
        "start": {"encoder": str(encoder), "decoder": decoder and str(decoder)}, "optimizer": {"lr": 1e-3},
        "context_length": 128, "tokenizer": {"vocab_size": 300, "documents": 20}, "data": SOURCES,
        "model": {"preset": "femto", "family": "late", "patch_size": 8, "image_size": 32} | model,
    }  # fmt: skip
    config = config_from(values)
    model, processor = build(config, parse_mixture(SOURCES))
    return model.eval(), processor


@pytest.fixture(scope="module", params=ENCODERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(kind, tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp(kind) / "whole", kind)


def original(path, kind, image):
    """Last hidden states and pooled output of transformers' own classes, pixels included."""
    _, model_class, _, images_class = ENCODERS[kind]
    images = images_class.from_pretrained(path, do_resize=False, do_center_crop=False)
    tower = model_class.from_pretrained(path).vision_model.eval()
    with torch.no_grad():
        output = tower(**images(image, return_tensors="pt"), interpolate_pos_encoding=True)
    states = output.last_hidden_state[0]
    return states[1:] if kind == "clip" else states, output.pooler_output[0]


def test_no_position_table_is_decayed(encoder):
    model, _ = started(encoder)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {
        names[id(parameter)]
        for group in build_optimizer(model, OptimizerConfig(), 1e-3).param_groups
        for parameter in group["params"]
        if not group["weight_decay"] and parameter.ndim == 2
    }
    assert kept == {"model.vision.tower.embeddings.position_embedding.weight"}


@pytest.mark.parametrize("raw", [False, True])
def test_hidden_states_are_those_of_the_original(kind, encoder, raw):
    model, processor = started(encoder)
    processor.image_processor.raw_pixels = raw
    images = [noise_image(0, 32, 32), noise_image(1, 64, 16), noise_image(2, 32, 32)]
    batch = processor.image_processor(images, return_tensors="pt")
    grid = torch.as_tensor(batch["image_grid"])
    assert batch["pixel_values"].dtype == (torch.uint8 if raw else torch.float32)
    with torch.no_grad():
        states = model.model.vision(batch["pixel_values"], grid, False)
        pooled = model.model.vision(batch["pixel_values"], grid, True)
    for image, theirs, one in zip(images, states.split(grid.prod(-1).tolist()), pooled, strict=True):
        expected, expected_pooled = original(encoder, kind, image)
        torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one, expected_pooled, rtol=1e-5, atol=1e-5)


def test_the_image_side_alone_is_the_same(kind, encoder, tmp_path):
    whole = read_encoder(encoder, 8, 32)
    alone = read_encoder(write_encoder(tmp_path / "alone", kind, whole=False), 8, 32)
    assert whole[0] == alone[0]
    assert {n: t.shape for n, t in whole[1].items()} == {n: t.shape for n, t in alone[1].items()}


@pytest.mark.parametrize("pool", [False, True])
def test_a_checkpoint_with_it_is_saved_loaded_and_generates(kind, encoder, tmp_path, pool):
    language_model = write_language_model(tmp_path / "lm")
    model, processor = started(encoder, language_model, pool_image=pool)
    assert model.num_parameters() == count_params(model.config).total
    save_checkpoint(tmp_path / "ckpt", model, processor, {})
    loaded, reader = load_model(tmp_path / "ckpt"), load_processor(tmp_path / "ckpt")
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    images = [noise_image(0, 32, 32), noise_image(1, 60, 20)]
    prompt = reader.encode_chat([{"role": "user", "content": content}], images)
    batch = reader.collate([prompt])
    is_image = batch["input_ids"] == loaded.config.image_token_id
    assert int(is_image.sum()) == (2 if pool else batch["pixel_values"].shape[0])
    with torch.no_grad():
        logits = loaded(**batch).logits
        torch.testing.assert_close(logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
        upside_down = batch | {"pixel_values": -batch["pixel_values"]}
        assert not torch.allclose(logits, loaded(**upside_down).logits, atol=1e-2), "it does not see the images"
    request = Request(
        messages=[{"role": "user", "content": content}], images=images, sampling=SamplingParams(max_tokens=4)
    )
    with TorchEngine(str(tmp_path / "ckpt")) as engine:
        assert engine.generate([request])[0].error is None
    with pytest.raises(EngineError, match="exporter has no graph for"):
        export(tmp_path / "ckpt", tmp_path / "onnx")
    with pytest.raises(PromptError, match="image tokens but"):
        loaded(input_ids=batch["input_ids"][:, 4:], pixel_values=batch["pixel_values"], image_grid=batch["image_grid"])


def test_our_own_encoder_pools_to_the_mean():
    values = {"model": {"preset": "femto", "family": "late", "pool_image": True}, "data": SOURCES,
              "tokenizer": {"vocab_size": 300, "documents": 20}}  # fmt: skip
    model, processor = build(config_from(values), parse_mixture(SOURCES))
    batch = processor.image_processor([noise_image(0, 64, 64), noise_image(1, 90, 30)], return_tensors="pt")
    pixels, grid = batch["pixel_values"], torch.as_tensor(batch["image_grid"])
    one, two = model.get_image_features(pixels, grid)
    front = model.model
    states = front.vision(front.patch_embed(pixels, grid), grid).split(grid.prod(-1).tolist())
    torch.testing.assert_close(one[0], front.connector(states[0].mean(0)))
    torch.testing.assert_close(two[0], front.connector(states[1].mean(0)))


def test_what_is_no_such_encoder_is_refused(kind, encoder, tmp_path):
    with pytest.raises(ConfigError, match="directory nowhere does not exist"):
        read_encoder("nowhere", 8, 32)
    with pytest.raises(ConfigError, match="model_type 'llama'"):
        read_encoder(write_language_model(tmp_path / "lm"), 8, 32)
    with pytest.raises(ConfigError, match=r"patch_size 8; set model.patch_size .* \(32 is what"):
        read_encoder(encoder, 16, 32)
    with pytest.raises(ConfigError, match="start.encoder is an image encoder for model.family late"):
        started(encoder, family="early")
    path = write_encoder(tmp_path / "bare", kind)
    file = path / "preprocessor_config.json"
    if kind == "clip":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_factor": 1.0}))
        with pytest.raises(ConfigError, match="rescale_factor"):
            read_encoder(path, 8, 32)
    file.unlink()
    with pytest.raises(ConfigError, match="no preprocessor_config.json"):
        read_encoder(path, 8, 32)
