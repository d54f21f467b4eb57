"""vLLM settings that our models cannot do without. vLLM calls these hooks while it builds its configuration."""

import logging

from vllm.config import CompilationMode, ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from nmm_serve.config import NMMConfig
from nmm_serve.vllm_plugin import TOKENIZER_MODE

logger = logging.getLogger(__name__)
SCHEDULER = "nmm_serve.vllm_plugin.scheduler.create_scheduler"


class NMMSettings(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        if model_config.tokenizer_mode == "auto":
            model_config.tokenizer_mode = TOKENIZER_MODE

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Patches of one image attend to each other, so an image must be computed in one step.

        vLLM forces this on GPUs only and not in every case (see `scheduler`); elsewhere it would give wrong answers
        without a word.

        Raises ValueError for settings under which some image could never be scheduled, and for hard routing.
        """
        model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        if model_config.hf_config.router != "learned":
            raise ValueError(
                f"router {model_config.hf_config.router!r} needs to know which tokens are image patches, which vLLM's "
                "layers do not see; serve this checkpoint with the torch engine"
            )
        compilation = vllm_config.compilation_config
        # vLLM's own default is off, since few models can. Where vLLM compiles nothing, this changes nothing.
        compilation.compile_mm_encoder = has_our_encoder(model_config.hf_config)
        if compilation.cudagraph_mm_encoder and not captures_encoder(model_config.hf_config):
            logger.warning("cudagraph_mm_encoder is turned off: there is no ViT of ours that gives a token a patch")
            compilation.cudagraph_mm_encoder = False
        if not model_config.is_mm_prefix_lm:
            return  # text only, by --limit-mm-per-prompt
        if scheduler.scheduler_cls not in (None, SCHEDULER):
            raise ValueError(
                f"--scheduler-cls {scheduler.scheduler_cls} cannot be used with this model: images need a scheduler "
                "that never splits them"
            )
        scheduler.disable_chunked_mm_input = True
        scheduler.scheduler_cls = SCHEDULER
        image_tokens = model_config.hf_config.max_image_tokens + 2  # its start and end token
        limits = {
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "long_prefill_token_threshold": scheduler.long_prefill_token_threshold or image_tokens,
        }
        for name, limit in limits.items():
            if limit < image_tokens:
                raise ValueError(
                    f"{name} is {limit}, but an image of this model takes up to {image_tokens} tokens and is never "
                    f"split; set it to {image_tokens} or more"
                )


def has_our_encoder(config: NMMConfig) -> bool:
    """Whether images go through our ViT: not through early fusion's projection, nor CLIP's or SigLIP's encoder."""
    return config.encoder is not None and config.encoder.pretrained is None


def captures_encoder(config: NMMConfig) -> bool:
    """Whether `encoder_graphs` knows how to capture it."""
    return has_our_encoder(config) and not config.pool_image


def compiled(vllm_config: VllmConfig) -> dict[str, bool]:
    """What vLLM compiles: our ViT always with the decoder; on a GPU into CUDA graphs where they are asked for."""
    compilation = vllm_config.compilation_config
    decoder = compilation.mode not in (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE)
    return {
        "compile_decoder": decoder,
        "compile_encoder": decoder and compilation.compile_mm_encoder,
        "encoder_graphs": (
            compilation.cudagraph_mm_encoder
            and not vllm_config.model_config.enforce_eager
            and vllm_config.device_config.device_type == "cuda"
        ),
    }
