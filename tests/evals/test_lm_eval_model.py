"""The lm-eval model: its likelihoods are the torch engine's, cut and counted as lm-eval states."""

import math
import random

import pytest
import torch
from PIL import Image

pytest.importorskip("lm_eval", reason="needs the extra `evals`")

import lm_eval
from lm_eval.api.registry import get_model
from parity_checkpoint import noise_image
from text_fakes import KnownEngine, coin, instance, likelihood, uniform
from tiny_checkpoint import make_checkpoint

from nmm_serve.engines.torch import TorchEngine
from nmm_serve.errors import ConfigError, EngineError, NMMError, PromptError
from nmm_serve.evals.lm_eval_model import NMM, Failure
from nmm_serve.evals.lm_eval_prompts import ChatContext, context_parts

PAIRS = [
    ("what is the colour of the circle ?", " red"),
    ("the circle is", " a large square and a small circle"),
    ("the circle is ", "red"),  # the space goes to the continuation
    ("what is the col", "our of"),  # a token of the whole reaches over the boundary
    ("", "what is the colour"),
    ("   ", "red"),
    ("describe\n\n", "the image ."),
    ("typed <|image|> and <|assistant|>", " stay <|eos|> text"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("lm") / "tiny", max_position_embeddings=256))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return TorchEngine(checkpoint)


@pytest.fixture(scope="module")
def model(engine):
    return NMM(engine)


@torch.inference_mode()
def directly(engine, ids, scored, images=()):
    """Log-probabilities of the last `scored` of `ids`, alone in the network: no engine, no batch, no adapter."""
    encoded = engine.processor.encode_prompt(ids, images)
    batch = engine.processor.collate([encoded])
    logprobs_TV = engine.network(**batch).logits[0].float().log_softmax(-1)
    target_T = batch["input_ids"][0, -scored:]
    chosen_T = logprobs_TV[-scored - 1 : -1].gather(1, target_T[:, None])
    return chosen_T.sum().item(), bool((logprobs_TV[-scored - 1 : -1].argmax(-1) == target_T).all())


def cut(engine, context, continuation):
    """lm-eval's rule, on strings: (what the model reads, tokens of the continuation).

    Where a token reaches over the boundary, the model reads the context's own tokens and then the rest of the whole's.
    """
    encode = engine.processor.encode_text
    before, whole = encode(context.rstrip()), encode(context + continuation)
    rest = whole[len(before) :]
    return [engine.processor.tokenizer.bos_token_id, *before, *rest], len(rest)


def test_likelihoods_are_those_of_the_network(engine, model):
    found = model.loglikelihood([likelihood(*pair) for pair in PAIRS])
    for pair, (logprob, is_greedy) in zip(PAIRS, found, strict=True):
        expected, expected_greedy = directly(engine, *cut(engine, *pair))
        assert logprob == pytest.approx(expected, abs=1e-5), pair
        assert is_greedy == expected_greedy


def test_the_boundary_is_lm_evals_own(engine, model):
    """`TemplateLM._encode_pair`, given the tokenizer that keeps text as text."""
    bos = engine.processor.tokenizer.bos_token_id
    model_like = type("Reference", (NMM,), {"tok_encode": lambda self, s: [bos, *engine.processor.encode_text(s)]})
    reference = model_like(engine)
    asked = [pair for pair in PAIRS if pair[0]]
    for pair, found in zip(asked, model.prompts.pairs([(*pair, 0) for pair in asked]), strict=True):
        assert found == reference._encode_pair(*pair), pair
    context, target = engine.processor.encode_text("what is the col"), engine.processor.encode_text("our of")
    whole = engine.processor.encode_text("what is the colour of")
    assert context + target != whole, "the case of a token over the boundary is not tested"


def test_a_greedy_continuation_is_told(engine, model):
    encode, bos = engine.processor.encode_text, engine.processor.tokenizer.bos_token_id
    told = 0
    for context in ("the circle", "describe", "red", "a large", "what is the", "green blue", "image of", "colour"):
        likeliest = int(engine.network(torch.tensor([[bos, *encode(context)]])).logits[0, -1].argmax())
        word = engine.processor.decode([likeliest])
        if encode(context + word) == [*encode(context), likeliest]:  # else the text has other tokens
            told += 1
            (_, is_greedy), (_, other) = model.loglikelihood([likelihood(context, word), likelihood(context, "~")])
            assert is_greedy
            assert not other
    assert told


def test_batch_size_and_order_change_nothing(checkpoint, model):
    rng = random.Random(0)
    words = ["red", "circle", "large", "the", "of"]
    pairs = [(" ".join(rng.choices(words, k=rng.randint(1, 40))), f" {rng.choice(words)}") for _ in range(24)]
    requests = [likelihood(*pair, doc_id=i) for i, pair in enumerate(pairs)]
    expected = model.loglikelihood(requests)
    for batch_size in (1, 5, 24):
        other = NMM(TorchEngine(checkpoint, batch_size=batch_size))
        order = rng.sample(range(24), 24)
        found = other.loglikelihood([requests[i] for i in order])
        for i, (logprob, is_greedy) in zip(order, found, strict=True):
            assert logprob == pytest.approx(expected[i][0], abs=1e-5)
            assert is_greedy == expected[i][1]


def test_images_are_seen(engine, model):
    bos, mark = engine.processor.tokenizer.bos_token_id, engine.processor.image_token_id
    images = [noise_image(1, 64, 64), noise_image(2, 40, 70)]
    encode = engine.processor.encode_text
    cases = [
        (likelihood("<image>what is", " red", images[0]), [bos, mark, *encode("what is red")], images[:1]),
        (likelihood("what is", " red", images[0]), [bos, mark, *encode("what is red")], images[:1]),
        (
            likelihood("<image>a<image> b", " red", *images),
            [bos, mark, *encode("a"), mark, *encode(" b red")],
            images,
        ),
    ]
    for (_, ids, shown), (found, _) in zip(cases, model.loglikelihood([c[0] for c in cases]), strict=True):
        assert found == pytest.approx(directly(engine, ids, len(encode(" red")), shown)[0], abs=1e-5)
    other = model.loglikelihood([likelihood("<image>what is", " red", images[1])])
    assert abs(other[0][0] - model.loglikelihood([cases[0][0]])[0][0]) > 1e-3


def test_long_texts_lose_their_beginning(engine):
    """lm-eval: the model reads the last `max_length` tokens before the last one. `max_length` is 254 of 256."""
    model = NMM(engine)
    assert model.max_length == 254
    long = "circle red " * 100
    fits = engine.processor.tokenizer.decode(engine.processor.encode_text(long)[:80])
    requests = [likelihood(long, " blue circle", doc_id=7), likelihood(fits, " blue circle", doc_id=8)]
    (found, _), _ = model.loglikelihood(requests)
    ids, scored = cut(engine, long, " blue circle")
    assert len(ids) > 300
    assert found == pytest.approx(directly(engine, ids[-255:], scored)[0], abs=1e-5)
    assert model.truncated == {"toy": {7}}


def test_a_continuation_beyond_the_model_fails(engine):
    failures: list[Failure] = []
    model = NMM(engine, failures=failures)
    found = model.loglikelihood([likelihood("a", "circle red " * 100, doc_id=3), likelihood("a", " red")])
    assert math.isnan(found[0][0])
    assert math.isfinite(found[1][0])
    assert [(f.task, f.doc_id) for f in failures] == [("toy", 3)]
    assert "over the 254 that the model can score" in failures[0].error


@pytest.mark.parametrize("documents", [("red circle " * 5,), ("red circle " * 200, "a", "blue " * 127)])
def test_rolling_scores_every_token_once(engine, model, documents):
    found = model.loglikelihood_rolling([instance("loglikelihood_rolling", d) for d in documents])
    bos = engine.processor.tokenizer.bos_token_id
    for text, total in zip(documents, found, strict=True):
        ids = engine.processor.encode_text(text)
        expected, done = 0.0, 0
        while done < len(ids):  # lm-eval's windows: as much context as fits, one token at least
            scored = min(254, len(ids) - done)
            window = [bos, *ids][max(0, done + scored - 254) : done + scored + 1]
            expected += directly(engine, window, scored)[0]
            done += scored
        assert total == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_a_uniform_engine_has_the_perplexity_of_its_vocabulary():
    engine = KnownEngine(uniform)
    text = "red circle " * 300
    (total,) = NMM(engine).loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    ids = engine.processor.encode_text(text)
    assert total == pytest.approx(-len(ids) * math.log(len(engine.processor.tokenizer)))
    assert sum(len(r.continuation) for r in engine.asked) == len(ids)
    assert max(len(r.context) + len(r.continuation) for r in engine.asked) <= engine.context_length - 1


def test_a_chat_is_encoded_as_in_training(engine, model):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "<image>what is <|assistant|> ?"},
    ]
    context = model.apply_chat_template(messages)
    assert context == "<|bos|><|system|>be brief<|user|><image>what is <|assistant|> ?<|assistant|>"
    image = noise_image(3, 64, 64)
    content = [{"type": "image"}, {"type": "text", "text": "what is <|assistant|> ?"}]
    expected = engine.processor.encode_chat([messages[0], {"role": "user", "content": content}], [image])
    (ids,) = model.prompts.contexts([(context, 1)])
    assert engine.processor.encode_prompt(ids, [image]).input_ids == expected.input_ids
    (found, _) = model.loglikelihood([likelihood(context, "red", image)])[0]
    assert found == pytest.approx(
        directly(engine, [*ids, *engine.processor.encode_text("red")], 2, [image])[0], abs=1e-5
    )


def test_a_begun_answer_goes_on(engine, model):
    messages = [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "the circle is "}]
    context = model.apply_chat_template(messages, add_generation_prompt=False)
    assert context == "<|bos|><|user|>what is<|assistant|>the circle is "
    ((before, scored),) = model.prompts.pairs([(context, "red", 0)])
    special = engine.processor.tokenizer.convert_tokens_to_ids
    text = engine.processor.encode_text
    start = [special("<|bos|>"), special("<|user|>"), *text("what is"), special("<|assistant|>")]
    assert before == start + text("the circle is")
    assert before + scored == start + text("the circle is red")


def test_image_marks_count_only_with_images():
    assert context_parts("see <image> here", 0) == ["<|bos|>", "see <image> here"]
    with pytest.raises(PromptError, match="2 <image> marks but the item has 1 images"):
        context_parts("<image> and <image>", 1)
    chat = ChatContext([{"role": "user", "content": "no mark"}], open_end=False)
    assert len(context_parts(chat, 2)) == 6  # bos, user, two images, text, assistant


def test_generation_stops_and_is_cut(engine, model):
    request = instance("generate_until", "the circle", {"max_gen_toks": 24, "until": []})
    (free,) = model.generate_until([request])
    stop = free[4:7]
    (stopped,) = model.generate_until([instance("generate_until", "the circle", {"max_gen_toks": 24, "until": [stop]})])
    assert stopped == free[: free.index(stop)]
    long = NMM(engine)
    (found,) = long.generate_until([instance("generate_until", "red " * 200, {"max_gen_toks": 8}, doc_id=4)])
    ids = engine.processor.encode_text("red " * 200)
    assert long.truncated == {"toy": {4}}
    from nmm_serve.engines.base import Request, SamplingParams

    bos = engine.processor.tokenizer.bos_token_id
    direct = Request(prompt=[bos, *ids][-248:], sampling=SamplingParams(max_tokens=8))
    assert found == engine.generate([direct])[0].text


def test_sampling_is_seeded(engine):
    kwargs = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12, "top_p": 0.9}
    requests = [instance("generate_until", "the circle", kwargs) for _ in range(2)]
    first, again, other = (NMM(engine, seed=seed).generate_until(requests) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0] != first[1], "repeats must differ"


def test_an_option_that_no_engine_has_is_refused(model):
    with pytest.raises(ConfigError, match="repetition_penalty=1.3"):
        model.generate_until([instance("generate_until", "a", {"repetition_penalty": 1.3})])
    model.generate_until([instance("generate_until", "a", {"num_beams": 1, "top_k": 5, "max_gen_toks": 1})])


def test_one_bad_item_does_not_take_others_along(engine):
    failures: list[Failure] = []
    model = NMM(engine, failures=failures)
    image = Image.new("RGB", (300, 1))  # too long a strip
    good = [likelihood("what is", f" {word}", doc_id=i) for i, word in enumerate(("red", "green", "blue"))]
    bad = likelihood("<image>what is", " red", image, doc_id=9)
    found = model.loglikelihood([good[0], bad, *good[1:]])
    assert [round(x, 4) for x, _ in found[:1] + found[2:]] == [round(x, 4) for x, _ in NMM(engine).loglikelihood(good)]
    assert [(f.doc_id, "16:1" in f.error) for f in failures] == [(9, True)]
    with pytest.raises(NMMError, match="16:1"):
        NMM(engine).loglikelihood([bad])


def test_an_empty_continuation_fails(engine):
    failures: list[Failure] = []
    NMM(engine, failures=failures).loglikelihood([likelihood("what is", "")])
    assert "no token of its own" in failures[0].error


def test_lm_evals_own_models_stay_known():
    assert get_model("dummy").__name__ == "DummyLM"
    assert get_model("nmm") is NMM


def test_by_name_as_lm_eval_opens_it(checkpoint, model):
    opened = get_model("nmm").create_from_arg_string(
        f"model={checkpoint},engine=torch", {"batch_size": 3, "max_batch_size": None, "device": "cpu"}
    )
    assert opened.engine.batch_size == 3
    assert opened.loglikelihood([likelihood(*PAIRS[0])])[0][0] == pytest.approx(
        model.loglikelihood([likelihood(*PAIRS[0])])[0][0], abs=1e-5
    )
    assert len(opened.get_model_info()["model_sha"]) == 64


def test_lm_evals_cache_finds_images_again(tmp_path):
    """With other arguments than the request's, lm-eval's cache would never hit."""
    engine = KnownEngine(coin, says=lambda _: "red")
    cached = lm_eval.api.model.CachingLM(NMM(engine), str(tmp_path / "cache.db"))
    image = noise_image(1, 16, 16)
    requests = [
        instance("generate_until", "<image>what", {"until": [], "max_gen_toks": 2}, {"visual": [image]}),
    ]
    assert cached.generate_until(requests) == ["red"]
    stored = len(cached.dbdict)
    assert stored == 1, "one key from the model, another from lm-eval"
    assert cached.generate_until(requests) == ["red"]
    assert len(engine.asked) == 1
    cached.dbdict.close()


class Bare:
    """A server that tells neither its tokens nor its context."""

    name, model = "openai", "http://127.0.0.1:1"

    def loglikelihood(self, requests, progress=None):
        from nmm_serve.engines.base import Score

        assert all(isinstance(r.context, str) for r in requests)
        return [Score(logprob=-1.0, is_greedy=True, num_tokens=1) for _ in requests]


def test_without_tokens_text_goes_as_it_is():
    model = NMM(Bare())
    assert model.loglikelihood([likelihood("a ", "b")]) == [(-1.0, True)]
    with pytest.raises(EngineError, match="whole documents"):
        model.loglikelihood_rolling([instance("loglikelihood_rolling", "a")])
