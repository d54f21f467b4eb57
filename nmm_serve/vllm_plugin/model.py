"""The model of all families on vLLM's layers. Module names follow the checkpoint; the image front is the very modules
of `nmm_serve.models`, but for the ViT's attention (see `vision`).

Legend: N tokens of all requests, D hidden size, H query heads, G key/value heads, C head size, P patches of all images.
"""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from nmm_serve.chat import IMAGE
from nmm_serve.kernels.moe import moe_mlp
from nmm_serve.models.blocks import Experts
from nmm_serve.models.vision import PatchEmbed, build_encoder
from nmm_serve.vllm_plugin.encoder_graphs import EncoderGraphs
from nmm_serve.vllm_plugin.moe_choice import Choice, ExpertsLayer, choose
from nmm_serve.vllm_plugin.processing import NMMDummyInputsBuilder, NMMMultiModalProcessor, NMMProcessingInfo
from nmm_serve.vllm_plugin.vision import NMMVisionEncoder


class NMMAttention(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        num_heads = config.num_attention_heads // tp_size
        num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.split_sizes = [num_heads * self.head_dim, *[num_kv_heads * self.head_dim] * 2]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=max(config.max_position_embeddings, vllm_config.model_config.max_model_len),
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        self.attn = Attention(
            num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(x_ND)
        q, k, v = qkv.split(self.split_sizes, dim=-1)
        if self.qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).view(q.shape)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).view(k.shape)
        q, k = self.rotary_emb(positions_N, q, k)
        out_ND, _ = self.o_proj(self.attn(q, k, v))
        return out_ND


class NMMMLP(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act = SiluAndMul()

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x_ND)
        out_ND, _ = self.down_proj(self.act(gate_up))
        return out_ND


class NMMSparseMoE(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        # the router is small and decides everything: never quantized
        self.gate = ReplicatedLinear(config.hidden_size, config.num_experts, bias=False, prefix=f"{prefix}.gate")
        self.top_k, self.renormalize = config.num_experts_per_tok, config.norm_topk_prob
        self.ours = chosen_experts(vllm_config) == "nmm-serve"
        self.experts: Any
        if self.ours:
            self.experts = Experts(config.num_experts, config.hidden_size, config.intermediate_size)
        else:
            self.experts = FusedMoEFactory(
                num_experts=config.num_experts,
                top_k=self.top_k,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                renormalize=self.renormalize,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.experts",
            )

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(x_ND)
        if not self.ours:
            return self.experts(hidden_states=x_ND, router_logits=router_logits)
        return moe_mlp(
            x_ND, router_logits, self.experts.gate_up_proj, self.experts.down_proj,
            top_k=self.top_k, renormalize=self.renormalize,
        )[0]  # fmt: skip


def chosen_experts(vllm_config: VllmConfig) -> Choice:
    """Whose kernels compute the experts of this model on this device (see `moe_choice`).

    Another choice never meets the graphs that vLLM compiled for this one: vLLM's layers note themselves in
    `static_all_moe_layers` of the compilation config, which is a part of the key of its cache.
    """
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    obstacles = {
        "--tensor-parallel-size": parallel.tensor_parallel_size > 1,
        "--enable-expert-parallel": parallel.enable_expert_parallel,
        "quantization": vllm_config.quant_config is not None,
    }
    layer = ExpertsLayer(
        gpu=current_platform.get_device_name() if current_platform.is_cuda() else None,
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
    )
    return choose(layer, next((name for name, there in obstacles.items() if there), None))


class NMMDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = NMMAttention(vllm_config, prefix=f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        mlp = NMMSparseMoE if config.num_experts else NMMMLP
        self.mlp = mlp(vllm_config, prefix=f"{prefix}.mlp")

    def forward(self, positions_N, x_ND, residual_ND):
        """vLLM's norm adds the residual stream itself: `x_ND` is the last block's output, not yet added."""
        if residual_ND is None:
            residual_ND = x_ND
            x_ND = self.input_layernorm(x_ND)
        else:
            x_ND, residual_ND = self.input_layernorm(x_ND, residual_ND)
        x_ND = self.self_attn(positions_N, x_ND)
        x_ND, residual_ND = self.post_attention_layernorm(x_ND, residual_ND)
        return self.mlp(x_ND), residual_ND


@support_torch_compile
class NMMDecoder(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        first, last = get_pp_group().is_first_rank, get_pp_group().is_last_rank
        self.embed_tokens: Any
        if first or (last and config.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        else:
            self.embed_tokens = PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: NMMDecoderLayer(vllm_config, prefix=prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if last else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            x_ND = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual_ND = None
        else:
            assert intermediate_tensors is not None
            x_ND, residual_ND = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x_ND, residual_ND = layer(positions, x_ND, residual_ND)
        if not get_pp_group().is_last_rank:
            tensors: dict[str, Any] = {"hidden_states": x_ND, "residual": residual_ND}
            return IntermediateTensors(tensors)
        return self.norm(x_ND, residual_ND)[0]


@MULTIMODAL_REGISTRY.register_processor(
    NMMMultiModalProcessor, info=NMMProcessingInfo, dummy_inputs=NMMDummyInputsBuilder
)
class NMMForConditionalGeneration(nn.Module, EncoderGraphs, SupportsMultiModal, SupportsPP):
    """Early, late, MoE and late x MoE by configuration, like `nmm_serve.models.NMMForConditionalGeneration`."""

    # the compiled decoder holds text layers only, and the compiled encoder all of our ViT
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.patch_embed.": "patch_embed.",
            "model.vision.layers.": "vision.body.layers.",
            "model.vision.norm.": "vision.body.norm.",
            "model.vision.": "vision.",
            "model.connector.": "connector.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        with self._mark_tower_model(vllm_config, "image"):
            if config.encoder is None or config.encoder.pretrained is None:
                self.patch_embed = PatchEmbed(config)
            if config.vision_config is not None:
                ours = config.encoder.pretrained is None
                self.vision = NMMVisionEncoder(config.encoder) if ours else build_encoder(config.encoder)
                self.connector = nn.Linear(config.vision_config.hidden_size, config.hidden_size, bias=False)
        with self._mark_language_model(vllm_config):
            self.model = NMMDecoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: Any
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.requires_grad_(False)  # else compiling the encoder would make ready for a backward pass
        if current_platform.is_cpu() and vllm_config.model_config.enforce_eager and envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            # This is a worker process of its own. vLLM compiles some small functions even so, at their first use:
            # the first request with log-probabilities then takes 15 seconds and a C++ compiler.
            torch.compiler.set_stance("force_eager")

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return IMAGE if modality == "image" else None

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """One [tokens, D] tensor an image."""
        if not kwargs:
            return []
        lengths = [self.config.image_tokens(patches) for patches in kwargs["image_grid"].prod(-1).tolist()]
        return self.encoder_eager_forward(kwargs).split(lengths)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None:  # None on all ranks but one
            # never a placeholder: see nmm_serve.models.nmm
            logits[..., self.config.image_token_id] = torch.finfo(logits.dtype).min
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="model", connector="connector", tower_model=["patch_embed", "vision"]
        )
