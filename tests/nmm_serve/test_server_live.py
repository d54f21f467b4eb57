"""The real server, started as a user starts it, asked with the official client. One start serves all tests."""

import io
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
from live_server import KEY, LAUNCH, healthy_after, launched, picture, raw_image, text, url_image
from PIL import Image, ImageDraw
from tiny_checkpoint import make_checkpoint

pytest.importorskip("vllm")
pytest.importorskip("openai")

import openai

from nmm_serve.engines.base import Request, SamplingParams, ScoreRequest
from nmm_serve.engines.openai import OpenAIEngine
from nmm_serve.engines.torch import TorchEngine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("live") / "tiny")


@pytest.fixture(scope="module")
def live(checkpoint):
    with launched(checkpoint, checkpoint.parent / "vllm.log") as server:
        yield server


@pytest.fixture(autouse=True)
def _still_healthy(live):
    with healthy_after(live):
        yield


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return TorchEngine(str(checkpoint))


def scene(seed, size=(50, 80)):
    image = Image.new("RGB", size, (seed * 40 % 256, 90, 200))
    ImageDraw.Draw(image).ellipse((5, 5, 30 + seed, 40), fill=(250, seed * 30 % 256, 0))
    return image


def question(*images, words="what is the colour of the circle ?", **sampling):
    content = [*({"type": "image"} for _ in images), text(words)]
    sampling = SamplingParams(**{"max_tokens": 16} | sampling)
    return Request(messages=[{"role": "user", "content": content}], images=images, sampling=sampling)


def test_text_image_and_usage(live, oracle):
    answer = live.chat(text("what is"), max_tokens=5, extra_body={"ignore_eos": True})
    expected = oracle.encode(question(words="what is")).input_ids
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(expected), 5)
    assert answer.usage.total_tokens == len(expected) + 5
    answer = live.chat(picture(scene(1)), text("what is"))
    assert answer.usage.prompt_tokens == len(oracle.encode(question(scene(1), words="what is")).input_ids)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_streamed_and_whole_answers_are_equal(live):
    for content in ([text("describe the image .")], [picture(scene(2)), text("what is")]):
        whole = live.chat(*content, max_tokens=40)
        chunks = list(live.chat(*content, max_tokens=40, stream=True, stream_options={"include_usage": True}))
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert streamed == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage


def test_tokens_equal_the_torch_engines(live, oracle):
    requests = [
        question(), question(scene(1)), question(scene(2), scene(3, (90, 30))), question(words="<|image|> typed"),
        question(scene(4), ignore_eos=True, logprobs=True), question(scene(5), stop=("e",)),
    ]  # fmt: skip
    served = OpenAIEngine(live.url, api_key=KEY).generate(requests)
    for output, expected in zip(served, oracle.generate(requests), strict=True):
        assert output.error is None
        assert output.text == expected.text.rstrip("\ufffd")  # the server keeps half a character to itself
        assert output.num_prompt_tokens == expected.num_prompt_tokens
        assert output.finish_reason == expected.finish_reason
        if expected.finish_reason != "stop":
            assert output.token_ids == expected.token_ids
            assert output.num_tokens == expected.num_tokens == len(output.timing.token_s)
    assert served[4].logprobs == pytest.approx(oracle.generate(requests)[4].logprobs, abs=1e-3)


def test_likelihoods_equal_the_torch_engines(live, oracle):
    pairs = (("the colour of", " the circle is red"), ("describe", " the image"), ("", "x"))
    requests = [ScoreRequest(context=context, continuation=continuation) for context, continuation in pairs]
    served = OpenAIEngine(live.url, api_key=KEY).loglikelihood(requests)
    for score, expected in zip(served, oracle.loglikelihood(requests), strict=True):
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert (score.is_greedy, score.num_tokens) == (expected.is_greedy, expected.num_tokens)


def test_concurrent_answers_are_not_mixed_up(live):
    engine = OpenAIEngine(live.url, api_key=KEY)
    requests = [question(scene(i), words=f"what is {i}") for i in range(12)]
    together = [output.text for output in engine.generate(requests)]
    alone = [engine.generate([request])[0].text for request in requests]
    assert together == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (64, 4)])
def test_odd_sizes(live, size):
    assert live.chat(picture(Image.new("RGB", size, "red")), text("what")).choices[0].finish_reason


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (url_image("http://example.com/a.png"), "no images from other hosts"),
        (url_image("http://169.254.169.254/latest"), "no images from other hosts"),
        (url_image("http://127.0.0.1:22/"), "no images from other hosts"),
        (url_image("file:///etc/passwd"), "reads no files"),
        (url_image("data:image/png;base64,@@@"), "not valid base64"),
        (raw_image(b"no image"), "not a readable image"),
        ({"type": "video_url", "video_url": {"url": "http://example.com/v.mp4"}}, "At most 0 video"),
        ({"type": "image_embeds", "image_embeds": "aaaa"}, "enable-mm-embeds"),
    ],
)
def test_images_that_are_refused(live, image, told):
    with pytest.raises(openai.BadRequestError, match=told):
        live.chat(image, text("what is this"))


def test_a_pixel_bomb_and_a_long_strip_are_refused(live):
    strip = picture(Image.new("RGB", (2000, 1)))
    with pytest.raises(openai.BadRequestError, match="longer than 16:1"):
        live.chat(strip, text("what"))
    begin = time.monotonic()
    bomb = io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "PNG")  # 400 million pixels in 50 kB
    with pytest.raises(openai.BadRequestError, match="pixels"):
        live.chat(raw_image(bomb.getvalue()), text("what"))
    assert time.monotonic() - begin < 20


def test_more_images_than_fit_are_refused(live):
    with pytest.raises(openai.BadRequestError, match=r"At most 15 image\(s\)"):
        live.chat(*[picture(scene(1))] * 16)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        live.chat(*[picture(scene(1))] * 12)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"n": 65}, "n must be at most 64"),
        ({"n": 10**9}, "n must be at most 64"),
        ({"max_tokens": 10**6}, "max_model_len"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"logit_bias": {"999999": 1}}, "out-of-vocab"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "untrusted chat template"),
        ({"extra_body": {"mm_processor_kwargs": {"size": 9999}}}, "mm_processor_kwargs"),
        ({"extra_body": {"structured_outputs": {"regex": "(((("}}}, "regex"),
    ],
)
def test_bad_parameters_are_refused(live, options, told):
    with pytest.raises(openai.BadRequestError, match=told):
        live.chat(text("what"), **options)


def test_an_over_long_prompt_is_refused(live):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512"):
        live.chat(text("circle " * 2000))


def test_a_chat_without_messages_is_refused(live):
    with pytest.raises(openai.BadRequestError, match="a chat without messages"):
        live.client.chat.completions.create(model="tiny", messages=[])


def test_unknown_names_are_refused(live):
    with pytest.raises(openai.NotFoundError, match="The model `other` does not exist"):
        live.chat(text("what"), model="other")
    with pytest.raises(openai.BadRequestError, match="unknown role 'wizard'"):
        live.client.chat.completions.create(model="tiny", messages=[{"role": "wizard", "content": "x"}])


def test_a_body_over_the_limit_is_413(live):
    with pytest.raises(openai.APIStatusError, match="request body is over the limit") as caught:
        live.chat(text("x" * (65 * 2**20)))
    assert caught.value.status_code == 413


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/metrics", "/version", "//v1/models", "/load"])
def test_the_key_guards_every_path(live, path):
    body = {"model": "tiny", "prompt": "a"} if path == "/tokenize" else None
    assert live.ask(path, body, key=None)[0] == live.ask(path, body, key="wrong")[0] == 401
    assert live.ask(path, body)[0] in (200, 404)


def test_the_key_is_in_no_log_and_no_command_line(live):
    assert KEY not in live.log.read_text()
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "nmm-serve launch" in shown
    assert KEY not in shown


def test_answers_are_as_at_the_beginning_and_nothing_was_logged(live):
    secret = "circle7431"
    assert live.chat(text(secret)).choices[0].finish_reason
    assert secret not in live.log.read_text()
    assert "POST /v1" not in live.log.read_text()


def test_a_client_that_goes_away_stops_its_work(live):
    def generated():
        """Tokens generated so far, once the number stands still."""
        last = -1.0
        while True:
            now = live.metric("vllm:generation_tokens_total{.*}")
            if now == last:
                return now
            last = now
            time.sleep(3)

    long = {"max_tokens": 480, "n": 32, "extra_body": {"ignore_eos": True}, "temperature": 1}
    before = generated()
    with live.chat(text("what"), stream=True, **long) as stream:
        next(iter(stream))
    after_stream = generated()
    assert after_stream - before < 480 * 32
    impatient = live.client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "what"}], **long)
    assert generated() - after_stream < 480 * 32


def test_a_flag_that_vllm_does_not_know(checkpoint):
    command = [*LAUNCH, str(checkpoint), "--port", "0", "--max-num-seqz", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "unknown option '--max-num-seqz'. Did you mean '--max-num-seqs'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_text_tasks_score_as_on_the_torch_engine(live, oracle):
    """Through lm-eval's model: tokens over the boundary, texts beyond the context, whole documents, chats."""
    pytest.importorskip("lm_eval", reason="needs the extra `evals`")
    from text_fakes import instance, likelihood

    from nmm_serve.evals.lm_eval_model import NMM

    served, local = NMM(OpenAIEngine(live.url, api_key=KEY)), NMM(oracle)
    assert served.max_length == local.max_length
    pairs = [("what is the col", "our of"), ("the circle is ", "red"), ("", "red"), ("circle red " * 300, " blue")]
    asked = [likelihood(*pair, doc_id=i) for i, pair in enumerate(pairs)]
    for found, expected in zip(served.loglikelihood(asked), local.loglikelihood(asked), strict=True):
        assert found == (pytest.approx(expected[0], abs=1e-3), expected[1])
    assert served.truncated == local.truncated == {"toy": {3}}
    documents = [instance("loglikelihood_rolling", text) for text in ("red circle", "circle red " * 300)]
    for found, expected in zip(
        served.loglikelihood_rolling(documents), local.loglikelihood_rolling(documents), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-3)
    chat = served.apply_chat_template([{"role": "user", "content": "<image>what is"}])
    kwargs, image = {"max_gen_toks": 6, "until": []}, {"visual": [scene(1)]}
    answers = [
        m.generate_until([instance("generate_until", chat, kwargs, image), instance("generate_until", "the", kwargs)])
        for m in (served, local)
    ]
    assert [a.rstrip("\ufffd") for a in answers[0]] == [a.rstrip("\ufffd") for a in answers[1]]


def test_sigterm_lets_running_answers_end_and_exits_cleanly(live):
    """Ends the server, so nothing can come after it."""
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(live.chat(text("what"), max_tokens=400, extra_body={"ignore_eos": True}))
    )
    thread.start()
    time.sleep(0.5)
    live.process.terminate()
    thread.join(timeout=60)
    assert answers[0].usage.completion_tokens == 400
    assert live.process.wait(timeout=60) == 0
    with pytest.raises(urllib.error.URLError):
        live.ask("/health")
