"""In-process engines with known answers, and tiny evaluation sets, so that scores can be checked by hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from nmm_serve.engines.base import InChunks, Output, Progress, Request, Score, ScoreRequest, Timing
from nmm_serve.errors import ImageError
from nmm_serve.images import load_image

Answer = Callable[[Request], Output]


class FakeEngine(InChunks):
    """Answers by a function of the request. Keeps the sizes of the batches it was given."""

    name = "fake"

    def __init__(self, answer: Answer, model: str = "fake-model", batch_size: int = 1) -> None:
        self.model = model
        self.batch_size = batch_size
        self._answer = answer
        self.batches: list[int] = []
        self.closed = False

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        self.batches.append(len(requests))
        outputs = []
        for request in requests:
            try:
                outputs.append(says("") if request.messages is None else self._answer(request))  # a text task's prompt
            except ImageError as error:
                outputs.append(failed(str(error)))
            if progress:
                progress(1)
        return outputs

    def loglikelihood(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        if progress:
            progress(len(requests))
        return [
            Score(logprob=-float(len(r.continuation)), is_greedy=False, num_tokens=len(r.continuation))
            for r in requests
        ]

    def describe(self) -> dict[str, Any]:
        return {"dtype": "none", "device": "none"}

    def close(self) -> None:
        self.closed = True


def prompt_text(request: Request) -> str:
    assert request.messages is not None
    return next(part["text"] for part in request.messages[0]["content"] if part["type"] == "text")


def image_tag(request: Request) -> int:
    """The red value of the image's middle pixel: `write_dataset` paints each image with its own."""
    image = load_image(*request.images)
    red = image.getpixel((image.width // 2, image.height // 2))
    assert isinstance(red, tuple)
    return int(red[0])


def says(text: str, num_tokens: int = 3) -> Output:
    """An answer whose token times are 0.1 s, then 0.05 s apart."""
    times = tuple(0.1 + 0.05 * i for i in range(num_tokens))
    timing = Timing(ttft_s=times[0], e2e_s=times[-1], token_s=times)
    return Output(text=text, num_tokens=num_tokens, timing=timing)


def failed(error: str = "the engine broke") -> Output:
    return Output(text="", finish_reason="error", error=error)


def put_java(folder: Path, monkeypatch: Any, script: str) -> str:
    """Put a `java` of our own, a shell script, first on the PATH; gives back where it lies."""
    java = folder / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return str(java)


COLOURS = ("red", "green", "blue", "white")


def write_dataset(folder: Path, images: int = 6, split: str = "val") -> Path:
    """`images` pictures, two questions each: a colour that changes with the image, and a yes/no (two thirds `yes`).

    Image i is painted with red value 20 * i, so an oracle can tell them apart.
    """
    (folder / "images" / split).mkdir(parents=True)
    listed, captions, questions, annotations = [], [], [], []
    for i in range(images):
        image_id = 100 + i
        name = f"{image_id:012d}.png"
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / "images" / split / name)
        listed.append({"id": image_id, "file_name": name, "width": 8, "height": 8})
        for k, text in enumerate(references(i)):
            captions.append({"id": image_id * 10 + k, "image_id": image_id, "caption": text})
        for k, (question, answer, answer_type) in enumerate(
            (("What colour is it?", colour(i), "other"), ("Is it big?", big(i), "yes/no"))
        ):
            question_id = image_id * 10 + k
            questions.append({"question_id": question_id, "image_id": image_id, "question": question})
            annotations.append(
                {
                    "question_id": question_id,
                    "image_id": image_id,
                    "question_type": " ".join(question.lower().split()[:2]),
                    "answer_type": answer_type,
                    "multiple_choice_answer": answer,
                    "answers": [{"answer": answer, "answer_id": n + 1} for n in range(10)],
                }
            )
    _dump(folder / f"captions_{split}.json", {"images": listed, "annotations": captions})
    _dump(folder / f"vqa_{split}_questions.json", {"questions": questions})
    _dump(folder / f"vqa_{split}_annotations.json", {"annotations": annotations})
    return folder


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def big(i: int) -> str:
    return "no" if i % 3 == 0 else "yes"


def references(i: int) -> tuple[str, str]:
    return (
        f"A {colour(i)} square number {i} on a dark floor.",
        f"There is a square of {colour(i)} colour, number {i}.",
    )


def oracle(request: Request) -> Output:
    i = image_tag(request) // 20
    text = prompt_text(request)
    if text.startswith("What colour"):
        return says(f" {colour(i)}\n")
    if text.startswith("Is it big"):
        return says(big(i))
    return says(references(i)[0])


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
