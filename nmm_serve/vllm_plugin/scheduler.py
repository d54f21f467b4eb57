"""vLLM's scheduler, with one more rule: the tokens of an image are computed in one step.

`disable_chunked_mm_input` is meant to say so, but vLLM 0.32 applies it only to images that begin after the tokens
computed so far. An image that begins exactly there (after it was put off once), or that a prefix cache hit ends in,
is still cut to what is left of the step's token budget. Its patches would then not see the later ones.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class WholeImages:
    """Mixin for vLLM's schedulers."""

    def _try_schedule_encoder_inputs(
        self, request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
    ):
        end = num_computed_tokens + num_new_tokens
        for feature in request.mm_features or ():
            start, stop = feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length
            if start <= num_computed_tokens < stop and end < stop:
                return [], 0, encoder_compute_budget, [], []  # wait for a step with room for the rest of the image
        return super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
        )


class WholeImageScheduler(WholeImages, Scheduler):
    pass


class WholeImageAsyncScheduler(WholeImages, AsyncScheduler):
    pass


def create_scheduler(vllm_config, *args: Any, **kwargs: Any) -> Scheduler:
    """vLLM settles on asynchronous scheduling after the settings hook has run, so the choice is made here."""
    cls = WholeImageAsyncScheduler if vllm_config.scheduler_config.async_scheduling else WholeImageScheduler
    return cls(vllm_config, *args, **kwargs)
