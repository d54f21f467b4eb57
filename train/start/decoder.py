"""A decoder from a Hugging Face directory, where its blocks are ours exactly: the same numbers come out, or an error.

Legend: V vocabulary, D hidden size.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from nmm_serve.checkpoint import load_whole
from nmm_serve.errors import ConfigError, first_line

QK_NORM = {"llama": False, "mistral": False, "qwen3": True, "mixtral": False, "qwen3_moe": True}
"""Model types with our block (pre-norm RMSNorm, RoPE in halves, SwiGLU or a mixture of such experts, no biases), and
whether they normalise query and key heads."""

SPARSE = ("mixtral", "qwen3_moe")
"""Those with experts in every layer: softmax over all, then the best few, rescaled to sum to 1 (Mixtral) or not."""

EXPERTS: dict[str, tuple[Any, ...]] = {
    "shared_expert_intermediate_size": (None, 0),
    "n_shared_experts": (None, 0),
    "num_shared_experts": (None, 0),
    "first_k_dense_replace": (None, 0),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "router_jitter_noise": (None, 0),
}
"""Fields that say which layers have experts, and what stands beside them; they are named before the model's type."""

REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
"""Fields of a config that would change the block, with the values that leave it ours."""


def read_decoder_config(path: str | Path) -> PreTrainedConfig:
    """The config of a language model that our decoder can be.

    Raises ConfigError naming the field that does not fit; a nearly-matching model is never loaded.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"start.decoder: directory {path} does not exist")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a damaged or missing file makes the library raise
        raise ConfigError(f"start.decoder: {path}/config.json cannot be read: {first_line(error)}") from error
    _check_fields(path, config, EXPERTS)
    if config.model_type not in QK_NORM:
        raise ConfigError(
            f"start.decoder: {path} has model_type {config.model_type!r}, whose blocks are not ours; "
            f"these can be loaded: {', '.join(QK_NORM)}"
        )
    _check_fields(path, config, REQUIRED)
    rope = config.rope_parameters
    if (kind := rope.get("rope_type", "default")) != "default":
        raise _mismatch(path, "rope_parameters.rope_type", kind, "default")
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _mismatch(path, "rope_parameters.partial_rotary_factor", share, 1.0)
    return config


def _check_fields(path: str | Path, config: PreTrainedConfig, fields: dict[str, tuple[Any, ...]]) -> None:
    for name, allowed in fields.items():
        if (value := getattr(config, name, None)) not in allowed:
            raise _mismatch(path, name, value, allowed[-1])


def _mismatch(path: str | Path, name: str, value: Any, expected: Any) -> ConfigError:
    return ConfigError(
        f"start.decoder: {path} has {name} {value!r}, and our decoder can only be a model with {expected!r}; "
        "choose another model"
    )


def decoder_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of our config that make its decoder this one. The vocabulary is the tokenizer's matter."""
    sparse: dict[str, Any] = {}
    if config.model_type in SPARSE:
        sparse = {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": getattr(config, "norm_topk_prob", True),  # Mixtral has no such field, and always does
            # Qwen's intermediate_size is that of dense layers, which it then has none of
            "intermediate_size": getattr(config, "moe_intermediate_size", config.intermediate_size),
        }
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": float(config.rope_parameters["rope_theta"]),
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "qk_norm": QK_NORM[config.model_type],
    } | sparse


def read_decoder_weights(path: str | Path, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Its weights under our names, in float32, with the query, key and value and the gate and up matrices joined.

    Raises ConfigError when a weight is missing, superfluous or of another shape, and for pickles.
    """
    what = f"start.decoder: the weights in {path}"
    model = load_whole(AutoModelForCausalLM, path, config, torch.float32, what=what, error=ConfigError)
    theirs = model.state_dict()
    ours = {name: theirs[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        parts = [theirs[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"]
        ours[layer + "self_attn.qkv_proj.weight"] = torch.cat(parts)
        kept = ["self_attn.o_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"]
        if QK_NORM[config.model_type]:
            kept += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
        if config.model_type in SPARSE:  # transformers stacks experts, and joins gate and up, as we do
            kept += ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        else:
            parts = [theirs[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")]
            ours[layer + "mlp.gate_up_proj.weight"] = torch.cat(parts)
            kept += ["mlp.down_proj.weight"]
        ours |= {layer + name: theirs[layer + name] for name in kept}
    return ours


def upcycled(weights: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """A dense decoder's weights with each feed-forward layer in every expert (arXiv 2212.05055)."""
    ours = dict(weights)
    for name in weights:
        if name.endswith((".mlp.gate_up_proj.weight", ".mlp.down_proj.weight")):
            stacked = name.removesuffix(".weight").replace(".mlp.", ".mlp.experts.")
            ours[stacked] = ours.pop(name).expand(num_experts, -1, -1).clone()
    return ours


def grow(table_VD: torch.Tensor, size: int, new: dict[int, int | None]) -> torch.Tensor:
    """An embedding table or output layer of `size` rows, with rows for `new` tokens.

    A new row is a copy of the old one named with it, or the mean of all, which changes the model's answers least; so
    are the rows that no token has.
    """
    mean_D = table_VD.mean(0)
    grown = torch.cat((table_VD, mean_D.expand(size - table_VD.shape[0], -1)))
    for token, source in new.items():
        grown[token] = mean_D if source is None else table_VD[source]
    return grown
