"""One request on its way, in the engines that choose tokens themselves: sampling, stop strings, when it ends.

Legend: V vocabulary.
"""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from nmm_serve.engines.base import Output, SamplingParams, Timing
from nmm_serve.errors import ConfigError, NMMError, PromptError


def check_room(num_prompt_tokens: int, max_tokens: int, context_length: int) -> None:
    """Raises PromptError for a prompt that leaves no room for the new tokens that were asked for."""
    if context_length - num_prompt_tokens < max_tokens:
        raise PromptError(
            f"the prompt has {num_prompt_tokens} tokens and {max_tokens} new ones were asked "
            f"for, but the model's context is {context_length}; shorten the prompt or ask for fewer"
        )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In double precision, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Decoding:
    """The tokens of one request so far.

    Args:
        decode: token ids to text, special tokens left out.
        eos: end token or tokens.

    Raises ConfigError for a temperature or top_p out of range.
    """

    def __init__(self, params: SamplingParams, decode: Callable[[Sequence[int]], str], eos: int | Sequence[int] | None):
        if not (0 <= params.temperature < math.inf and 0 < params.top_p <= 1):
            raise ConfigError(
                f"temperature {params.temperature} must be >= 0 and top_p {params.top_p} in (0, 1]; 0 is greedy"
            )
        self.decode = decode
        self.params = params
        self.eos = set(eos) if isinstance(eos, Sequence) else {eos}
        # numpy refuses negative seeds, which clients may send
        self.generator = np.random.default_rng(None if params.seed is None else params.seed % 2**64)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.best: list[tuple[int, float]] = []
        """The likeliest token at each step, and its log-probability."""
        self.token_s: list[float] = []
        self.finish_reason: str | None = None
        self.text: str | None = None

    def step(self, logits_V: np.ndarray, begin: float) -> int:
        """Choose the next token; a finished request repeats its last one, which nobody reads."""
        if self.finish_reason:
            return self.tokens[-1]
        if not np.isfinite(logits_V).all():
            raise NMMError("the model gave NaN or infinite logits; its weights are damaged")
        token = self.choose(logits_V)
        self.tokens.append(token)
        self.token_s.append(time.perf_counter() - begin)
        if self.params.logprobs:
            logprobs_V = log_softmax(logits_V)
            self.logprobs.append(float(logprobs_V[token]))
            self.best.append((int(logprobs_V.argmax()), float(logprobs_V.max())))
        if (token in self.eos and not self.params.ignore_eos) or self.hit_stop_string():
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.params.max_tokens:
            self.finish_reason = "length"
        return token

    def choose(self, logits_V: np.ndarray) -> int:
        if self.params.temperature == 0:
            return int(logits_V.argmax())
        # the largest logit comes off first: a temperature near 0 then tends to greedy instead of overflowing
        with np.errstate(over="ignore"):
            scaled_V = (logits_V.astype(np.float64) - logits_V.max()) / self.params.temperature
        probs_V = np.exp(scaled_V)
        if self.params.top_p < 1:
            order_V = np.argsort(-probs_V, kind="stable")
            sorted_V = probs_V[order_V]
            beyond_V = np.cumsum(sorted_V) - sorted_V >= self.params.top_p * sorted_V.sum()
            probs_V[order_V[beyond_V]] = 0.0
        cumulative_V = np.cumsum(probs_V)
        return int(np.searchsorted(cumulative_V, self.generator.random() * cumulative_V[-1], side="right"))

    def hit_stop_string(self) -> bool:
        if not self.params.stop:
            return False
        text = self.decode(self.tokens)
        ends = [text.index(stop) for stop in self.params.stop if stop in text]
        if ends:
            self.text = text[: min(ends)]
        return bool(ends)

    def output(self, num_prompt_tokens: int, preprocess_s: float, **parts: float) -> Output:
        """`parts`: the other durations of `Timing` that the engine saw."""
        return Output(
            text=self.decode(self.tokens) if self.text is None else self.text,
            token_ids=tuple(self.tokens),
            finish_reason=self.finish_reason or "length",
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=len(self.tokens),
            logprobs=tuple(self.logprobs) if self.params.logprobs else None,
            timing=Timing(
                ttft_s=self.token_s[0],
                e2e_s=self.token_s[-1],
                preprocess_s=preprocess_s,
                token_s=tuple(self.token_s),
                **parts,
            ),
        )
