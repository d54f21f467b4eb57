"""The scheduler by itself: what it does when the model fails, and how it cuts prompts."""

import queue

import numpy as np
import pytest
from exported import exported
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnxruntime")

from nmm_serve.engines.base import SamplingParams
from nmm_serve.engines.decoding import Decoding
from nmm_serve.onnx.manifest import read_manifest
from nmm_serve.onnx.runtime import Runtime
from nmm_serve.prompt import Prompt, TokenizerFile
from nmm_serve.serving.answers import TextStream
from nmm_serve.serving.scheduler import Busy, Job, Scheduler, next_piece


@pytest.fixture(scope="module")
def encoder():
    return TokenizerFile(exported("early"), 8, 64)


@pytest.fixture
def scheduler():
    found = Scheduler(Runtime(exported("early"), slots=2, threads=1), max_waiting=4)
    yield found
    found.stop()


class Asker:
    """One job and the events that came of it."""

    def __init__(self, encoder, text="what is", **sampling):
        params = SamplingParams(**{"max_tokens": 6, "ignore_eos": True} | sampling)
        self.events = queue.Queue()
        self.job = Job(
            prompt=encoder.prompt_of_text(text), sampling=params, notify=self.events.put,
            decoding=Decoding(params, encoder.decode, 2),
        )  # fmt: skip

    def last(self):
        while True:
            event = self.events.get(timeout=20)
            if event.finish_reason:
                return event


def test_more_jobs_than_slots_all_end_alike(scheduler, encoder):
    askers = [Asker(encoder, max_tokens=3 + i) for i in range(4)]
    for asker in askers:
        scheduler.submit([asker.job])
    assert [asker.last().finish_reason for asker in askers] == ["length"] * 4
    assert [asker.job.decoding.tokens for asker in askers] == [askers[3].job.decoding.tokens[: 3 + i] for i in range(4)]


def test_a_step_that_fails_ends_its_batch_only(scheduler, encoder, monkeypatch):
    decode = scheduler.runtime.decode
    faults = iter([RuntimeError("fault")])

    def broken(tokens):
        for fault in faults:
            raise fault
        return decode(tokens)

    monkeypatch.setattr(scheduler.runtime, "decode", broken)
    first = Asker(encoder)
    scheduler.submit([first.job])
    assert first.last().error == "the model failed on this batch; try again"
    second = Asker(encoder)
    scheduler.submit([second.job])
    assert second.last().finish_reason == "length"
    assert (first.job.outcome, second.job.outcome, scheduler.failure) == ("error", "success", None)


def test_poisoned_logits_are_an_error(scheduler, encoder, monkeypatch):
    bad = np.full((1, 320), np.nan, np.float32)
    monkeypatch.setattr(scheduler.runtime, "decode", lambda tokens: bad)
    asker = Asker(encoder)
    scheduler.submit([asker.job])
    assert "NaN or infinite logits" in asker.last().error


def test_a_cancelled_job_frees_its_slot(scheduler, encoder):
    gone = [Asker(encoder, max_tokens=400) for _ in range(3)]
    for asker in gone:
        scheduler.submit([asker.job])
        asker.job.cancel()
    stays = Asker(encoder)
    scheduler.submit([stays.job])
    assert stays.last().finish_reason == "length"
    assert {asker.job.outcome for asker in gone} == {"aborted"}


def test_the_line_ends_somewhere(scheduler, encoder):
    with scheduler._wake:  # the thread cannot take anything meanwhile
        scheduler.submit([Asker(encoder).job for _ in range(6)])
        with pytest.raises(Busy):
            scheduler.submit([Asker(encoder).job])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12))
def test_pieces_are_the_prompt_and_no_image_is_cut(shape, size):
    """`shape`: runs of text, and images of up to nine patches between them."""
    manifest = read_manifest(exported("early"))
    mark, p = manifest.image_token_id, manifest.patch_size
    ids, pixels = [7], []
    for i, length in enumerate(shape):
        if i % 2 and length:
            ids += [3, *[mark] * length, 5]
            pixels.append(np.zeros((p, p * length, 3), np.uint8))
        else:
            ids += [7] * length
    prompt, start, images, seen = Prompt(ids, tuple(pixels)), 0, 0, []
    while start < len(ids):
        end, taken = next_piece(prompt, start, images, manifest, size)
        assert end > start
        assert sum(t.shape[1] // p for t in taken) == ids[start:end].count(mark)
        assert end - start <= size or ids[start] == mark
        seen += ids[start:end]
        start, images = end, images + len(taken)
    assert seen == ids
    assert images == len(pixels)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_streamed_text_is_the_whole_text(encoder, text, stops):
    """Characters of several tokens, and stop strings over several tokens, are never shown in half."""
    params = SamplingParams(max_tokens=1000, stop=tuple(stops))
    tokens = encoder.encode_text(text)
    stream, shown, decoding = TextStream(encoder.tokenizer, params.stop), "", Decoding(params, encoder.decode, None)
    for token in tokens:
        logits_V = np.zeros(320, np.float32)
        logits_V[token] = 1
        decoding.step(logits_V, 0.0)
        if decoding.finish_reason:
            break
        shown += stream.add(token)
        assert "\ufffd" not in shown or "\ufffd" in text
    if tokens:
        whole = decoding.output(1, 0.0).text
        assert whole.startswith(shown)
        assert shown + stream.rest(whole) == whole
