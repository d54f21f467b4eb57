"""Counting agreement between two engines' answers."""

import json

from nmm_serve.engines.base import Output
from nmm_serve.engines.parity import compare


def answer(tokens, logprobs=None, error=None):
    return Output(text="", token_ids=tuple(tokens), logprobs=logprobs, error=error)


def test_equal_answers():
    parity = compare([answer([1, 2], (-1.0, -2.0))], [answer([1, 2], (-1.5, -2.25))])
    assert (parity.num_requests, parity.num_equal, parity.num_tokens) == (1, 1, 2)
    assert parity.max_logprob_diff == 0.5
    assert parity.divergences == parity.errors == ()


def test_divergence_is_named_and_ends_the_comparison():
    expected, actual = answer([1, 2, 3], (-1.0, -2.0, -9.0)), answer([1, 5, 3], (-1.25, -2.5, -1.0))
    parity = compare([expected], [actual])
    assert (parity.num_equal, parity.num_tokens, parity.max_logprob_diff) == (0, 1, 0.25)
    (divergence,) = parity.divergences
    assert (divergence.request, divergence.position) == (0, 1)
    assert (divergence.expected_token, divergence.actual_token) == (2, 5)
    assert (divergence.expected_logprob, divergence.actual_logprob) == (-2.0, -2.5)


def test_one_answer_longer_than_the_other():
    parity = compare([answer([1, 2])], [answer([1])])
    assert parity.num_equal == 0
    assert (parity.divergences[0].expected_token, parity.divergences[0].actual_token) == (2, None)


def test_failed_requests_are_never_equal():
    failed = answer([], error="no room")
    parity = compare([failed, answer([1]), failed], [answer([1]), failed, failed])
    assert (parity.num_equal, len(parity.errors), parity.divergences) == (0, 3, ())
    assert "no room" in parity.errors[0]


def test_record_is_json():
    json.dumps(compare([answer([1])], [answer([2])]).to_record())
