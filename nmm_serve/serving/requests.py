"""What clients may ask for: every field is checked by name, type and range before any work is done."""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nmm_serve.engines.base import SamplingParams
from nmm_serve.errors import ImageError, PromptError
from nmm_serve.image_hosts import BAD_BASE64, NO_FILES, NOT_BASE64, check_host
from nmm_serve.onnx.manifest import Manifest
from nmm_serve.prompt import Prompt, PromptEncoder
from nmm_serve.server import MAX_N

MAX_TEXT_CHARS = 2**20
"""Of all texts of a request together; far more than any context holds."""
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16
"""Of the completions API; a chat may fill the context."""

Fields = dict[str, Any]
Fetched = Mapping[str, bytes]
"""Remote images by URL."""


class BadRequest(Exception):
    """A request that is refused: HTTP status, message, and the field that is to blame."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that can be run: prompts, how to decode each of them `n` times, and how to answer."""

    chat: bool
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    return_token_ids: bool
    prompt_logprobs: bool
    best_logprobs: bool = False
    """With each token's log-probability, that of the likeliest one."""


def parse_json(body: bytes) -> Fields:
    """A JSON object. NaN and Infinity, which JSON does not have, are refused."""

    def refuse(name: str) -> None:
        raise BadRequest(f"the body is not valid JSON: {name} is not a JSON number")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not valid JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value


IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields of OpenAI's that say nothing about the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "repetition_penalty": (1, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "suffix": ("", None),
    "best_of": (1, None),
    "echo": (False, None),
    "top_logprobs": (0, None),
    "top_k": (-1, 0, None),
    "min_p": (0, None),
}
"""Fields that only have the value that changes nothing."""


def check_names(fields: Fields, known: Sequence[str]) -> None:
    for name, value in fields.items():
        if name in NEUTRAL:
            if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
                       for neutral in NEUTRAL[name]):  # fmt: skip
                raise BadRequest(f"{name} is not offered by this server; leave it out", name)
        elif name not in known and name not in IGNORED:
            raise BadRequest(f"unknown field {name[:64]!r}; leave it out", name[:64])


def number(fields: Fields, name: str, default: float, fits: Callable[[float], bool], expected: str) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value) or not fits(value):
        raise BadRequest(f"{name} must be {expected}", name)
    return float(value)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def whole(fields: Fields, name: str, default: int | None, least: int, most: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRequest(f"{name} must be a whole number between {least} and {most}", name)
    return value


def flag(fields: Fields, name: str, default: bool = False) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", name)
    return value


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a string", name)
    if len(value) > MAX_TEXT_CHARS:
        raise BadRequest(f"{name} has {len(value)} characters, over the limit of {MAX_TEXT_CHARS}", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name} holds half of a surrogate pair, which is no character", name) from None
    return value


SAMPLING = (
    "temperature",
    "top_p",
    "seed",
    "stop",
    "ignore_eos",
    "max_tokens",
    "n",
    "stream",
    "stream_options",
    "logprobs",
)
OURS = ("model", "return_token_ids")


def check_model(fields: Fields, served: str) -> None:
    model = fields.get("model")
    if model is None:
        return
    if model != served:
        shown = model[:64] if isinstance(model, str) else type(model).__name__
        raise BadRequest(f"The model `{shown}` does not exist; this server has `{served}`", "model", 404)


def read_chat(fields: Fields, encoder: PromptEncoder, manifest: Manifest, fetched: Fetched) -> Asked:
    """The body of /v1/chat/completions. Raises BadRequest."""
    check_names(fields, (*OURS, *SAMPLING, "messages", "max_completion_tokens"))
    messages, images = read_messages(fields.get("messages"), manifest, fetched)
    prompt = encode(lambda: encoder.prompt_of_chat(messages, images), "messages")
    room = room_for(prompt, manifest, "messages")
    most = whole(fields, "max_completion_tokens", None, 1, 2**31) or whole(fields, "max_tokens", None, 1, 2**31)
    return asked(fields, [prompt], most or room, logprobs=flag(fields, "logprobs"), manifest=manifest, chat=True)


def read_completion(fields: Fields, encoder: PromptEncoder, manifest: Manifest, _fetched: Fetched) -> Asked:
    """The body of /v1/completions, which takes no images. Raises BadRequest."""
    check_names(fields, (*OURS, *SAMPLING, "prompt", "prompt_logprobs"))

    def read(given: str | list[int]) -> Prompt:
        return encoder.prompt_of_ids(given if isinstance(given, list) else encoder.encode_marked(given))

    prompts = [encode(partial(read, given), "prompt") for given in read_prompts(fields.get("prompt"), manifest)]
    for prompt in prompts:
        room_for(prompt, manifest, "prompt")
    most = whole(fields, "max_tokens", DEFAULT_MAX_TOKENS, 1, 2**31)
    assert most is not None
    logprobs = whole(fields, "logprobs", None, 0, 1)
    found = asked(fields, prompts, most, logprobs=logprobs is not None, manifest=manifest, chat=False)
    return replace(found, best_logprobs=logprobs == 1)


def asked(
    fields: Fields, prompts: Sequence[Prompt], max_tokens: int, *, logprobs: bool, manifest: Manifest, chat: bool
) -> Asked:
    longest = max(len(prompt.input_ids) for prompt in prompts)
    if longest + max_tokens > manifest.context_length:
        raise BadRequest(
            f"the prompt has {longest} tokens and max_tokens is {max_tokens}, but the model's maximum context length "
            f"is {manifest.context_length}; shorten the prompt or ask for fewer",
            "max_tokens",
        )
    stop = fields.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise BadRequest(f"stop must be a string or a list of at most {MAX_STOPS} strings", "stop")
    for item in stops:
        if not 0 < len(text_of(item, "stop")) <= MAX_STOP_CHARS:
            raise BadRequest(f"a stop string must have 1 to {MAX_STOP_CHARS} characters", "stop")
    options = fields.get("stream_options")
    if options is not None and (not isinstance(options, dict) or set(options) - {"include_usage"}):
        raise BadRequest("stream_options must be an object with include_usage", "stream_options")
    n = whole(fields, "n", 1, 1, 2**63)
    assert n is not None
    if n * len(prompts) > MAX_N:
        raise BadRequest(f"n must be at most {MAX_N}, counted over all prompts", "n")
    return Asked(
        chat=chat,
        prompts=prompts,
        sampling=SamplingParams(
            max_tokens=max_tokens,
            temperature=number(fields, "temperature", 1.0, lambda x: 0 <= x <= 2, "a number between 0 and 2"),
            top_p=number(fields, "top_p", 1.0, lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
            seed=whole(fields, "seed", None, -(2**63), 2**63 - 1),
            stop=tuple(stops),
            ignore_eos=flag(fields, "ignore_eos"),
            logprobs=logprobs,
        ),
        n=n,
        stream=flag(fields, "stream"),
        include_usage=flag(options or {}, "include_usage"),
        return_token_ids=flag(fields, "return_token_ids"),
        prompt_logprobs=whole(fields, "prompt_logprobs", None, 0, 0) is not None,
    )


def room_for(prompt: Prompt, manifest: Manifest, name: str) -> int:
    """New tokens that fit after a prompt. Raises BadRequest when none does, or the prompt is empty."""
    if not prompt.input_ids:
        raise BadRequest("the prompt is empty", name)
    room = manifest.context_length - len(prompt.input_ids)
    if room < 1:
        raise BadRequest(
            f"the prompt has {len(prompt.input_ids)} tokens, but the model's maximum context length is "
            f"{manifest.context_length}; shorten it",
            name,
        )
    return room


def encode(work: Callable[[], Prompt], name: str) -> Prompt:
    try:
        return work()
    except (PromptError, ImageError) as error:
        raise BadRequest(str(error), name) from None


def read_prompts(value: Any, manifest: Manifest) -> list[str | list[int]]:
    """`prompt` of the completions API: a string, token ids, or a list of either."""
    items = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    if len(items) > MAX_PROMPTS:
        raise BadRequest(f"prompt has {len(items)} prompts, over the limit of {MAX_PROMPTS}", "prompt")
    chars = sum(len(item) for item in items if isinstance(item, str))
    if chars > MAX_TEXT_CHARS:
        raise BadRequest(f"the prompts have {chars} characters, over the limit of {MAX_TEXT_CHARS}", "prompt")
    prompts: list[str | list[int]] = []
    for item in items:
        if isinstance(item, str):
            if not item:
                raise BadRequest("prompt is empty", "prompt")
            prompts.append(text_of(item, "prompt"))
        elif isinstance(item, list) and item and all(type(token) is int for token in item):
            if len(item) >= manifest.context_length:
                raise BadRequest(f"the prompt has {len(item)} tokens, but the model's maximum context length is "
                                 f"{manifest.context_length}; shorten it", "prompt")  # fmt: skip
            if not all(0 <= token < manifest.vocab_size for token in item):
                raise BadRequest(f"prompt has token ids outside of 0 to {manifest.vocab_size - 1}", "prompt")
            prompts.append(item)
        else:
            raise BadRequest("prompt must be a string, a list of token ids, or a list of either; not empty", "prompt")
    return prompts


def most_images(manifest: Manifest) -> int:
    """An image takes at least half of its most tokens; more of them cannot fit, and would be decoded for nothing."""
    return max(1, manifest.context_length // ((manifest.image_size // manifest.patch_size) ** 2 // 2 + 2))


def read_messages(messages: Any, manifest: Manifest, fetched: Fetched) -> tuple[list[Fields], list[bytes]]:
    """Chat messages in the shape of `nmm_serve.chat`, and the files of their images in order: open, those of one
    request can take gigabytes. `fetched`: the remote ones by URL."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRequest("messages must be a list of objects; not empty", "messages")
    urls, read, chars = [], [], 0
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise BadRequest("a message needs a role: system, user or assistant", "messages")
        # null says nothing: OpenAI's client writes so what an answer that is sent back did not have
        unknown = {name for name, value in message.items() if value is not None} - {"role", "content", "name"}
        if unknown:
            raise BadRequest(f"unknown field {sorted(unknown)[0][:64]!r} in a message; leave it out", "messages")
        if content is None and role == "assistant":  # OpenAI's clients send back an answer that was empty so
            content = ""
        if isinstance(content, list):
            parts = []
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind in ("text", "input_text"):
                    parts.append({"type": "text", "text": text_of(part.get("text"), "text")})
                    chars += len(part["text"])
                elif kind in ("image_url", "input_image"):
                    url = part.get("image_url")
                    urls.append(url.get("url") if isinstance(url, dict) else url)
                    parts.append({"type": "image"})
                else:
                    raise BadRequest(f"unknown content part {str(kind)[:64]!r}; use text or image_url", "messages")
            content = parts
        else:
            chars += len(text_of(content, "content"))
        read.append({"role": "system" if role == "developer" else role[:64], "content": content})
    if chars > MAX_TEXT_CHARS:
        raise BadRequest(f"the messages have {chars} characters, over the limit of {MAX_TEXT_CHARS}", "messages")
    if len(urls) > most_images(manifest):
        raise BadRequest(f"At most {most_images(manifest)} image(s) fit into a prompt, not {len(urls)}", "messages")
    return read, [image_of(url, fetched) for url in urls]


def remote_urls(fields: Fields) -> list[str]:
    """The URLs of images in messages that are none of data. What is no message is passed over: `read_messages`, which
    comes after, says what is wrong with it."""
    messages = fields.get("messages")
    urls = []
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            url = part.get("image_url") if isinstance(part, dict) else None
            url = url.get("url") if isinstance(url, dict) else url
            if isinstance(url, str) and url[:5].lower() != "data:":
                urls.append(url)
    return urls


def image_of(url: Any, fetched: Fetched) -> bytes:
    """The image file in a data URL, or the fetched one. No file of this machine is read."""
    if not isinstance(url, str):
        raise BadRequest("image_url needs a url: a base64 data URL", "messages")
    if url in fetched:
        return fetched[url]
    if url[:5].lower() == "file:":
        raise BadRequest(NO_FILES, "messages")
    if url[:5].lower() != "data:":
        try:
            check_host(None, ())
        except ImageError as error:
            raise BadRequest(str(error), "messages") from None
    head, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:[\w.+/-]{0,64};base64", head, re.IGNORECASE):
        raise BadRequest(NOT_BASE64, "messages")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(BAD_BASE64, "messages") from None
