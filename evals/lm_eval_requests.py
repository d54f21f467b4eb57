"""What a request of lm-eval's asks for, in our words: its images, and how to sample."""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from nmm_serve.engines.base import SamplingParams
from nmm_serve.errors import ConfigError

_WITHOUT_MEANING_IF_GREEDY = ("top_p", "top_k", "min_p")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}


def images_of(request: Instance) -> list[Any]:
    """The third argument, which lm-eval adds to tasks with images."""
    plain = 1 if request.request_type == "loglikelihood_rolling" else 2
    extra = request.args[-1]
    images = extra.get("visual") if isinstance(extra, dict) and len(request.args) > plain else None
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def sampling_of(gen_kwargs: dict[str, Any], max_gen_toks: int, seed: int) -> SamplingParams:
    """`max_gen_toks`: for a task that does not say. `seed`: of a request that samples.

    Raises ConfigError for an option that no engine has: leaving it out would change the task.
    """
    options = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
    until, max_tokens = options.pop("until", []), options.pop("max_gen_toks")
    sampled, temperature = options.pop("do_sample", False), options.pop("temperature", None)
    if isinstance(sampled, str):  # any word would count as true
        raise ConfigError(f"the task asks for do_sample={sampled!r}; expected true or false")
    temperature = float(1.0 if temperature is None else temperature) if sampled else 0.0
    greedy = temperature == 0
    for name in _WITHOUT_MEANING_IF_GREEDY if greedy else ():
        options.pop(name, None)
    top_p = options.pop("top_p", None)
    for name, neutral in _NEUTRAL.items():
        if options.get(name) == neutral:
            del options[name]
    unknown = sorted(name for name, value in options.items() if value is not None)
    if unknown:
        raise ConfigError(
            f"the task asks for the generation option {unknown[0]}={options[unknown[0]]!r}, which the engines do "
            "not have; known: until, max_gen_toks, do_sample, temperature, top_p"
        )
    return SamplingParams(
        max_tokens=int(max_tokens),
        temperature=temperature,
        top_p=1.0 if top_p is None else float(top_p),
        seed=None if greedy else seed,
        stop=tuple(stop for stop in until if stop),
    )
