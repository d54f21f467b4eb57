"""Answers in OpenAI's shapes, whole or in pieces."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from itertools import accumulate
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from nmm_serve.engines.decoding import Decoding
from nmm_serve.onnx.manifest import Manifest
from nmm_serve.prompt import TokenizerFile
from nmm_serve.serving.requests import Asked
from nmm_serve.serving.scheduler import Event, Job

Fields = dict[str, Any]


class ServerFailure(Exception):
    """The model failed on a request that was right."""


class TextStream:
    """Text as it may be shown: no half characters, and nothing that could be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]):
        self.tokenizer, self.stops = tokenizer, stops
        self.stream = DecodeStream(skip_special_tokens=True)
        self.text, self.shown = "", 0
        self.token_chars = 0
        """Where the next token begins, special ones counted: a log-probability's `text_offset`."""

    def add(self, token: int) -> str:
        self.text += self.stream.step(self.tokenizer, token) or ""
        safe = len(self.text)
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(self.text) - self.shown), 0, -1):
                if self.text.endswith(stop[:length]):
                    safe = min(safe, len(self.text) - length)
                    break
        piece, self.shown = self.text[self.shown : safe], max(self.shown, safe)
        return piece

    def rest(self, whole: str) -> str:
        """What is left to show of the final text."""
        return whole[self.shown :]


class Answer:
    """All answers to one request: its jobs, and what has come of them.

    Made in the event loop, which the scheduler's thread notifies.
    """

    def __init__(self, asked: Asked, encoder: TokenizerFile, manifest: Manifest, served: str):
        self.asked, self.encoder, self.served = asked, encoder, served
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.jobs: list[Job] = []
        for prompt in asked.prompts:
            for copy in range(asked.n):
                seed = asked.sampling.seed
                sampling = asked.sampling
                if seed is not None and copy:  # copies with one seed would all say the same
                    sampling = type(sampling)(**{**vars(sampling), "seed": seed + copy})
                self.jobs.append(
                    Job(
                        prompt=prompt,
                        sampling=sampling,
                        notify=self._notifier(loop, len(self.jobs)),
                        decoding=Decoding(sampling, encoder.decode, manifest.eos_token_ids),
                        prompt_logprobs=asked.prompt_logprobs,
                    )
                )

    def _notifier(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Event], None]:
        def notify(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return notify

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()

    async def _until_done(self) -> AsyncIterator[tuple[int, Event]]:
        left = len(self.jobs)
        while left:
            index, event = await self.events.get()
            if event.error:
                raise ServerFailure(event.error)
            left -= event.finish_reason is not None
            yield index, event

    async def whole(self) -> Fields:
        """The answer as one document. Raises ServerFailure."""
        async for _ in self._until_done():
            pass
        choices = []
        for index, job in enumerate(self.jobs):
            decoding = job.decoding
            text = self.final_text(job)
            choice: Fields = {"index": index, "finish_reason": decoding.finish_reason, "logprobs": None}
            choice |= {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
            if self.asked.sampling.logprobs:
                choice["logprobs"] = self.logprobs(decoding.tokens, decoding.logprobs, decoding.best)
            if self.asked.return_token_ids:
                choice["token_ids"] = decoding.tokens
            if job.prompt_logprobs:
                choice["prompt_logprobs"] = self.prompt_logprobs(job)
            choices.append(choice)
        return self._document(choices, chunk=False) | {"usage": self.usage()}

    def final_text(self, job: Job) -> str:
        return job.decoding.output(len(job.prompt.input_ids), 0.0).text

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The answer as server-sent events. A failure half-way is an event of its own."""
        streams = [TextStream(self.encoder.tokenizer, self.asked.sampling.stop) for _ in self.jobs]
        if self.asked.chat:
            for index in range(len(self.jobs)):
                yield self._event([self._delta(index, {"role": "assistant", "content": ""})])
        try:
            async for index, event in self._until_done():
                if event.token is None:  # aborted by a shutdown
                    yield self._event([self._delta(index, "", finish_reason=event.finish_reason)])
                    continue
                if event.finish_reason:
                    text = streams[index].rest(self.final_text(self.jobs[index]))
                else:
                    text = streams[index].add(event.token)
                logprobs = None
                if event.logprob is not None and event.best is not None:
                    stream = streams[index]
                    logprobs = self.logprobs([event.token], [event.logprob], [event.best], stream.token_chars)
                    stream.token_chars += len(self.token_text(event.token))
                choice = self._delta(index, text, finish_reason=event.finish_reason, logprobs=logprobs)
                if self.asked.return_token_ids:
                    choice["token_ids"] = [event.token]
                if text or event.finish_reason or logprobs or self.asked.return_token_ids:
                    yield self._event([choice])
        except ServerFailure as error:
            yield f"data: {json.dumps({'error': error_fields(str(error), 'InternalServerError', None, 500)})}\n\n"
        if self.asked.include_usage:
            yield self._event([], usage=self.usage())
        yield "data: [DONE]\n\n"

    def _delta(self, index: int, text: str | Fields, **fields: Any) -> Fields:
        choice: Fields = {"index": index, "finish_reason": None, "logprobs": None} | fields
        if not self.asked.chat:
            return choice | {"text": text}
        return choice | {"delta": text if isinstance(text, dict) else {"content": text}}

    def _event(self, choices: list[Fields], **more: Any) -> str:
        return f"data: {json.dumps(self._document(choices, chunk=True) | more)}\n\n"

    def _document(self, choices: list[Fields], chunk: bool) -> Fields:
        kind = "text_completion" if not self.asked.chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served, "choices": choices}

    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.input_ids) for prompt in self.asked.prompts)
        new = sum(len(job.decoding.tokens) for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def token_text(self, token: int) -> str:
        return self.encoder.tokenizer.decode([token], skip_special_tokens=False)

    def logprobs(
        self, tokens: list[int], values: list[float], best: list[tuple[int, float]], offset: int = 0
    ) -> Fields:
        """`offset`: characters of the tokens before."""
        texts = [self.token_text(token) for token in tokens]
        if self.asked.chat:
            return {
                "content": [
                    {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
                    for text, value in zip(texts, values, strict=True)
                ]
            }
        top = [{text: value} for text, value in zip(texts, values, strict=True)]
        if self.asked.best_logprobs:
            top = [one | {self.token_text(token): value} for one, (token, value) in zip(top, best, strict=True)]
        offsets = list(accumulate(map(len, texts), initial=offset))[:-1]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def prompt_logprobs(self, job: Job) -> list[Fields | None]:
        """As vLLM gives them: nothing for the first token, then each token's log-probability and rank."""
        following = job.prompt.input_ids[1:]
        return [
            None,
            *(
                {str(token): {"logprob": logprob, "rank": rank, "decoded_token": self.token_text(token)}}
                for token, (logprob, rank) in zip(following, job.prompt_scores, strict=True)
            ),
        ]


def error_fields(message: str, kind: str, param: str | None, status: int) -> Fields:
    return {"message": message, "type": kind, "param": param, "code": status}
