"""The real server, started as a user starts it, asked with the official client. One start serves all tests."""

import io
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from exported import checkpoint_of, exported
from live_server import KEY, healthy_after, launched, picture, raw_image, text
from parity_checkpoint import noise_image
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")

import openai

from nmm_serve.engines.base import Request, SamplingParams, ScoreRequest
from nmm_serve.engines.openai import OpenAIEngine
from nmm_serve.engines.torch import TorchEngine

NAME = "late-moe-none"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    log = tmp_path_factory.mktemp("live") / "server.log"
    with launched(exported("late-moe"), log, "--threads", "1", "--max-num-seqs", "3", "--max-waiting", "2") as server:
        assert server.model == NAME
        yield server


@pytest.fixture(autouse=True)
def _still_healthy(live):
    with healthy_after(live):
        yield


@pytest.fixture(scope="module")
def oracle():
    return TorchEngine(str(checkpoint_of("late-moe")))


def question(*images, words="what is the colour of the circle ?", **sampling):
    content = [*({"type": "image"} for _ in images), text(words)]
    return Request(
        messages=[{"role": "user", "content": content}], images=images,
        sampling=SamplingParams(**{"max_tokens": 12} | sampling),
    )  # fmt: skip


def test_answers_equal_the_torch_engines(live, oracle):
    noise = [noise_image(i, 60 + 10 * i, 80) for i in range(4)]
    requests = [
        question(), question(noise[0]), question(noise[1], noise[2]), question(words="<|image|> typed"),
        question(noise[3], ignore_eos=True, logprobs=True, max_tokens=60),
        question(words="circle " * 60, ignore_eos=True, max_tokens=40),
        Request(prompt="the colour of", sampling=SamplingParams(max_tokens=20, ignore_eos=True)),
    ]  # fmt: skip
    whole = oracle.generate(requests)
    stop = whole[4].text[5:8]
    requests.append(question(noise[3], ignore_eos=True, max_tokens=60, stop=(stop,)))
    whole += oracle.generate(requests[-1:])
    engine = OpenAIEngine(live.url, api_key=KEY, concurrency=4)
    for output, expected in zip(engine.generate(requests), whole, strict=True):
        assert output.error is None
        assert output.text == expected.text
        assert output.token_ids == expected.token_ids
        assert (output.num_prompt_tokens, output.finish_reason) == (expected.num_prompt_tokens, expected.finish_reason)
        if expected.logprobs:
            assert output.logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def test_likelihoods_equal_the_torch_engines(live, oracle):
    pairs = (("the colour of", " the circle is red"), ("describe", " the image" * 60), ("", "x"))
    requests = [ScoreRequest(context=context, continuation=continuation) for context, continuation in pairs]
    served = OpenAIEngine(live.url, api_key=KEY, concurrency=2).loglikelihood(requests)
    for score, expected in zip(served, oracle.loglikelihood(requests), strict=True):
        assert score.logprob == pytest.approx(expected.logprob, abs=2e-3)
        assert (score.is_greedy, score.num_tokens) == (expected.is_greedy, expected.num_tokens)


def test_streamed_and_whole_answers_are_equal(live):
    for options in (
        {},
        {"n": 3, "temperature": 1.2, "seed": 5},
        {"extra_body": {"ignore_eos": True}, "logprobs": True},
    ):
        content = [picture(noise_image(1, 50, 50)), text("what is")]
        whole = live.chat(*content, max_tokens=40, **options)
        chunks = list(
            live.chat(*content, max_tokens=40, stream=True, stream_options={"include_usage": True}, **options)
        )
        for choice in whole.choices:
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
            assert "".join(c.delta.content or "" for c in mine) == choice.message.content
            assert mine[-1].finish_reason == choice.finish_reason
        assert chunks[-1].usage == whole.usage
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens


def test_tokenize_counts_as_usage_does(live):
    message = [{"role": "user", "content": [picture(noise_image(1, 50, 50)), text("what <|image|>")]}]
    counted = live.ask("/tokenize", {"messages": message})[1]
    used = live.chat(*message[0]["content"]).usage.prompt_tokens
    assert counted["count"] == len(counted["tokens"]) == used


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"temperature": 1e999, "prompt": "a"}', "temperature must be a number between 0 and 2"),
        (b"[" * 200_000, "not valid JSON"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "prompt must be a string"),
        ({"prompt": {"a": 1}}, "prompt must be a string"),
        ({"prompt": [1, "a"]}, "prompt must be a string"),
        ({"prompt": [-1]}, "token ids outside of 0 to 319"),
        ({"prompt": [320]}, "token ids outside of 0 to 319"),
        ({"prompt": [True]}, "prompt must be a string"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": "<|image|>"}, "1 <|image|> marks but 0 images"),
        ({"prompt": "circle " * 2000}, "maximum context length is 512"),
        ({"prompt": "a" * (2**20 + 1)}, "over the limit of 1048576"),
        ({"prompt": ["a" * 2**19] * 3}, "the prompts have 1572864 characters, over the limit of 1048576"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens must be a whole number"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens must be a whole number"),
        ({"prompt": "a", "max_tokens": 600}, "maximum context length"),
        ({"prompt": "a", "n": 10**9}, "n must be at most 64"),
        ({"prompt": "a", "n": True}, "n must be a whole number"),
        ({"prompt": ["a"] * 33, "n": 2}, "n must be at most 64"),
        ({"prompt": "a", "temperature": -0.1}, "temperature must be"),
        ({"prompt": "a", "temperature": "hot"}, "temperature must be"),
        ({"prompt": "a", "top_p": 0}, "top_p must be"),
        ({"prompt": "a", "seed": 2**64}, "seed must be"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop must be"),
        ({"prompt": "a", "stop": ""}, "1 to 256 characters"),
        ({"prompt": "a", "logprobs": 20}, "logprobs must be"),
        ({"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias is not offered"),
        ({"prompt": "a", "response_format": {"type": "regex", "regex": "(((("}}, "response_format is not offered"),
        ({"prompt": "a", "prompt_embeds": "gASV"}, "unknown field 'prompt_embeds'"),
        ({"prompt": "a", "stream_options": 5}, "stream_options must be"),
    ],
)
def test_bad_completions_are_refused(live, body, told):
    status, answer = live.ask("/v1/completions", body)
    assert (status, answer["error"]["code"]) == (400, 400)
    assert told in answer["error"]["message"]


def test_an_answer_can_be_sent_back(live):
    """Whole, as its own class gives it: with the fields that it does not have as null."""
    first = {"role": "user", "content": [text("what is it ?")]}
    answer = live.client.chat.completions.create(model=NAME, messages=[first], max_tokens=4).choices[0].message
    short = {"role": "assistant", "content": answer.content}
    counts = [
        live.ask("/tokenize", {"messages": [first, turn, first]})[1]["count"]
        for turn in (short, answer.model_dump(), answer.model_dump(exclude_unset=True))
    ]
    assert answer.model_dump()["tool_calls"] is None
    assert len(set(counts)) == 1


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (None, "messages must be a list"),
        ([], "messages must be a list"),
        (["hello"], "messages must be a list"),
        ([{"role": "assistant", "content": None, "refusal": "I cannot."}], "unknown field 'refusal' in a message"),
        ([{"role": "user", "content": None}], "content must be a string"),
        ([{"content": "a"}], "needs a role"),
        ([{"role": "wizard", "content": "a"}], "unknown role 'wizard'"),
        ([{"role": "user", "content": "a", "tool_calls": []}], "unknown field 'tool_calls'"),
        ([{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}], "unknown content part"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}], "needs a url"),
    ],
)
def test_bad_chats_are_refused(live, messages, told):
    status, answer = live.ask("/v1/chat/completions", {"messages": messages})
    assert status == 400
    assert told in answer["error"]["message"]
    status, answer = live.ask("/v1/chat/completions", {"messages": [], "chat_template": "{{ 1 }}"})
    assert "unknown field 'chat_template'" in answer["error"]["message"]


def bomb():
    buffer = io.BytesIO()
    Image.new("1", (20000, 20000)).save(buffer, "PNG")  # 400 million pixels in 50 kB
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "told"),
    [
        *(({"type": "image_url", "image_url": {"url": url}}, "no images from other hosts") for url in (
            "http://example.com/a.png", "http://169.254.169.254/latest", "http://[::1]:22/", "HTTP://127.1/", "//a/b",
            "ftp://localhost/a", "http:\\\\localhost", "/etc/passwd", "", " data:image/png;base64,AAAA")),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "reads no files"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}, "not valid base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,AAAA"}}, "data URL is not base64"),
        (raw_image(b"no image"), "not a readable image"),
        (raw_image(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a readable image"),
        (raw_image(bomb()), "pixels"),
        (picture(Image.new("RGB", (2000, 1))), "longer than 16:1"),
    ],
)  # fmt: skip
def test_images_that_are_refused(live, image, told):
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        live.chat(image, text("what is this"))
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (64, 4)])
def test_odd_sizes(live, size):
    assert live.chat(picture(Image.new("LA", size)), text("what")).choices[0].finish_reason


def test_more_images_than_fit_are_refused(live):
    with pytest.raises(openai.BadRequestError, match=r"At most 15 image\(s\)"):
        live.chat(*[picture(noise_image(1, 9, 9))] * 16)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        live.chat(*[picture(noise_image(1, 9, 9))] * 12)


def test_wrong_paths_methods_and_types(live):
    assert live.ask("/v1/nothing")[0] == 404
    assert live.ask("/v1/completions", method="GET")[0] == 405
    assert live.ask("/v1/completions", b"prompt=a", kind="text/plain")[0] == 415
    status, answer = live.ask("/v1/completions", {"model": "other", "prompt": "a"})
    assert (status, answer["error"]["message"][:34]) == (404, "The model `other` does not exist; ")


def test_a_body_over_the_limit_is_413(live):
    with pytest.raises(openai.APIStatusError, match="request body is over the limit") as caught:
        live.chat(text("x" * (65 * 2**20)))
    assert caught.value.status_code == 413


def test_giant_headers_are_refused(live):
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2**21 + b"\r\n\r\n")
            assert b" 400 " in connection.recv(100)
        except (BrokenPipeError, ConnectionResetError):
            pass


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/metrics", "//v1/models", "/v1/chat/completions"])
def test_the_key_guards_every_path(live, path):
    assert live.ask(path, key=None)[0] == live.ask(path, key="wrong")[0] == 401
    assert live.ask(path)[0] in (200, 404, 405)


def test_a_client_that_goes_away_stops_its_work(live):
    live.until_idle()
    before = live.metric("nmm_generation_tokens_total")
    long = {"max_tokens": 480, "n": 3, "extra_body": {"ignore_eos": True}, "temperature": 1}
    with live.chat(text("what"), stream=True, **long) as stream:
        next(iter(stream))
    live.until_idle()
    with pytest.raises(openai.APITimeoutError):
        live.client.with_options(timeout=0.2).chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "what"}], **long
        )
    live.until_idle()
    assert live.metric("nmm_generation_tokens_total") - before < 2 * 3 * 480
    assert live.metric('nmm_requests_total{outcome="aborted"}') > 0


def test_a_full_line_is_429_and_loses_nothing(live):
    statuses, lock = [], threading.Lock()

    def ask():
        body = {"prompt": "what", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
        status, answer = live.ask("/v1/completions", body)
        with lock:
            statuses.append((status, answer["choices"][0]["text"] if status == 200 else answer["error"]["message"]))

    live.until_idle()
    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    good = [answer for status, answer in statuses if status == 200]
    assert len(set(good)) == 1
    assert len(good) >= 5, "three run and two wait"
    assert {answer for status, answer in statuses if status == 429} == {"the server is busy; try again later"}
    assert len(good) < 16
    assert live.metric("nmm_rejected_total") == 16 - len(good)


def test_nothing_private_is_told(live):
    secret = "circle7431"
    assert live.chat(text(secret)).choices[0].finish_reason
    log = live.log.read_text()
    assert secret not in log
    assert KEY not in log
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert KEY not in shown
    libraries = Path(f"/proc/{live.process.pid}/maps").read_text()
    assert "onnxruntime" in libraries
    assert "libtorch" not in libraries


def test_sigterm_lets_running_answers_end_and_exits_cleanly(live):
    """Ends the server, so nothing can come after it."""
    answers = []
    long = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}
    thread = threading.Thread(target=lambda: answers.append(live.chat(text("what"), **long)))
    thread.start()
    while not live.metric("nmm_requests_running"):
        time.sleep(0.01)
    live.process.terminate()
    thread.join(timeout=60)
    assert answers[0].usage.completion_tokens == 400
    assert live.process.wait(timeout=60) == 0
    with pytest.raises(urllib.error.URLError):
        live.ask("/health")


def test_a_second_sigterm_ends_at_once(tmp_path):
    link = tmp_path / "current"  # keeps its name
    link.symlink_to(exported("late-moe"))
    with launched(link, tmp_path / "log", "--threads", "1", "--max-num-seqs", "1") as server:
        body = {"prompt": "what", "max_tokens": 500, "n": 32, "ignore_eos": True, "stream": True}
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        with socket.create_connection(server.address, timeout=30) as connection:
            data = json.dumps(body).encode()
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            server.process.terminate()
            time.sleep(0.5)
            assert server.process.poll() is None, "the first lets it go on"
            server.process.terminate()
            assert server.process.wait(timeout=15) == 0
            read = b""
            while piece := connection.recv(2**16):
                read += piece
            assert b"[DONE]" not in read
