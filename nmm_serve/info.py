"""What a checkpoint is, from its small files alone."""

from pathlib import Path
from typing import Any

from nmm_serve.checkpoint import WEIGHTS, checkpoint_hash, load_config, read_run
from nmm_serve.config import NMMVisionConfig
from nmm_serve.sizing import count_params


def describe_checkpoint(path: str | Path) -> dict[str, Any]:
    """Family, sizes and training record. The weights are read only to hash them.

    Raises CheckpointError for a directory that is not one of our checkpoints.
    """
    config, counts = load_config(path), count_params(load_config(path))
    found: dict[str, Any] = {
        "family": config.family,
        "parameters": {"total": counts.total, "active": counts.active},
        "decoder": {
            "parameters": counts.decoder,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_size": config.head_dim,
        },
        "embedding": {"parameters": counts.embedding, "tied": config.tie_word_embeddings},
        "vocabulary": config.vocab_size,
        "context_tokens": config.max_position_embeddings,
        "image": {
            "side_pixels": config.image_size,
            "patch_pixels": config.patch_size,
            "most_tokens": config.max_image_tokens,
        },
        "dtype": str(config.dtype or "float32").removeprefix("torch."),
    }
    vision = config.vision_config
    if isinstance(vision, NMMVisionConfig):
        found["vision"] = {
            "parameters": counts.vision,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "heads": vision.num_attention_heads,
        }
    if config.num_experts:
        found["experts"] = {"number": config.num_experts, "per_token": config.num_experts_per_tok}
    found["weights_bytes"] = sum(file.stat().st_size for file in Path(path).glob(f"{Path(WEIGHTS).stem}*.safetensors"))
    found["hash"] = f"sha256:{checkpoint_hash(path)}"
    found["run"] = read_run(path)
    return found
