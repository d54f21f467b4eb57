"""The torch engine: the slow, obvious oracle that every other engine is tested against.

Legend: B batch, T tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from nmm_serve.checkpoint import load_model, load_processor
from nmm_serve.engines.base import InChunks, Output, Progress, Request, SamplingParams, Score, ScoreRequest
from nmm_serve.engines.decoding import Decoding, check_room
from nmm_serve.errors import ConfigError, ImageError, PromptError, unknown_name
from nmm_serve.image_processor import takes_raw_pixels
from nmm_serve.processor import Encoded

ENCODER_SHAPES = 256
"""Batches of images of so many sizes are compiled for, each when it first comes."""


class Timed:
    """A function whose calls are timed, to the end of what they started on a GPU. `seconds` of the last call."""

    def __init__(self, function: Callable[..., torch.Tensor], device: str):
        self.function = function
        self.on_gpu = torch.device(device).type == "cuda"
        self.seconds = 0.0

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        start = self.now()
        result = self.function(*args)
        self.seconds = self.now() - start
        return result

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchEngine(InChunks):
    """Static batches, left padding, a dynamic KV cache.

    Args:
        model: checkpoint directory.
        dtype: `auto` keeps the checkpoint's; else float32, bfloat16 or float16.
        device: `auto` takes a GPU when there is one.
        batch_size: requests that are decoded together.
        use_cache: False recomputes the whole sequence for each token, to check the cache against.
        compile_encoder: compile the ViT of a late-fusion model, on a GPU into CUDA graphs; each number of patches
            compiles at its first use. Models without an encoder have nothing to compile.
    """

    name = "torch"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int = 16,
        use_cache: bool = True,
        compile_encoder: bool = False,
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
        self.compile_encoder = compile_encoder and self.network.config.encoder is not None
        if self.compile_encoder:
            vision: Any = self.network.model.vision
            # each number of images and patches is one more; past dynamo's limit it would go on uncompiled, and quietly
            torch._dynamo.config.recompile_limit = ENCODER_SHAPES
            if torch.device(self.device).type == "cuda":
                vision.compile(mode="reduce-overhead", dynamic=False)
            else:
                for layer in vision.layers:  # their code compiles once for all of them, in seconds
                    layer.compile(dynamic=False)
        self.front = Timed(self.network.model.image_tokens, self.device)
        setattr(self.network.model, "image_tokens", self.front)  # noqa: B010  the model calls it by this name

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        del self.network, self.front

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "torch": torch.__version__,
            "device": self.device,
            "dtype": str(self.network.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": self.batch_size,
            "use_cache": self.use_cache,
            "compile_encoder": self.compile_encoder,
            "encoder_graphs": self.compile_encoder and torch.device(self.device).type == "cuda",
        }

    def encode(self, request: Request) -> Encoded:
        """Raises PromptError for a prompt that leaves no room for one new token, ImageError for a bad image."""
        if request.messages is not None:
            prompt = self.processor.encode_chat(request.messages, request.images)
        else:
            assert request.prompt is not None
            prompt = self.processor.encode_prompt(request.prompt, request.images)
        check_room(len(prompt.input_ids), request.sampling.max_tokens, self.context_length)
        return prompt

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        outputs: list[Output | None] = [None] * len(requests)
        for start in range(0, len(requests), self.batch_size):
            begin = time.perf_counter()
            prompts: list[tuple[int, Encoded, float]] = []
            for i in range(start, min(start + self.batch_size, len(requests))):
                start_s = time.perf_counter()
                try:
                    prompts.append((i, self.encode(requests[i]), time.perf_counter() - start_s))
                except (PromptError, ImageError) as error:
                    outputs[i] = Output(text="", finish_reason="error", error=str(error))
            if prompts:
                indices, encoded, encode_s = (list(column) for column in zip(*prompts, strict=True))
                batch = self.generate_batch(encoded, [requests[i].sampling for i in indices], begin, encode_s)
                for i, output in zip(indices, batch, strict=True):
                    outputs[i] = output
            if progress:
                progress(min(self.batch_size, len(requests) - start))
        return outputs  # type: ignore[return-value]

    def generate_batch(
        self,
        prompts: list[Encoded],
        params: list[SamplingParams],
        begin: float | None = None,
        encode_s: list[float] | None = None,
    ) -> list[Output]:
        """Decode prompts together until each has ended.

        Args:
            begin: when the requests were handed over; default: now.
            encode_s: how long `encode` took for each of them.
        """
        collate_begin = time.perf_counter()
        begin = collate_begin if begin is None else begin
        batch = {k: v.to(self.device) for k, v in self.processor.collate(prompts).items()}
        model_begin = self.front.now()
        preprocess_s, collate_s = model_begin - begin, model_begin - collate_begin
        self.front.seconds = 0.0
        cache = DynamicCache(config=self.network.config) if self.use_cache else None
        eos = self.network.config.eos_token_id
        states = [Decoding(p, self.processor.decode, eos) for p in params]
        attention_mask_BT = batch["attention_mask"]
        inputs = batch
        encoder_s, prefill_s = 0.0, None
        while True:
            output = self.network(**inputs, past_key_values=cache, use_cache=self.use_cache, logits_to_keep=1)
            logits_BV = output.logits[:, -1].float().cpu().numpy()
            tokens = [state.step(logits_V, begin) for state, logits_V in zip(states, logits_BV, strict=True)]
            if prefill_s is None:
                encoder_s = self.front.seconds
                prefill_s = begin + states[0].token_s[0] - model_begin - encoder_s
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
            state.output(
                len(prompt.input_ids),
                preprocess_s,
                image_s=prompt.image_s,
                host_s=seconds - prompt.image_s + collate_s,
                encoder_s=encoder_s,
                prefill_s=prefill_s,
            )
            for state, prompt, seconds in zip(states, prompts, encode_s or [p.image_s for p in prompts], strict=True)
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
                target = self.processor.continuation_ids(request.continuation)
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
            logits_BTV = self.network(**batch, use_cache=False, logits_to_keep=max(lengths) + 1).logits.float()
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
