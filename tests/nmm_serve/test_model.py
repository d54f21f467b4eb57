import copy

import pytest
import torch
from parity_checkpoint import FAMILIES, TORCH_ONLY, make_parity_checkpoint, noise_image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import StaticCache

from nmm_serve.checkpoint import load_model, load_processor
from nmm_serve.config import NMMConfig
from nmm_serve.errors import ConfigError, PromptError
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.models.nmm import CACHE


@pytest.fixture(scope="module", params=[*FAMILIES, *TORCH_ONLY])
def loaded(request, tmp_path_factory):
    path = make_parity_checkpoint(tmp_path_factory.mktemp(request.param) / "ckpt", request.param)
    return load_model(path), load_processor(path)


def prompts(processor):
    user = [{"type": "text", "text": "what "}, {"type": "image"}, {"type": "text", "text": "is"}, {"type": "image"}]
    return [
        processor.encode_chat([{"role": "user", "content": user}], [noise_image(0, 64, 64), noise_image(1, 30, 80)]),
        processor.encode_chat([{"role": "user", "content": "the circle"}]),
        processor.encode_chat([{"role": "user", "content": user[1:3]}], [noise_image(2, 100, 40)]),
    ]


def test_padding_and_company_change_nothing(loaded):
    model, processor = loaded
    batch = processor.collate(prompts(processor))
    together = model(**batch).logits
    for row, prompt in enumerate(prompts(processor)):
        alone = model(**processor.collate([prompt])).logits[0]
        torch.testing.assert_close(together[row, -len(prompt.input_ids) :], alone, rtol=1e-4, atol=1e-4)


def test_packed_documents_do_not_see_each_other(loaded):
    model, processor = loaded
    documents = prompts(processor)
    ids = torch.tensor([[i for d in documents for i in d.input_ids]])
    number = torch.tensor([[n for n, d in enumerate(documents, 1) for _ in d.input_ids]])
    position = torch.tensor([[i for d in documents for i in range(len(d.input_ids))]])
    with_images = [d for d in documents if d.pixel_values is not None]
    inputs = {
        "input_ids": ids, "document_ids": number, "position_ids": position,
        "pixel_values": torch.cat([d.pixel_values for d in with_images]),
        "image_grid": torch.cat([d.image_grid for d in with_images]),
    }  # fmt: skip
    packed = model(**inputs).logits[0]
    masked = model(**inputs, attention_mask=torch.ones_like(ids)).logits[0]
    assert (packed - masked).abs().max() < 2e-6 * packed.abs().max(), "one mask for the row, as on a GPU"
    alone = torch.cat([model(**processor.collate([d])).logits[0] for d in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_generate_with_and_without_cache(loaded):
    model, processor = loaded
    batch = processor.collate(prompts(processor))
    cached, uncached = (model.generate(**batch, max_new_tokens=8, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, uncached)
    static = model.generate(**batch, max_new_tokens=8, do_sample=False, cache_implementation="static")
    assert torch.equal(cached, static), "a static cache has room behind the last token, which nobody may see"


def test_room_in_a_static_cache_is_not_seen(loaded):
    model, processor = loaded
    batch = processor.collate(prompts(processor)[:1])
    del batch["attention_mask"]
    cache = StaticCache(config=model.config, max_cache_len=300)
    first = model(**batch, past_key_values=cache)
    then = model(input_ids=first.logits[:, -1:].argmax(-1), past_key_values=cache)
    torch.testing.assert_close(first.logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    ids = torch.cat((batch["input_ids"], first.logits[:, -1:].argmax(-1)), dim=1)
    whole = model(**batch | {"input_ids": ids}).logits[:, -1:]
    torch.testing.assert_close(then.logits, whole, rtol=1e-4, atol=1e-4)


def test_an_assistant_sees_the_images(loaded):
    model, processor = loaded
    batch = processor.collate(prompts(processor)[:1])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assistant = copy.deepcopy(model)
    assert torch.equal(
        model.generate(**batch, **options, assistant_model=assistant), model.generate(**batch, **options)
    )


def test_the_cache_comes_back_as_the_config_says(loaded):
    """Who goes on without one would go on without what came before."""
    model, processor = loaded
    batch = processor.collate(prompts(processor)[:1])
    assert model(**batch).past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    assert model(**batch, use_cache=False).past_key_values is None
    assert model(**batch, labels=batch["input_ids"]).past_key_values is None, "nobody goes on from a loss"


def test_what_the_model_cannot_give_is_refused(loaded):
    model, processor = loaded
    batch = processor.collate(prompts(processor)[1:2])
    for name in ("output_hidden_states", "output_attentions", "pixel_value"):
        with pytest.raises(ConfigError, match=f"takes no {name}; leave it out"):
            model(**batch, **{name: True})
    logits = model(**batch, output_hidden_states=False, inputs_embeds=None, return_dict=True).logits  # as PEFT calls it
    assert torch.equal(model(**batch, return_dict=False)[0], logits)
    named = model(**batch, labels=batch["input_ids"])
    loss, *rest = model(**batch, labels=batch["input_ids"], return_dict=False)
    assert loss == named.loss == named[0]
    assert torch.equal(rest[named.aux_loss is not None], named.logits), "by position too, where transformers has them"


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_under_either_name_is_gone_on_from(loaded, name):
    """transformers has renamed it, and both releases are installed somewhere."""
    model, processor = loaded
    ids = torch.tensor([processor.encode_text("a red circle and a blue square")])
    begun = model(ids[:, :4], use_cache=True)[CACHE]
    rest = model(ids[:, 4:], **{name: begun}).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)


def test_copies_of_a_row_see_its_images(loaded):
    """The rows have two, no and one image, of several sizes."""
    model, processor = loaded
    batch, by_hand = (
        processor.collate([prompt for prompt in prompts(processor) for _ in range(copies)]) for copies in (1, 2)
    )
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    ways = [(batch, {"num_return_sequences": 2}), (by_hand, {})]
    answers = []
    for inputs, more in ways:
        torch.manual_seed(0)
        answers.append(model.generate(**inputs, do_sample=True, **options, **more))
    assert torch.equal(*answers)

    beams = model.generate(
        **batch, do_sample=False, num_beams=2, num_return_sequences=2, length_penalty=0.0, output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    length = batch["input_ids"].shape[1]
    more = {"attention_mask": torch.cat((by_hand["attention_mask"], torch.ones(6, 5).long()), dim=1)}
    logprobs = model(**by_hand | more | {"input_ids": beams.sequences}).logits.log_softmax(-1)[:, length - 1 : -1]
    told = logprobs.gather(2, beams.sequences[:, length:, None])[..., 0].sum(-1)
    torch.testing.assert_close(beams.sequences_scores, told, rtol=1e-3, atol=1e-3)


def test_copies_of_raw_pixels(tmp_path):
    path = make_parity_checkpoint(tmp_path / "ckpt", "early")
    model, processor = load_model(path), load_processor(path)
    processor.image_processor.raw_pixels = True
    batch, by_hand = (processor.collate(prompts(processor)[2:] * copies) for copies in (1, 2))
    assert batch["pixel_values"].dtype == torch.uint8
    torch.manual_seed(0)
    copies = model.generate(**batch, do_sample=True, num_return_sequences=2, max_new_tokens=5)
    torch.manual_seed(0)
    assert torch.equal(copies, model.generate(**by_hand, do_sample=True, max_new_tokens=5))


def test_an_image_after_what_the_cache_holds_is_refused(loaded):
    model, processor = loaded
    first, _, second = prompts(processor)
    begun = model.generate(**processor.collate([first]), max_new_tokens=2, return_dict_in_generate=True)
    ids = torch.cat((begun.sequences, torch.tensor([second.input_ids])), dim=1)
    with pytest.raises(PromptError, match=f"images after the first .* without {CACHE}"):
        model.generate(
            ids, **{CACHE: begun[CACHE]}, max_new_tokens=2,
            pixel_values=second.pixel_values, image_grid=second.image_grid,
        )  # fmt: skip


def test_patches_see_the_whole_image_and_text_only_the_past(loaded):
    model, processor = loaded
    prompt = prompts(processor)[2]
    batch = processor.collate([prompt])
    before = model(**batch).logits[0]
    changed = batch | {"pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][-1] += 1.0  # the last patch
    after = model(**changed).logits[0]
    image = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    assert torch.equal(before[: image[0]], after[: image[0]]), "text before an image must not see it"
    assert not torch.allclose(before[image[0]], after[image[0]]), "the first patch must see the last"


def test_training_loss_is_the_loss_of_the_text_positions(loaded):
    model, processor = loaded
    batch = processor.collate(prompts(processor), padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    whole = model(**batch, labels=labels)
    logits = model.lm_head(model.model(**batch)[0])  # the returned ones rule the image token out
    shifted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(whole.ce_loss, shifted, rtol=1e-5, atol=1e-5)
    model.train()
    training = model(**batch, labels=labels)
    model.eval()
    assert training.logits is None
    torch.testing.assert_close(training.ce_loss, whole.ce_loss)
    if model.config.num_experts and model.config.router == "learned":
        expected = training.ce_loss + model.config.router_aux_loss_coef * training.aux_loss
        torch.testing.assert_close(training.loss, expected)
        assert 0.9 < training.aux_loss.item() <= model.config.num_experts
    else:
        assert training.aux_loss is None
        torch.testing.assert_close(training.loss, training.ce_loss)


def test_every_parameter_learns(loaded):
    model, processor = loaded
    batch = processor.collate(prompts(processor))
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    silent = [
        name for name, p in model.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]  # fmt: skip
    model.zero_grad()
    # with few tokens some expert may get none, but a whole stack of experts never stays silent
    assert not silent


def test_slots_and_patches_must_agree(loaded):
    model, processor = loaded
    batch = processor.collate([prompts(processor)[2]])
    batch["input_ids"] = batch["input_ids"][:, 5:]
    with pytest.raises(PromptError, match=r"image tokens but its images give \d+ patches"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], image_grid=batch["image_grid"])


def test_auto_classes_find_it(tmp_path):
    path = make_parity_checkpoint(tmp_path / "ckpt", "late-moe")
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(path)) is NMMForConditionalGeneration
    assert AutoProcessor.from_pretrained(path).image_token == "<|image|>"


def test_families_differ_by_config_alone():
    shape = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 1}
    assert {NMMConfig(**shape, **fields).family for fields in FAMILIES.values()} == {"early", "late", "moe", "late-moe"}


def test_names_in_a_checkpoint_are_fixed():
    """Renaming one breaks every checkpoint that users have."""
    config = NMMConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=1, num_experts=2,
        vision_config={"hidden_size": 32, "num_hidden_layers": 1},
    )  # fmt: skip
    block = ["self_attn.qkv_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "input_layernorm",
             "post_attention_layernorm"]  # fmt: skip
    expected = {f"model.layers.0.{n}.weight" for n in [*block, "mlp.gate"]}
    expected |= {f"model.layers.0.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")}
    expected |= {f"model.vision.layers.0.{n}.weight" for n in [*block, "mlp.gate_up_proj", "mlp.down_proj"]}
    expected |= {f"model.patch_embed.{n}.weight" for n in ("proj", "row_embed", "col_embed")}
    expected |= {f"model.{n}.weight" for n in ("embed_tokens", "norm", "vision.norm", "connector")} | {"lm_head.weight"}
    with torch.device("meta"):
        assert set(NMMForConditionalGeneration(config).state_dict()) == expected
