"""What an OpenAI-compatible server says: an answer, piece by piece, and what went wrong."""

from dataclasses import dataclass, field
from typing import Any

from nmm_serve.engines.base import Output, Timing


@dataclass
class Answer:
    """One streamed answer on its way."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Any = None

    def add(self, chunk: Any, now: float) -> None:
        self.usage = getattr(chunk, "usage", None) or self.usage
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        piece = (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
        ids = getattr(choice, "token_ids", None) or []
        self.text += piece
        self.token_ids += ids
        self.token_s += [now] * (len(ids) or bool(piece))
        self.logprobs += chosen_logprobs(choice.logprobs)
        self.finish_reason = choice.finish_reason or self.finish_reason

    def output(self, e2e_s: float) -> Output:
        if self.finish_reason not in ("stop", "length"):
            return Output(text="", finish_reason="error", error=f"the server ended with {self.finish_reason!r}")
        return Output(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            num_prompt_tokens=self.usage.prompt_tokens if self.usage else 0,
            num_tokens=self.usage.completion_tokens if self.usage else len(self.token_s),
            logprobs=tuple(self.logprobs) or None,
            timing=Timing(ttft_s=self.token_s[0] if self.token_s else None, e2e_s=e2e_s, token_s=tuple(self.token_s)),
        )


def chosen_logprobs(logprobs: Any) -> list[float]:
    """Chat answers carry a list of entries, completions parallel lists."""
    if logprobs is None:
        return []
    if getattr(logprobs, "content", None):
        return [entry.logprob for entry in logprobs.content]
    return list(getattr(logprobs, "token_logprobs", None) or [])


def server_message(error: Any) -> str:
    """The first line of what the server says went wrong."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    lines = str(message or getattr(error, "message", "") or error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def retry_after(error: Any) -> float | None:
    """Seconds that the server asks to wait; None when it does not say, or gives a date."""
    try:
        return max(0.0, float(error.response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
