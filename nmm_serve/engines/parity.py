"""Do two engines say the same? Compares greedy tokens and their log-probabilities on the same requests."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nmm_serve.engines.base import Engine, Output, Request


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Where a request's answers part: new tokens `position` on, and the log-probability each engine gave its choice."""

    request: int
    position: int
    expected_token: int | None
    actual_token: int | None
    expected_logprob: float | None
    actual_logprob: float | None


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Result of `compare`. Log-probabilities are compared on each request up to where the tokens part."""

    num_requests: int
    num_equal: int
    num_tokens: int
    """Tokens that both engines chose alike."""
    max_logprob_diff: float
    """Largest difference in nats between the log-probabilities of those tokens."""
    divergences: tuple[Divergence, ...]
    errors: tuple[str, ...]
    """Requests that failed in either engine; they are not equal."""

    def to_record(self) -> dict[str, Any]:
        return asdict(self)


def compare(expected: Sequence[Output], actual: Sequence[Output]) -> Parity:
    """Compare answers to the same requests, made with `logprobs=True`."""
    assert len(expected) == len(actual)
    divergences, errors, diffs, num_tokens = [], [], [0.0], 0
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a.error or b.error:
            errors.append(f"request {index}: {a.error or 'ok'} / {b.error or 'ok'}")
            continue
        equal = 0
        while equal < min(len(a.token_ids), len(b.token_ids)) and a.token_ids[equal] == b.token_ids[equal]:
            equal += 1
        num_tokens += equal
        if a.logprobs and b.logprobs:
            diffs += [abs(x - y) for x, y in zip(a.logprobs[:equal], b.logprobs[:equal], strict=True)]
        if a.token_ids != b.token_ids:
            divergences.append(
                Divergence(
                    request=index,
                    position=equal,
                    expected_token=at(a.token_ids, equal),
                    actual_token=at(b.token_ids, equal),
                    expected_logprob=at(a.logprobs, equal),
                    actual_logprob=at(b.logprobs, equal),
                )
            )
    return Parity(
        num_requests=len(expected),
        num_equal=len(expected) - len(divergences) - len(errors),
        num_tokens=num_tokens,
        max_logprob_diff=max(diffs),
        divergences=tuple(divergences),
        errors=tuple(errors),
    )


def compare_engines(reference: Engine, candidate: Engine, requests: Sequence[Request]) -> Parity:
    """Answer the requests greedily with both engines, log-probabilities included, and compare."""
    requests = [replace(r, sampling=replace(r.sampling, temperature=0.0, logprobs=True)) for r in requests]
    return compare(reference.generate(requests), candidate.generate(requests))


def at(values: Sequence[Any] | None, index: int) -> Any:
    return values[index] if values is not None and index < len(values) else None
