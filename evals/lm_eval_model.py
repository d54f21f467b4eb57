"""Our engines as a model of lm-eval 0.4.13, under the name `nmm`: any engine of the project, or a server's URL.

    import nmm_serve.evals.lm_eval_model
    lm_eval.simple_evaluate("nmm", model_args={"model": "ckpt/", "engine": "vllm"}, tasks=[...])

`nmm-eval text` does that and more: see `nmm_serve.evals.text`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# lm-eval fills its registry of models only while that is empty: with ours in it first, `hf` and all others are unknown
import lm_eval.models  # noqa: F401
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nmm_serve.chat import CHAT_TEMPLATE
from nmm_serve.engines import open_engine
from nmm_serve.engines.base import Engine, Output, Request, SamplingParams, Score, ScoreRequest
from nmm_serve.engines.openai import OpenAIEngine
from nmm_serve.errors import ConfigError, EngineError, ImageError, NMMError, PromptError
from nmm_serve.evals.answers import Answers
from nmm_serve.evals.lm_eval_asking import CHUNK, Asking
from nmm_serve.evals.lm_eval_prompts import ChatContext, Ids, chat_messages, prompts_for
from nmm_serve.evals.lm_eval_requests import images_of, sampling_of
from nmm_serve.evals.records import describe_model

DEFAULT_NEW_TOKENS = 256
"""lm-eval's own, for tasks that do not say."""

StartTask = Callable[[str, int], Callable[[int], None]]


def _no_progress(_name: str, _total: int) -> Callable[[int], None]:
    return lambda _count: None


@dataclass(frozen=True)
class Failure:
    """An item without an answer."""

    task: str
    doc_id: int
    error: str


@register_model("nmm")
class NMM(TemplateLM):
    """An lm-eval model over an engine.

    Scores as lm-eval 0.4.13 states: see `lm_eval_prompts.Prompts.pairs` for the boundary. A text too long for the model
    loses tokens at its beginning until the context, without the last token, has `max_length`; `truncated` counts the
    items. A context with images is never cut, since half an image is none.

    Args:
        model: checkpoint directory, URL, or an open engine.
        engine: torch, vllm, ...; default as in `open_engine`.
        batch_size, max_batch_size, device: what lm-eval gives every model. Engines batch by themselves, so only the
            torch engine takes a device, and a batch size that is a number.
        seed: of requests that sample.
        failures: where items that failed are listed. Their answers are then NaN or empty, which must not be scored.
            Without a list, the first one raises.
        kept, versions, chunk_size: as in `Asking`; with `kept` None nothing is kept.

    Raises EngineError, ConfigError or CheckpointError for a model that cannot be opened.
    """

    MULTIMODAL = True

    def __init__(
        self,
        model: str | Engine,
        engine: str | None = None,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        failures: list[Failure] | None = None,
        start_task: StartTask = _no_progress,
        kept: Answers | None = None,
        versions: Mapping[str, Any] | None = None,
        chunk_size: int = CHUNK,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            if engine is None or engine == "torch":
                if batch_size is not None and str(batch_size).isdigit():
                    options["batch_size"] = int(batch_size)
                options |= {"device": device} if device else {}
            model = open_engine(model, engine, **options)
        self.engine = model
        self.seed = seed
        self.failures = failures
        self.start_task = start_task
        self.ask = Asking(kept or Answers(Path(), "text", 0, None), versions or {}, chunk_size)
        self.prompts = prompts_for(model)
        self.truncated: dict[str, set[int]] = defaultdict(set)
        processor = getattr(model, "processor", None)
        self.tokenizer = processor.tokenizer if processor is not None else None

    def cannot(self, task: Any, chat_template: bool) -> str | None:
        """Why this engine cannot do an lm-eval task at all; None where it can."""
        kind, has_images = task.OUTPUT_TYPE, getattr(task, "MULTIMODAL", False)
        if kind == "loglikelihood_rolling" and (self.prompts is None or has_images):
            return "the server does not tell its tokens" if self.prompts is None else "it has images"
        if not isinstance(self.engine, OpenAIEngine):
            return None
        if kind == "generate_until":
            return "a server takes images in chats only" if has_images and not chat_template else None
        if has_images or chat_template:
            return "a server scores plain text only, no chats or images"
        return None

    # ---- what lm-eval asks of a model

    @property
    def max_length(self) -> int:
        """Tokens that the model reads before the last one that it scores.

        Two less than its context: a server must be left room for one new token after the text that it scores, and a
        score must not hang on the engine.
        """
        length = getattr(self.engine, "context_length", None)
        if length is None:
            raise EngineError(
                f"{self.engine.model} does not tell its context length, so long texts cannot be cut to it"
            )
        return length - 2

    @property
    def max_gen_toks(self) -> int:
        """New tokens for a task that does not say: lm-eval's 256, or half the context where that is shorter."""
        length = getattr(self.engine, "context_length", None)
        return DEFAULT_NEW_TOKENS if length is None else min(DEFAULT_NEW_TOKENS, length // 2)

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer is None:
            raise EngineError(f"{self.engine.model} does not tell its end token")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a document starts after."""
        return self.tok_encode("")[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        if self.prompts is None:
            raise EngineError(f"{self.engine.model} does not tell its tokens")
        if add_special_tokens is False:
            return self.prompts.texts([string])[0]
        (ids,) = self.prompts.contexts([(string, 0)])
        return _value(ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._score_request(context, target) for _, context, target in requests]
        scores = self._scores(asked, [None] * len(asked), lambda _: None)
        return [(s.logprob, s.is_greedy) for s in map(_value, scores)]

    @property
    def tokenizer_name(self) -> str:
        return str(self.described["hash"])

    @cached_property
    def described(self) -> dict[str, Any]:
        """Reads the whole checkpoint."""
        return describe_model(self.engine.model)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str):
            raise ConfigError(f"chat template {chat_template!r}: the models have one template; give no name")
        return CHAT_TEMPLATE if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return ChatContext([dict(message) for message in chat_history], open_end=not add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        return {
            "model_sha": self.described["hash"],
            "model_num_parameters": self.described["parameters"],
            "engine": {"name": self.engine.name, **self.engine.describe()},
        }

    # ---- likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """`(log-probability in nats, is it what greedy decoding gives)` of each continuation."""
        asked: list[ScoreRequest | NMMError]
        if self.prompts is None:
            asked = [ScoreRequest(context=r.args[0], continuation=r.args[1], images=images_of(r)) for r in requests]
        else:
            pairs = self.prompts.pairs([(r.args[0], r.args[1], len(images_of(r))) for r in requests])
            asked = [
                pair if isinstance(pair, NMMError) else self._score_request(*pair, request)
                for pair, request in zip(pairs, requests, strict=True)
            ]
        scores = self._scores(asked, requests, self.start_task("text: likelihoods", len(requests)))
        return [
            self._answer("loglikelihood", request, score, lambda s: (s.logprob, s.is_greedy), (math.nan, False))
            for request, score in zip(requests, scores, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole document after `<|bos|>`, every token scored once."""
        if self.prompts is None:
            raise EngineError(f"{self.engine.model} does not tell its tokens, so it cannot score whole documents")
        asked: list[ScoreRequest | NMMError] = []
        owners: list[int] = []
        bos = self.prefix_token_id
        for owner, (request, ids) in enumerate(
            zip(requests, self.prompts.texts([r.args[0] for r in requests]), strict=True)
        ):
            refusal = _refuse_document(request, ids)
            windows = [refusal] if refusal else map(
                make_disjoint_window, get_rolling_token_windows(ids, bos, self.max_length, context_len=1)
            )  # fmt: skip
            for window in windows:
                asked.append(window if isinstance(window, NMMError) else self._score_request(*window))
                owners.append(owner)
        windows_of = [requests[owner] for owner in owners]
        scores = self._scores(asked, windows_of, self.start_task("text: documents", len(asked)))
        sums: list[float | NMMError] = [0.0] * len(requests)
        for owner, score in zip(owners, scores, strict=True):
            before = sums[owner]
            if not isinstance(before, NMMError):
                sums[owner] = score if isinstance(score, NMMError) else before + score.logprob
        return [
            self._answer("loglikelihood_rolling", request, total, lambda t: t, math.nan)
            for request, total in zip(requests, sums, strict=True)
        ]

    def _score_request(self, context: Ids, target: Ids, request: Instance | None = None) -> ScoreRequest | PromptError:
        """Cut on the left what is too long, as lm-eval does."""
        images = images_of(request) if request else []
        if not target:
            return PromptError("the continuation has no token of its own, so it has no likelihood")
        if len(target) > self.max_length:
            return PromptError(
                f"the continuation has {len(target)} tokens, over the {self.max_length} that the model can score"
            )
        excess = len(context) + len(target) - (self.max_length + 1)
        if excess > 0 and not images:
            context = context[excess:]
            self._count_truncation(request)
        return ScoreRequest(context=context, continuation=target, images=images)

    def _count_truncation(self, request: Instance | None) -> None:
        if request is not None:
            self.truncated[str(request.task_name)].add(int(request.doc_id or 0))

    def _scores(
        self,
        asked: Sequence[ScoreRequest | NMMError],
        owners: Sequence[Instance | None],
        progress: Callable[[int], None],
    ) -> list[Score | NMMError]:
        """Scores in order, asked for longest first so that a batch holds texts of a length."""

        def ask(requests: list[ScoreRequest]) -> list[Score | NMMError]:
            scores = self._score_chunk(requests)
            progress(len(requests))
            return scores

        return self.ask(asked, owners, ask, progress, order=lambda r: -len(r.context) - len(r.continuation))

    def _score_chunk(self, requests: list[ScoreRequest]) -> list[Score | NMMError]:
        """One bad prompt or image fails alone. An engine that is broken ends the evaluation (EngineError)."""
        try:
            return list(self.engine.loglikelihood(requests))
        except (PromptError, ImageError) as error:
            if len(requests) == 1:
                return [error]
            half = len(requests) // 2
            return self._score_chunk(requests[:half]) + self._score_chunk(requests[half:])

    # ---- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context, up to the first of the task's stop strings."""
        sampled = [sampling_of(request.args[1], self.max_gen_toks, self.seed + i) for i, request in enumerate(requests)]
        prompts: list[Any] = [request.args[0] for request in requests]
        if self.prompts is not None:
            local = [i for i, request in enumerate(requests) if not self._as_messages(request)]
            made = self.prompts.contexts([(requests[i].args[0], len(images_of(requests[i]))) for i in local])
            for i, ids in zip(local, made, strict=True):
                prompts[i] = ids
        asked: list[Request | NMMError] = [
            self._request(request, prompt, sampling)
            for request, prompt, sampling in zip(requests, prompts, sampled, strict=True)
        ]
        progress = self.start_task("text: answers", len(requests))
        answers: list[str] = []
        for request, output in zip(requests, self._outputs(asked, requests, progress), strict=True):
            answers.append(self._answer("generate_until", request, output, lambda o: o.text, ""))
        return answers

    def _as_messages(self, request: Instance) -> bool:
        """A server knows its own chat template, and takes images in messages only."""
        return isinstance(self.engine, OpenAIEngine) and isinstance(request.args[0], ChatContext)

    def _request(self, request: Instance, prompt: Any, sampling: SamplingParams) -> Request | NMMError:
        images = images_of(request)
        if isinstance(prompt, NMMError):
            return prompt
        if isinstance(prompt, ChatContext):
            if prompt.open_end:
                return PromptError(
                    "a server cannot go on with a begun answer (gen_prefix); evaluate the checkpoint itself"
                )
            try:
                return Request(messages=chat_messages(prompt, len(images)), images=images, sampling=sampling)
            except PromptError as error:
                return error
        if images and isinstance(self.engine, OpenAIEngine):
            return PromptError("a server takes images in chats only; add --apply-chat-template")
        if not images and not isinstance(prompt, str):
            room = self.max_length + 2 - sampling.max_tokens
            if room < 1:
                return PromptError(
                    f"{sampling.max_tokens} new tokens were asked for, but the model's context is "
                    f"{self.max_length + 2}; ask for fewer, for example with --gen-kwargs max_gen_toks=32"
                )
            if len(prompt) > room:
                prompt = prompt[-room:]
                self._count_truncation(request)
        return Request(prompt=prompt, images=images, sampling=sampling)

    def _outputs(
        self,
        asked: Sequence[Request | NMMError],
        owners: Sequence[Instance],
        progress: Callable[[int], None],
    ) -> list[Output | NMMError]:
        def ask(requests: list[Request]) -> list[Output | NMMError]:
            outputs = self.engine.generate(requests, progress)
            return [output if output.error is None else PromptError(output.error) for output in outputs]

        return self.ask(asked, owners, ask, progress)

    def _answer(self, kind: str, request: Instance, answer: Any, value: Callable[[Any], Any], without: Any) -> Any:
        if isinstance(answer, NMMError):
            if self.failures is None:
                raise answer
            self.failures.append(Failure(str(request.task_name), int(request.doc_id or 0), str(answer)))
            return without
        # all arguments, images included: with fewer, lm-eval would never find the answer again
        self.cache_hook.add_partial(kind, request.args, value(answer))
        return value(answer)


def _refuse_document(request: Instance, ids: Ids) -> PromptError | None:
    if images_of(request):
        return PromptError("a document with images has no rolling likelihood")
    return None if ids else PromptError("an empty document has no likelihood")


def _value(result: Any) -> Any:
    if isinstance(result, NMMError):
        raise result
    return result
