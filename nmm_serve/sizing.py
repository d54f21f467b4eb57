"""Parameters and FLOPs in closed form, from a config alone."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nmm_serve.config import NMMConfig, NMMVisionConfig


@dataclass(frozen=True)
class ParamCounts:
    """Parameters by place. `decoder` and `vision` count the blocks' matrices, experts included."""

    embedding: int
    """Token embeddings and output layer (one table when tied)."""
    decoder: int
    decoder_active: int
    """As `decoder`, with only the experts that one token visits, and the router."""
    vision: int
    other: int
    """Patch layer, image positions, connector, norms."""

    @property
    def total(self) -> int:
        """Every parameter; equals `model.num_parameters()`."""
        return self.embedding + self.decoder + self.vision + self.other

    @property
    def active(self) -> int:
        """Every parameter that one token can meet."""
        return self.embedding + self.decoder_active + self.vision + self.other

    @property
    def paper(self) -> int:
        """The count of arXiv 2504.07951, table 6: blocks and both embedding tables, without patch layer and norms;
        for MoE the active one, without its router."""
        return self.embedding + self.decoder_active + self.vision - self._router

    _router: int = 0


def _block(hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, experts: int = 1) -> int:
    attention = hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
    return attention + experts * 3 * hidden * intermediate


def _norms(layers: int, hidden: int, head_dim: int, qk_norm: bool = True) -> int:
    return layers * (2 * hidden + 2 * head_dim * qk_norm) + hidden


def count_params(config: NMMConfig) -> ParamCounts:
    """Closed form; a test holds it against the real modules."""
    c, layers = config, config.num_hidden_layers

    def decoder(experts: int) -> int:
        return layers * _block(
            c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size, experts
        )

    router = layers * c.hidden_size * c.num_experts if c.router == "learned" else 0
    side = 4 * (c.image_size // c.patch_size)
    other = _norms(layers, c.hidden_size, c.head_dim, c.qk_norm)
    vision = 0
    if (v := c.encoder) is not None and v.pretrained is not None:
        vision = v.num_hidden_layers * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
        other += _pretrained_other(v)
    else:
        other += (c.patch_dim + 2 * side) * c.vision_width
        if v is not None:
            heads = v.num_attention_heads
            vision = v.num_hidden_layers * _block(v.hidden_size, heads, heads, v.head_dim, v.intermediate_size)
            other += _norms(v.num_hidden_layers, v.hidden_size, v.head_dim)
    if v is not None:
        other += v.hidden_size * c.hidden_size
    return ParamCounts(
        embedding=c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2),
        decoder=decoder(c.num_experts or 1) + router,
        decoder_active=decoder(c.num_experts_per_tok if c.num_experts else 1) + router,
        vision=vision,
        other=other,
        _router=router,
    )


def _pretrained_other(v: NMMVisionConfig) -> int:
    """A CLIP or SigLIP encoder but for the matrices of its blocks: biases, norms, patch layer, positions, pooling."""
    theirs, d, f = v.pretrained, v.hidden_size, v.intermediate_size
    assert theirs is not None
    positions = (theirs["image_size"] // theirs["patch_size"]) ** 2
    patch, norm = 3 * theirs["patch_size"] ** 2 * d, 2 * d
    blocks = v.num_hidden_layers * (4 * d + f + d + 2 * norm)
    if theirs["model_type"] == "clip_vision_model":
        return blocks + patch + (positions + 2) * d + 2 * norm  # with a class token, its position, and a norm first
    head = d + 4 * (d**2 + d) + norm + 2 * d * f + f + d if theirs.get("vision_use_head", True) else 0
    return blocks + patch + d + positions * d + norm + head


def paper_flops(config: NMMConfig, image_tokens: int, text_tokens: int) -> int:
    """Training FLOPs by the paper's convention: 6ND, for late fusion 6(N_v D_v + N D), N active, attention ignored.

    A pooled image counts as one of `image_size` squared.
    """
    counts = count_params(config)
    decoder = counts.paper - counts.vision
    patches = image_tokens * config.max_image_patches if config.pool_image else image_tokens
    return 6 * (counts.vision * patches + decoder * (image_tokens + text_tokens))


def forward_flops(config: NMMConfig, images: Sequence[int], documents: Sequence[int], logits: int | None = None) -> int:
    """Matrix-product FLOPs of one forward pass: 2 a parameter and token, plus attention.

    Args:
        images: patches of each image.
        documents: tokens of each document, image tokens included; attention stays inside a document.
        logits: positions where the output layer runs (default: every token that is no image's).
    """
    return sum(map(sum, _forward_by_part(config, images, documents, logits).values()))


def _forward_by_part(
    config: NMMConfig, images: Sequence[int], documents: Sequence[int], logits: int | None
) -> dict[str, tuple[int, int]]:
    """FLOPs of the products with weights and of attention, part by part from the pixels on."""
    c, counts = config, count_params(config)
    tokens, patches = sum(documents), sum(images)
    image_tokens = sum(map(c.image_tokens, images))
    logits = tokens - image_tokens if logits is None else logits
    parts = {"connector": (2 * c.patch_dim * c.vision_width * patches, 0)}
    if (v := c.encoder) is not None:
        parts = {
            "vision": (
                2 * (c.patch_dim * c.vision_width + counts.vision) * patches,
                attention_flops(v.num_hidden_layers, v.hidden_size, images),
            ),
            "connector": (2 * v.hidden_size * c.hidden_size * image_tokens, 0),
        }
    parts["decoder"] = (
        2 * counts.decoder_active * tokens + 2 * c.hidden_size * c.vocab_size * logits,
        attention_flops(c.num_hidden_layers, c.num_attention_heads * c.head_dim, documents),
    )
    return parts


def attention_flops(layers: int, width: int, lengths: Sequence[int]) -> int:
    """Scores and weighted sum over each sequence: 2 products of 2 * length^2 * width FLOPs a layer."""
    return 4 * layers * width * sum(length * length for length in lengths)


ALL_PARTS = ("vision", "connector", "decoder")


def training_flops(
    config: NMMConfig,
    images: Sequence[int],
    documents: Sequence[int],
    logits: int | None = None,
    trained: Collection[str] = ALL_PARTS,
) -> int:
    """Forward and backward: three times the forward pass where all is trained.

    Args:
        trained: parts with trained parameters; `adapters` are those in the decoder, whose own products are not counted.
            A frozen part has no products for its weights' gradients, and no backward pass at all where nothing before
            it is trained.
    """
    flops, passed_on = 0, False
    for part, (products, attention) in _forward_by_part(config, images, documents, logits).items():
        passed_on = passed_on or part in trained or (part == "decoder" and "adapters" in trained)
        flops += products + attention
        flops += (products + 2 * attention) * passed_on + products * (part in trained)
    return flops
