"""What the vLLM engine works on: one prompt to answer, or one continuation to score."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nmm_serve.chat import message_parts
from nmm_serve.engines.base import Output, Request, Score, ScoreRequest, Timing
from nmm_serve.errors import NMMError, PromptError

if TYPE_CHECKING:
    from vllm import SamplingParams as VLLMSamplingParams

    from nmm_serve.engines.vllm import VLLMEngine

Prepared = tuple[list[int], Sequence[Any], "VLLMSamplingParams"]
"""Token ids with one placeholder an image, the images, and vLLM's sampling parameters."""


class Generation:
    """One request on its way."""

    def __init__(self, engine: "VLLMEngine", position: int, request: Request):
        self.engine = engine
        self.position = position
        self.request = request
        self.begin = 0.0
        self.preprocess_s = 0.0
        self.prompt: Any = None
        """vLLM's own request, made by `VLLMEngine.prepare`; None when that failed."""
        self.num_prompt_tokens = 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.token_s: list[float] = []
        self.finish_reason = "error"
        self.error: str | None = None

    def prepare(self) -> Prepared:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request, processor = self.request, self.engine.encoder
        if request.messages is not None:
            ids = processor.parts_to_ids(part for _, part in message_parts(request.messages, True))
        else:
            assert request.prompt is not None
            ids = processor.prompt_ids(request.prompt)
        sampling = request.sampling
        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop),
            ignore_eos=sampling.ignore_eos,
            logprobs=0 if sampling.logprobs else None,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.DELTA,
        )
        return ids, request.images, params

    def check(self, num_prompt_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        max_tokens, context_length = self.request.sampling.max_tokens, self.engine.context_length
        if num_prompt_tokens + max_tokens > context_length:
            raise PromptError(
                f"the prompt has {num_prompt_tokens} tokens and {max_tokens} new ones were asked for, "
                f"but the model's context is {context_length}; shorten the prompt or ask for fewer"
            )

    def fail(self, error: Exception) -> None:
        self.error = reason(error)

    def add(self, output: Any, now: float) -> None:
        (completion,) = output.outputs
        self.tokens += completion.token_ids
        self.token_s += [now - self.begin] * len(completion.token_ids)
        if completion.logprobs:
            self.logprobs += [
                choices[token].logprob for token, choices in zip(completion.token_ids, completion.logprobs, strict=True)
            ]
        if output.finished:
            self.finish_reason = completion.finish_reason

    def result(self) -> Output:
        if self.error is not None:
            return Output(text="", finish_reason="error", error=self.error)
        text = self.engine.processor.decode(self.tokens)
        ends = [text.index(stop) for stop in self.request.sampling.stop if stop in text]
        return Output(
            text=text[: min(ends)] if ends else text,
            token_ids=tuple(self.tokens),
            finish_reason="stop" if ends else self.finish_reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_tokens=len(self.tokens),
            logprobs=tuple(self.logprobs) if self.request.sampling.logprobs else None,
            timing=Timing(
                ttft_s=self.token_s[0],
                e2e_s=self.token_s[-1],
                preprocess_s=self.preprocess_s,
                token_s=tuple(self.token_s),
            ),
        )


class Scoring:
    """One log-likelihood on its way: all but the last token are the prompt, the last is looked up as the next one."""

    def __init__(self, engine: "VLLMEngine", position: int, request: ScoreRequest):
        self.engine = engine
        self.position = position
        self.request = request
        self.begin = self.preprocess_s = 0.0
        self.prompt: Any = None
        self.target = engine.processor.continuation_ids(request.continuation)
        self.logprobs: list[float] = []
        self.is_greedy = True

    def prepare(self) -> Prepared:
        from vllm import SamplingParams

        if not self.target:
            raise PromptError("an empty continuation has no likelihood")
        ids = self.engine.encoder.prompt_ids(self.request.context) + self.target[:-1]
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=0 if len(self.target) > 1 else None,
            logprobs=1,
            logprob_token_ids=[self.target[-1]],
        )
        return ids, self.request.images, params

    def check(self, num_prompt_tokens: int) -> None:
        if num_prompt_tokens + 1 > self.engine.context_length:
            raise PromptError(
                f"context and continuation have {num_prompt_tokens + 1} tokens, "
                f"over the model's context of {self.engine.context_length}"
            )

    def fail(self, error: Exception) -> None:
        raise error if isinstance(error, NMMError) else PromptError(reason(error)) from error

    def add(self, output: Any, now: float) -> None:
        if not output.finished:
            return
        positions = (output.prompt_logprobs or [])[-len(self.target) + 1 :] if len(self.target) > 1 else []
        for token, choices in zip(self.target[:-1], positions, strict=True):
            self.logprobs.append(choices[token].logprob)
            self.is_greedy &= choices[token].rank == 1
        (completion,) = output.outputs
        self.logprobs.append(completion.logprobs[0][self.target[-1]].logprob)
        self.is_greedy &= completion.token_ids[0] == self.target[-1]

    def result(self) -> Score:
        return Score(logprob=sum(self.logprobs), is_greedy=self.is_greedy, num_tokens=len(self.target))


Task = Generation | Scoring


def reason(error: BaseException) -> str:
    """The first line of an error's cause; validation libraries wrap it in several lines of their own."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines()]
    for line in lines:
        if "Value error, " in line:
            return line.split("Value error, ", 1)[1].split(" [type=", 1)[0]
    return lines[0]
