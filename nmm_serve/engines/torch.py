"""The torch engine: the slow, obvious oracle that every other engine is tested against.

Legend: B batch, T tokens, V vocabulary.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from nmm_serve.checkpoint import load_model, load_processor
from nmm_serve.engines.base import Output, Progress, Request, SamplingParams, Score, ScoreRequest, Timing
from nmm_serve.errors import ConfigError, ImageError, NMMError, PromptError, unknown_name
from nmm_serve.image_processor import takes_raw_pixels
from nmm_serve.processor import Encoded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchEngine:
    """Static batches, left padding, a dynamic KV cache.

    Args:
        model: checkpoint directory.
        dtype: `auto` keeps the checkpoint's; else float32, bfloat16 or float16.
        device: `auto` takes a GPU when there is one.
        batch_size: requests that are decoded together.
        use_cache: False recomputes the whole sequence for each token, to check the cache against.
    """

    name = "torch"

    def __init__(
        self, model: str, *, dtype: str = "auto", device: str = "auto", batch_size: int = 16, use_cache: bool = True
    ):
        if dtype != "auto" and dtype not in DTYPES:
            raise ConfigError(unknown_name("dtype", dtype, ["auto", *DTYPES]))
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        self.model = str(model)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.batch_size = batch_size
        self.use_cache = use_cache
        self.processor = load_processor(model)
        self.processor.image_processor.raw_pixels = takes_raw_pixels(self.device)
        self.network = load_model(model, DTYPES.get(dtype), self.device)
        self.context_length = self.network.config.max_position_embeddings

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        del self.network

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "torch": torch.__version__,
            "device": self.device,
            "dtype": str(self.network.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            "use_cache": self.use_cache,
        }

    def encode(self, request: Request) -> Encoded:
        """Raises PromptError for a prompt that leaves no room for one new token, ImageError for a bad image."""
        if request.messages is not None:
            prompt = self.processor.encode_chat(request.messages, request.images)
        else:
            prompt = self.processor.encode_prompt(request.prompt or "", request.images)
        room = self.context_length - len(prompt.input_ids)
        if room < request.sampling.max_tokens:
            raise PromptError(
                f"the prompt has {len(prompt.input_ids)} tokens and {request.sampling.max_tokens} new ones were asked "
                f"for, but the model's context is {self.context_length}; shorten the prompt or ask for fewer"
            )
        return prompt

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        outputs: list[Output | None] = [None] * len(requests)
        for start in range(0, len(requests), self.batch_size):
            begin = time.perf_counter()
            prompts: list[tuple[int, Encoded]] = []
            for i in range(start, min(start + self.batch_size, len(requests))):
                try:
                    prompts.append((i, self.encode(requests[i])))
                except (PromptError, ImageError) as error:
                    outputs[i] = Output(text="", finish_reason="error", error=str(error))
            if prompts:
                indices = [i for i, _ in prompts]
                batch = self.generate_batch([p for _, p in prompts], [requests[i].sampling for i in indices], begin)
                for i, output in zip(indices, batch, strict=True):
                    outputs[i] = output
            if progress:
                progress(min(self.batch_size, len(requests) - start))
        return outputs  # type: ignore[return-value]

    def generate_batch(
        self, prompts: list[Encoded], params: list[SamplingParams], begin: float | None = None
    ) -> list[Output]:
        """Decode prompts together until each has ended."""
        begin = time.perf_counter() if begin is None else begin
        batch = {k: v.to(self.device) for k, v in self.processor.collate(prompts).items()}
        preprocess_s = time.perf_counter() - begin
        cache = DynamicCache(config=self.network.config) if self.use_cache else None
        states = [Decoding(self, p) for p in params]
        attention_mask_BT = batch["attention_mask"]
        inputs = batch
        while True:
            logits_BV = self.network(**inputs, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
            tokens = [state.step(logits_V, begin) for state, logits_V in zip(states, logits_BV, strict=True)]
            if all(state.finish_reason for state in states):
                break
            token_B1 = torch.tensor(tokens, device=self.device)[:, None]
            attention_mask_BT = torch.cat((attention_mask_BT, torch.ones_like(token_B1)), dim=1)
            if cache is not None:
                inputs = {"input_ids": token_B1, "attention_mask": attention_mask_BT}
            else:
                inputs = batch | {
                    "input_ids": torch.cat((inputs["input_ids"], token_B1), dim=1),
                    "attention_mask": attention_mask_BT,
                }
        return [
            state.output(len(prompt.input_ids), preprocess_s) for state, prompt in zip(states, prompts, strict=True)
        ]

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """Raises PromptError when a context and its continuation do not fit the model's context."""
        scores = []
        for start in range(0, len(requests), self.batch_size):
            chunk = requests[start : start + self.batch_size]
            prompts, lengths = [], []
            for request in chunk:
                context = self.processor.encode_prompt(request.context, request.images)
                target = self.processor.encode_text(request.continuation)
                if not target:
                    raise PromptError("an empty continuation has no likelihood")
                if len(context.input_ids) + len(target) > self.context_length:
                    raise PromptError(
                        f"context and continuation have {len(context.input_ids) + len(target)} tokens, "
                        f"over the model's context of {self.context_length}"
                    )
                prompts.append(Encoded(context.input_ids + target, context.pixel_values, context.image_grid))
                lengths.append(len(target))
            batch = {k: v.to(self.device) for k, v in self.processor.collate(prompts).items()}
            logits_BTV = self.network(**batch, logits_to_keep=max(lengths) + 1).logits.float()
            for logits_TV, prompt, length in zip(logits_BTV, prompts, lengths, strict=True):
                target_T = torch.tensor(prompt.input_ids[-length:], device=self.device)
                logprobs_TV = logits_TV[-length - 1 : -1].log_softmax(-1)
                scores.append(
                    Score(
                        logprob=logprobs_TV.gather(1, target_T[:, None]).sum().item(),
                        is_greedy=bool((logprobs_TV.argmax(-1) == target_T).all()),
                        num_tokens=length,
                    )
                )
            if progress:
                progress(len(chunk))
        return scores


class Decoding:
    """One request on its way: its tokens so far, and whether it has ended."""

    def __init__(self, engine: TorchEngine, params: SamplingParams):
        if not 0 <= params.temperature < float("inf") or not 0 < params.top_p <= 1:
            raise ConfigError(
                f"temperature {params.temperature} must be >= 0 and top_p {params.top_p} in (0, 1]; 0 is greedy"
            )
        self.decode = engine.processor.decode
        self.params = params
        eos = engine.network.config.eos_token_id
        self.eos = set(eos) if isinstance(eos, list) else {eos}
        self.generator = None
        if params.temperature > 0:
            self.generator = torch.Generator(engine.device)
            self.generator.manual_seed(params.seed) if params.seed is not None else self.generator.seed()
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.token_s: list[float] = []
        self.finish_reason: str | None = None
        self.text: str | None = None

    def step(self, logits_V: torch.Tensor, begin: float) -> int:
        """Choose the next token; a finished request repeats its last one, which nobody reads."""
        if self.finish_reason:
            return self.tokens[-1]
        if not torch.isfinite(logits_V).all():
            raise NMMError("the model gave NaN or infinite logits; its weights are damaged")
        token = self.choose(logits_V)
        self.tokens.append(token)
        self.token_s.append(time.perf_counter() - begin)
        if self.params.logprobs:
            self.logprobs.append(logits_V.log_softmax(-1)[token].item())
        if (token in self.eos and not self.params.ignore_eos) or self.hit_stop_string():
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.params.max_tokens:
            self.finish_reason = "length"
        return token

    def choose(self, logits_V: torch.Tensor) -> int:
        if self.params.temperature == 0:
            return int(logits_V.argmax())
        # largest logit first taken off, in double: a temperature near 0 then tends to greedy instead of overflowing
        probs_V = ((logits_V - logits_V.max()).double() / self.params.temperature).softmax(-1)
        if self.params.top_p < 1:
            sorted_V, order_V = probs_V.sort(descending=True)
            beyond_V = sorted_V.cumsum(-1) - sorted_V >= self.params.top_p
            probs_V = probs_V.index_fill(0, order_V[beyond_V], 0.0)
        return int(torch.multinomial(probs_V, 1, generator=self.generator))

    def hit_stop_string(self) -> bool:
        if not self.params.stop:
            return False
        text = self.decode(self.tokens)
        ends = [text.index(stop) for stop in self.params.stop if stop in text]
        if ends:
            self.text = text[: min(ends)]
        return bool(ends)

    def output(self, num_prompt_tokens: int, preprocess_s: float) -> Output:
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
            ),
        )
