"""Ask an engine about images: a stream of requests in, answers by item out, each kept as it comes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nmm_serve.engines.base import Engine, Output, Request, SamplingParams
from nmm_serve.engines.occupancy import Occupancy
from nmm_serve.evals.answers import Answers
from nmm_serve.evals.datasets import Id

Sample = tuple[Id, Path, str]
"""Item id, image file, prompt."""


def ask(
    engine: Engine, samples: Sequence[Sample], max_tokens: int, progress: Callable[[int], None], kept: Answers
) -> tuple[dict[Id, Output], dict[str, Any]]:
    """Greedy answers by item id, and how full the engine was kept; what was kept from an earlier run is not asked
    again.

    Images are read as the engine gets to them. One that cannot be read is a failed answer, like any other request that
    fails in the engine.
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    occupancy = Occupancy()

    def stream(waiting: list[int]) -> Iterator[tuple[int, Output]]:
        for index, output in engine.stream((_request(samples[i], sampling) for i in waiting), occupancy):
            progress(1)
            yield index, output

    asked = {"decoding": asdict(sampling)}
    items = [(kept.key("generate", asked | {"text": words}, [image]), item_id) for item_id, image, words in samples]
    answers = kept.complete(items, stream, progress)
    return {item_id: answer for (_, item_id), answer in zip(items, answers, strict=True)}, occupancy.section()


def _request(sample: Sample, sampling: SamplingParams) -> Request:
    _, image, words = sample
    content = [{"type": "image"}, {"type": "text", "text": words}]
    return Request(messages=[{"role": "user", "content": content}], images=(image,), sampling=sampling)
