"""Our engines as a chat model of lmms-eval (written after 0.7.3): text and images in, text out."""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms

from nmm_serve.engines.base import Request
from nmm_serve.errors import PromptError
from nmm_serve.evals.lm_eval_asking import CHUNK
from nmm_serve.evals.lm_eval_model import NMM
from nmm_serve.evals.lm_eval_requests import sampling_of


class NMMForLMMs(lmms):
    """An item that fails raises: lmms-eval cannot leave it out, and an empty answer would be scored.

    Args: those of `nmm_serve.evals.lm_eval_model.NMM`.
    """

    is_simple = False
    """It takes whole conversations, with images in their places."""

    def __init__(self, model: str, engine: str | None = None, **options: Any) -> None:
        super().__init__()
        self.inner = NMM(model, engine, **options)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in order. Raises PromptError naming the item that failed, or one with video or sound."""
        asked = []
        for position, request in enumerate(requests):
            _, doc_to_messages, gen_kwargs, doc_id, task, split = request.args
            messages, images = plain_messages(doc_to_messages(self.task_dict[task][split][doc_id]), f"{task}/{doc_id}")
            sampling = sampling_of(gen_kwargs, self.inner.max_gen_toks, self.inner.seed + position)
            asked.append((f"{task}/{doc_id}", Request(messages=messages, images=images, sampling=sampling)))
        answers = []
        for start in range(0, len(asked), CHUNK):
            chunk = asked[start : start + CHUNK]
            for (item, _), output in zip(chunk, self.inner.engine.generate([r for _, r in chunk]), strict=True):
                if output.error is not None:
                    raise PromptError(f"{item}: {output.error}")
                answers.append(output.text)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lmms-eval asks chat models for answers only; nmm-eval text scores likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported")


def plain_messages(messages: Sequence[dict[str, Any]], item: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """lmms-eval's messages, which carry images as `{"type": "image", "url": image}`, in our shape, and the images.

    Raises PromptError for video and sound.
    """
    images: list[Any] = []
    filled = []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(part["url"])
                content.append({"type": "image"})
            elif part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            else:
                raise PromptError(f"{item} holds {part['type']}; the models take text and images only")
        filled.append({"role": message["role"], "content": content})
    return filled, images
