"""OpenAIEngine against a small fake server that misbehaves on demand."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("openai")

from nmm_serve.engines import open_engine, openai_retries, server_load
from nmm_serve.engines.base import Engine, Request, SamplingParams, ScoreRequest
from nmm_serve.engines.occupancy import Occupancy
from nmm_serve.engines.openai import OpenAIEngine, base_url
from nmm_serve.engines.openai_messages import with_images
from nmm_serve.errors import ConfigError, EngineError, PromptError


class FakeServer:
    """Plays `script`, one entry a completion request, then answers well. Records every request body."""

    def __init__(self, owned_by="someone", models=("m",)):
        self.owned_by, self.models = owned_by, models
        self.script: list = []
        self.bodies: list = []
        self.headers: list = []
        self.in_flight = self.most_in_flight = 0
        self.delay = 0.0
        self.load: float | None = None
        """How many requests it says that it runs at once, among its metrics. None: it has no such page."""
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                if self.path == "/v1/models":
                    cards = [{"id": m, "object": "model", "created": 0, "owned_by": fake.owned_by} for m in fake.models]
                    self.reply(200, {"object": "list", "data": cards})
                elif self.path == "/metrics" and fake.load is not None:
                    with fake.lock:
                        line = 'vllm:num_requests_%s{model_name="m",engine="0"} %.1f\n'
                        page = line % ("running", min(fake.in_flight, 2))
                        page += line % ("waiting", max(fake.in_flight - 2, 0))
                        page += f"nmm_max_num_seqs {fake.load}\n"
                    self.reply(200, page.encode(), content_type="text/plain")
                elif self.path == "/version":
                    self.reply(200, {"version": "0.32.0"})
                else:
                    self.reply(404, {"error": {"message": "no such path"}})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with fake.lock:
                    fake.in_flight += 1
                    fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
                    fake.headers.append(dict(self.headers))
                    step = fake.script.pop(0) if fake.script and self.path != "/tokenize" else None
                    if self.path != "/tokenize":
                        fake.bodies.append(body)
                try:
                    time.sleep(fake.delay)
                    (step or fake.good)(self, body)
                finally:
                    with fake.lock:
                        fake.in_flight -= 1

            def reply(self, status, document, content_type="application/json", **headers):
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-type", content_type)
                self.send_header("content-length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

            def stream(self, chunks, done=True):
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                for chunk in chunks:
                    text = chunk if isinstance(chunk, str) else json.dumps(chunk)
                    self.wfile.write(f"data: {text}\n\n".encode())
                    self.wfile.flush()
                if done:
                    self.wfile.write(b"data: [DONE]\n\n")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def good(self, handler, body):
        if handler.path == "/tokenize":
            ids = [7] * body["add_special_tokens"] + [ord(c) for c in body["prompt"]]
            return handler.reply(200, {"tokens": ids})
        if handler.path == "/v1/completions" and not body.get("stream"):
            return self.score(handler, body)
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        words = ["you", " said ", prompt if isinstance(prompt, str) else f"{len(prompt)} parts"]
        handler.stream([*(piece(body, word) for word in words), piece(body, "", "stop"), usage(body, 5, 4)])
        return None

    def score(self, handler, body):
        if body.get("echo"):
            text = body["prompt"]
            logprobs = {
                "tokens": list(text),
                "text_offset": list(range(len(text))),
                "token_logprobs": [None, *[-0.5] * (len(text) - 1)],
                "top_logprobs": [None, *[{"x": -0.5}] * (len(text) - 1)],
            }
            choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": logprobs}
        else:
            entries = [None, *({str(t): {"logprob": -0.25, "rank": 1 + (t == ord("?"))}} for t in body["prompt"][1:])]
            choice = {
                "index": 0, "text": "", "finish_reason": "length", "logprobs": None, "prompt_logprobs": entries,
            }  # fmt: skip
        handler.reply(200, {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})


def piece(body, text, finish_reason=None, token_ids=None, logprob=None):
    choice = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
    if "messages" in body:
        choice["delta"] = {"content": text}
        if logprob is not None:
            choice["logprobs"] = {"content": [{"token": text, "logprob": logprob, "top_logprobs": []}]}
    else:
        choice["text"] = text
    if token_ids is not None:
        choice["token_ids"] = token_ids
    return {"id": "1", "object": "chunk", "created": 0, "model": "m", "choices": [choice]}


def usage(body, prompt, completion):
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"id": "1", "object": "chunk", "created": 0, "model": "m", "choices": [], "usage": counts}


def status(code, message="no", **headers):
    return lambda handler, body: handler.reply(code, {"error": {"message": message}}, **headers)


def chat(text="hello", images=(), **sampling):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}] if images else text
    return Request(messages=[{"role": "user", "content": content}], images=images, sampling=SamplingParams(**sampling))


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(openai_retries, "FIRST_DELAY_S", 0.01)


def test_answers_a_chat_and_a_raw_prompt_with_counts_and_times(server):
    engine = open_engine(server.url)
    assert isinstance(engine, Engine)
    outputs = engine.generate([chat("hello"), Request(prompt="raw")])
    assert [o.text for o in outputs] == ["you said hello", "you said raw"]
    for output in outputs:
        assert (output.finish_reason, output.num_prompt_tokens, output.num_tokens, output.error) == ("stop", 5, 4, None)
        assert len(output.timing.token_s) == 3  # chunks: this server does not tell its tokens
        assert output.timing.ttft_s == output.timing.token_s[0] <= output.timing.e2e_s
    assert engine.describe()["server"] is None


def test_sampling_goes_into_the_request(server):
    OpenAIEngine(server.url).generate([chat(max_tokens=3, temperature=0.5, top_p=0.9, seed=4, stop=("x",))])
    body = server.bodies[0]
    wanted = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 4, "stop": ["x"], "model": "m", "stream": True}
    assert {name: body[name] for name in wanted} == wanted
    assert "ignore_eos" not in body


def test_images_travel_as_lossless_png_in_the_order_of_their_places(server):
    red, blue = (Image.new("RGB", (3, 2), color) for color in ("red", "blue"))
    output = OpenAIEngine(server.url).generate([chat("which?", [red, blue])])[0]
    assert output.text == "you said 3 parts"
    urls = [p["image_url"]["url"] for p in server.bodies[0]["messages"][0]["content"][:2]]
    for url, image in zip(urls, (red, blue), strict=True):
        head, data = url.split(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == image.tobytes()


def test_the_callers_messages_stay_as_they_were():
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    with_images(messages, [Image.new("RGB", (1, 1))])
    assert messages == [{"role": "user", "content": [{"type": "image"}]}]


@pytest.mark.parametrize("images", [[], [Image.new("RGB", (1, 1))] * 2])
def test_image_count_must_match(images):
    with pytest.raises(PromptError, match="1 image places but"):
        with_images([{"role": "user", "content": [{"type": "image"}]}], images)


def test_what_cannot_be_sent_is_an_output_with_an_error(server):
    picture = [Image.new("RGB", (1, 1))]
    half = "a \ud83d b"
    outputs = OpenAIEngine(server.url).generate(
        [
            Request(prompt="<|image|>", images=picture), chat(ignore_eos=True), chat("fine"), chat(half),
            Request(prompt=half), Request(messages=[{"role": "user", "content": [{"type": "text", "text": half}]}]),
        ]
    )  # fmt: skip
    assert "only in chat messages" in outputs[0].error
    assert "ignore_eos" in outputs[1].error
    assert outputs[2].error is None
    assert [o.finish_reason for o in outputs] == ["error", "error", "stop", "error", "error", "error"]
    assert all("half of a surrogate pair" in o.error for o in outputs[3:])


def test_logprobs_of_the_chosen_tokens(server):
    def answer(handler, body):
        assert body["logprobs"] is True
        handler.stream([piece(body, "a", logprob=-0.1), piece(body, "b", "length", logprob=-0.2), usage(body, 1, 2)])

    server.script = [answer]
    output = OpenAIEngine(server.url).generate([chat(logprobs=True)])[0]
    assert output.logprobs == (-0.1, -0.2)
    assert output.finish_reason == "length"


def broken_stream(handler, body):
    handler.stream([piece(body, "half an ans")], done=False)


def no_json(handler, body):
    handler.stream(["{this is no json"])


def error_event(handler, body):
    handler.stream([{"error": {"message": "engine hiccup", "code": 500}}])


def html(handler, body):
    handler.reply(200, b"<html>the proxy says hello</html>")


def hang_up(handler, body):
    handler.connection.close()


@pytest.mark.parametrize(
    "trouble",
    [
        status(500), status(502), status(503), status(429), status(429, retry_after="0.01"), status(408),
        status(429, retry_after="Wed, 21 Oct 2026 07:28:00 GMT"),
        broken_stream, no_json, error_event, html, hang_up,
    ],
    ids=lambda f: getattr(f, "__name__", "step"),
)  # fmt: skip
def test_passing_trouble_is_tried_again(server, trouble):
    server.script = [trouble, trouble]
    output = OpenAIEngine(server.url).generate([chat()])[0]
    assert (output.text, output.error) == ("you said hello", None)
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("trouble", "told"),
    [(status(500, "out of memory"), "out of memory"), (broken_stream, "ended early"), (hang_up, "cannot connect")],
)
def test_lasting_trouble_becomes_an_error_not_an_answer(server, trouble, told):
    server.script = [trouble] * 3
    output = OpenAIEngine(server.url, max_retries=2).generate([chat()])[0]
    assert output.text == ""
    assert output.finish_reason == "error"
    assert told in output.error
    assert "3 attempts" in output.error


def test_a_silent_server_times_out(server):
    engine = OpenAIEngine(server.url, timeout=0.2, max_retries=1)
    server.delay = 1.0
    output = engine.generate([chat()])[0]
    assert "no answer within 0.2 s" in output.error


@pytest.mark.parametrize("code", [400, 401, 404, 413, 422])
def test_a_refusal_is_final_and_keeps_the_servers_words(server, code):
    server.script = [status(code, "that is not right\nsecond line")]
    output = OpenAIEngine(server.url).generate([chat()])[0]
    assert f"HTTP {code}: that is not right" in output.error
    assert "\n" not in output.error
    assert len(server.bodies) == 1


def test_an_answer_that_ends_oddly_is_an_error(server):
    server.script = [lambda handler, body: handler.stream([piece(body, "half", "content_filter")])]
    output = OpenAIEngine(server.url).generate([chat()])[0]
    assert (output.text, output.error) == ("", "the server ended with 'content_filter'")


def test_order_is_kept_concurrency_is_bounded_and_progress_counts_each(server):
    server.delay = 0.02
    seen = []
    outputs = OpenAIEngine(server.url, concurrency=3).generate([chat(str(i)) for i in range(20)], seen.append)
    assert [o.text for o in outputs] == [f"you said {i}" for i in range(20)]
    assert sum(seen) == 20
    assert 1 < server.most_in_flight <= 3


def test_no_requests_no_answers(server):
    assert OpenAIEngine(server.url).generate([]) == []


def test_key_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    OpenAIEngine(server.url).generate([chat()])
    OpenAIEngine(server.url, api_key="given").generate([chat()])
    assert [h["authorization"] for h in server.headers] == ["Bearer from-env", "Bearer given"]
    assert "given" not in json.dumps(OpenAIEngine(server.url, api_key="given").describe())


def test_the_model_is_named_when_there_are_several():
    server = FakeServer(models=("first", "second"))
    with pytest.raises(EngineError, match="serves 2 models, name one of them: first, second"):
        OpenAIEngine(server.url)
    with pytest.raises(EngineError, match="Did you mean 'second'"):
        OpenAIEngine(server.url, served_model="secnd")
    OpenAIEngine(server.url, served_model="second").generate([chat()])
    assert server.bodies[0]["model"] == "second"


def test_a_server_that_is_not_there_or_not_one():
    with pytest.raises(EngineError, match="cannot connect"):
        OpenAIEngine("http://127.0.0.1:9", max_retries=0)
    server = FakeServer()
    with pytest.raises(EngineError, match="no OpenAI-compatible server"):
        OpenAIEngine(server.url + "/elsewhere")
    assert OpenAIEngine(server.url + "/elsewhere", served_model="m").served_model == "m"


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        ("https://h/v1/", "https://h/v1"),
        ("https://h/deep/path", "https://h/deep/path"),
    ],
)
def test_base_url(url, wanted):
    assert base_url(url) == wanted


@pytest.mark.parametrize("url", ["ftp://h", "h:8000", "http://", "http://user:secret@h"])
def test_base_url_refuses(url):
    with pytest.raises(ConfigError) as caught:
        base_url(url)
    assert "secret" not in str(caught.value)


class TestVLLM:
    """What only a vLLM server can do."""

    @pytest.fixture
    def server(self):
        return FakeServer(owned_by="vllm")

    def test_token_ids(self, server):
        def answer(handler, body):
            assert body["return_token_ids"] is True
            assert body["ignore_eos"] is True
            chunks = [piece(body, "ab", token_ids=[1, 2]), piece(body, "", "stop", token_ids=[3]), usage(body, 9, 3)]
            handler.stream(chunks)

        server.script = [answer]
        output = OpenAIEngine(server.url).generate([chat(ignore_eos=True)])[0]
        assert output.error is None
        assert output.token_ids == (1, 2, 3)
        assert output.num_tokens == len(output.timing.token_s) == 3

    def test_scores(self, server):
        engine = OpenAIEngine(server.url)
        good, bad = engine.loglikelihood(
            [ScoreRequest(context="ab", continuation="cde"), ScoreRequest(context="ab", continuation="c?")]
        )
        assert (good.logprob, good.is_greedy, good.num_tokens) == (-0.75, True, 3)
        assert (bad.logprob, bad.is_greedy, bad.num_tokens) == (-0.5, False, 2)
        assert server.bodies[0]["prompt"][0] == 7  # the context begins with its special token
        assert engine.describe()["server"] == "vllm 0.32.0"


def test_scores_by_echo(server):
    score = OpenAIEngine(server.url).loglikelihood([ScoreRequest(context="ab", continuation="cde")])[0]
    assert (score.logprob, score.is_greedy, score.num_tokens) == (-1.5, True, 3)


def test_scores_that_the_server_cannot_give(server):
    engine = OpenAIEngine(server.url)
    plain = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
    document = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [plain]}
    server.script = [lambda handler, body: handler.reply(200, document)]
    with pytest.raises(EngineError, match="does not echo"):
        engine.loglikelihood([ScoreRequest(context="ab", continuation="c")])
    with pytest.raises(EngineError, match="with images"):
        engine.loglikelihood([ScoreRequest(context="a", continuation="c", images=[Image.new("RGB", (1, 1))])])
    with pytest.raises(PromptError, match="empty continuation"):
        engine.loglikelihood([ScoreRequest(context="a", continuation="")])
    # a failed call leaves the engine usable
    assert engine.loglikelihood([ScoreRequest(context="ab", continuation="c")])[0].num_tokens == 1


def ask_stream(server, count, concurrency):
    taken = []
    requests = (taken.append(i) or Request(prompt=f"{i}") for i in range(count))
    occupancy = Occupancy()
    with OpenAIEngine(server.url, concurrency=concurrency) as engine:
        outputs = {}
        for position, output in engine.stream(requests, occupancy):
            outputs[position] = output.text
            assert len(taken) <= len(outputs) + 4 * concurrency
    assert outputs == {i: f"you said {i}" for i in range(count)}
    return occupancy.section()


def test_a_stream_keeps_its_window_full(server):
    server.delay = 0.02
    speed = ask_stream(server, 40, 4)
    assert server.most_in_flight >= 4  # the server sees a request end later than the client does
    assert speed["full_batch"]["limit"] == 4
    assert speed["full_batch"]["seen_by"].startswith("the client")
    assert 0 < speed["full_batch_share"] < 1
    assert 0 < speed["steady_full_batch_share"] <= 1


def test_a_server_that_tells_its_load_is_asked_for_it(server, monkeypatch):
    monkeypatch.setattr(server_load, "EVERY_S", 0.01)
    server.owned_by, server.delay, server.load = "vllm", 0.1, 3.0
    speed = ask_stream(server, 20, 4)
    assert speed["full_batch"]["limit"] == 3
    assert "the server's metrics" in speed["full_batch"]["seen_by"]
    assert 0 < speed["full_batch_share"] < 1
    server.load = 5.0  # more than are ever in flight
    speed = ask_stream(server, 8, 4)
    assert (speed["full_batch_share"], speed["steady_full_batch_share"]) == (0, None)
    assert "never 5 requests at once" in speed["full_batch_reason"]
    with OpenAIEngine(server.url) as engine:
        assert engine.concurrency == 20  # so that some wait at the server


def test_a_stream_of_nothing_and_of_failures(server):
    with OpenAIEngine(server.url) as engine:
        assert list(engine.stream([], Occupancy())) == []
        ((_, output),) = engine.stream([Request(prompt="<|image|>", images=[Path("gone.png")])], Occupancy())
    assert "raw prompt" in output.error


@pytest.mark.parametrize(
    ("page", "value"),
    [
        ("", None),
        ("# HELP x a\n# TYPE x gauge\nx 3.0\n", 3),
        ('x{a="1"} 2.0\nx{a="2"} 3.0\n', 5),
        ("xy 1.0\n", None),
        ("x nonsense\n", None),
    ],
)
def test_gauges(page, value):
    assert server_load.gauge(page, "x") == value
