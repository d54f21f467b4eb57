"""The one configuration class: early, late, MoE and late x MoE differ by its fields alone.

Sizes follow arXiv 2504.07951 (section 2 and table 6); where the paper is silent the choices are those of the
code bases it cites: pre-norm RMSNorm, SwiGLU, per-head QK-norm, RoPE, no biases, untied embeddings.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

HEAD_DIMS = (32, 64, 96, 128)
"""Head sizes that the torch, vLLM (CPU and GPU) and ONNX Runtime engines all support."""

ROUTERS = ("learned", "modality")

PRETRAINED_ENCODERS = ("clip_vision_model", "siglip_vision_model")
"""Encoders of transformers that can stand in for ours."""


def default_head_dim(hidden_size: int) -> int:
    """The supported head size that gives the number of heads nearest to 16.

    The paper does not state its head counts; 16 is that of the code bases it cites. Its widths share only the
    factor 32, so no single head size fits them all.
    """
    fitting = [size for size in HEAD_DIMS if hidden_size % size == 0]
    if not fitting:
        raise ValueError(f"hidden_size {hidden_size} is not a multiple of 32; supported head sizes are {HEAD_DIMS}")
    return min(fitting, key=lambda size: abs(hidden_size // size - 16))


def default_intermediate_size(hidden_size: int) -> int:
    """The SwiGLU hidden size of open_lm and L3M: 8d/3 rounded down, then up to a multiple of 256."""
    return 256 * -(-(8 * hidden_size // 3) // 256)


def check_head_dim(name: str, head_dim: int) -> None:
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{name}head_dim {head_dim} is not supported by every engine; use one of {HEAD_DIMS}")


@strict
class NMMVisionConfig(PreTrainedConfig):
    """The ViT encoder of late fusion: the decoder's block, bidirectional, with learned positions instead of RoPE.

    0 for a size means: derive it from `hidden_size`.
    """

    model_type = "nmm_vision"
    base_config_key = "vision_config"

    hidden_size: int = 384
    intermediate_size: int = 0
    num_hidden_layers: int = 24
    num_attention_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-5

    pretrained: dict | None = None
    """The config of an encoder of transformers that stands in for ours, which then gives the sizes here."""
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    """How that encoder's pixels, from 0 to 1, are normalised."""

    def __post_init__(self, **kwargs):
        if self.pretrained is not None:
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
                setattr(self, name, self.pretrained[name])
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.head_dim = self.head_dim or default_head_dim(self.hidden_size)
        self.num_attention_heads = self.num_attention_heads or self.hidden_size // self.head_dim
        self.intermediate_size = self.intermediate_size or default_intermediate_size(self.hidden_size)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        if self.pretrained is not None:
            if (kind := self.pretrained["model_type"]) not in PRETRAINED_ENCODERS:
                raise ValueError(f"pretrained encoder {kind!r} is not known; these are: {PRETRAINED_ENCODERS}")
            if self.image_mean is None or self.image_std is None:
                raise ValueError("a pretrained encoder needs image_mean and image_std")
            return
        check_head_dim("vision ", self.head_dim)
        if self.num_attention_heads * self.head_dim != self.hidden_size:
            raise ValueError(
                f"vision num_attention_heads {self.num_attention_heads} x vision head_dim {self.head_dim} = "
                f"{self.num_attention_heads * self.head_dim}, but vision hidden_size is {self.hidden_size}; "
                "make them equal or leave the two out"
            )


@strict
class NMMConfig(PreTrainedConfig):
    """A native multimodal model.

    `vision_config` present means late fusion, absent means early fusion. `num_experts > 0` means that
    every feed-forward layer is a mixture of experts.

    Images: an image is scaled to about `image_size` x `image_size` pixels in area, aspect ratio kept, and cut into
    patches of `patch_size` pixels; each patch is one token in the decoder, in both families (but see `pool_image`).

    0 for the number of heads, their size or the feed-forward size means: derive it from `hidden_size`.
    """

    model_type = "nmm"
    sub_configs = {"vision_config": NMMVisionConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    vocab_size: int = 50432
    hidden_size: int = 800
    intermediate_size: int = 0
    num_hidden_layers: int = 24
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    """Normalise each query and key head. False: Llama's block."""

    patch_size: int = 14
    image_size: int = 224
    vision_config: dict | NMMVisionConfig | None = None
    pool_image: bool = False
    """Late fusion: an image is one token and not one a patch: what its encoder pools it to (CLIP's class token,
    SigLIP's attention head, the mean of our ViT)."""
    native_resolution: bool = False
    """An image of fewer pixels than `image_size` squared is not scaled up to them: it has fewer patches instead."""

    num_experts: int = 0
    num_experts_per_tok: int = 1
    router: str = "learned"
    """`learned`, or `modality`: expert 0 for text, expert 1 for image patches (the paper's baseline)."""
    norm_topk_prob: bool = False
    """Rescale the chosen experts' weights to sum to 1. With top-1 the router would then get no gradient."""
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0
    """Of the mean squared logsumexp of the router's logits; the paper mentions none."""

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    image_start_token_id: int | None = None
    image_token_id: int | None = None
    image_end_token_id: int | None = None

    is_mm_prefix_lm: bool = True
    """Patches of one image attend to each other in both directions. vLLM reads this very name."""

    def __post_init__(self, **kwargs):
        for name in ("rope_parameters", "rope_scaling"):
            self.check_rope(name, kwargs.pop(name, None))
        if isinstance(self.vision_config, dict):
            self.vision_config = NMMVisionConfig(**self.vision_config)
        self.head_dim = self.head_dim or default_head_dim(self.hidden_size)
        self.num_attention_heads = self.num_attention_heads or self.hidden_size // self.head_dim
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.intermediate_size = self.intermediate_size or default_intermediate_size(self.hidden_size)
        super().__post_init__(**kwargs)

    def check_rope(self, name: str, given: dict | None) -> None:
        """transformers' other spellings of RoPE's settings, which are not read: they may say what `rope_theta` says."""
        same = {"rope_type": "default", "type": "default", "rope_theta": self.rope_theta}
        for key, value in (given or {}).items():
            if key not in same or value != same[key]:
                raise ValueError(
                    f"{name} has {key} {value!r}, but this model has RoPE of type 'default' and rope_theta "
                    f"{self.rope_theta}; take {name} out, and give the base of the angles as rope_theta"
                )

    def validate_architecture(self):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "patch_size", "image_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        check_head_dim("", self.head_dim)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.pool_image and self.encoder is None:
            raise ValueError("pool_image needs an image encoder: early fusion has none to pool patches")
        if self.encoder is not None and (theirs := self.encoder.pretrained) is not None:
            if theirs["patch_size"] != self.patch_size:
                raise ValueError(
                    f"patch_size {self.patch_size} is not that of the pretrained encoder, {theirs['patch_size']}"
                )
            if self.pool_image and not theirs.get("vision_use_head", True):
                raise ValueError("pool_image needs a pooling head, and this SigLIP encoder has none (vision_use_head)")
        if self.num_experts < 0 or (self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts):
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} must lie between 1 and num_experts {self.num_experts}"
            )
        if self.router not in ROUTERS:
            raise ValueError(f"router must be one of {ROUTERS}, not {self.router!r}")
        if self.router == "modality" and (self.num_experts, self.num_experts_per_tok) != (2, 1):
            raise ValueError(
                "router 'modality' sends text to one expert and image patches to another: it needs num_experts 2 and "
                f"num_experts_per_tok 1, not {self.num_experts} and {self.num_experts_per_tok}"
            )

    @property
    def encoder(self) -> NMMVisionConfig | None:
        """`vision_config`, which the constructor also takes as a dict."""
        assert not isinstance(self.vision_config, dict)
        return self.vision_config

    @property
    def fusion(self) -> Literal["early", "late"]:
        return "early" if self.vision_config is None else "late"

    @property
    def family(self) -> str:
        """`early`, `late`, `moe` or `late-moe`."""
        if not self.num_experts:
            return self.fusion
        return "moe" if self.fusion == "early" else "late-moe"

    @property
    def max_image_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def max_image_tokens(self) -> int:
        """Tokens that one image takes at most."""
        return self.image_tokens(self.max_image_patches)

    def image_tokens(self, patches: int) -> int:
        """Tokens of an image that is cut into so many patches."""
        return 1 if self.pool_image else patches

    @property
    def patch_dim(self) -> int:
        """Numbers in one raw RGB patch."""
        return 3 * self.patch_size**2

    @property
    def vision_width(self) -> int:
        """Width of the first layer that sees patches: the encoder's, or without one the decoder's."""
        return self.encoder.hidden_size if self.encoder is not None else self.hidden_size
