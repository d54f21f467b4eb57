"""The native multimodal model of all families, in the shape that transformers expects.

Legend: B batch, T new tokens, S keys, D hidden size, V vocabulary, P patches of all images, K numbers in a patch,
I images, E experts, L layers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from nmm_serve.config import NMMConfig
from nmm_serve.errors import ConfigError, PromptError
from nmm_serve.kernels.moe import RouterTotals
from nmm_serve.models.blocks import DecoderLayer, Experts, RMSNorm, RouterOutput, TokenMarks, rope_tables
from nmm_serve.models.masks import DocumentMasks, additive, document_masks, image_spans
from nmm_serve.models.masks import attention_mask as build_mask
from nmm_serve.models.vision import PatchEmbed, PositionTable, build_encoder, image_tokens


@dataclass
class NMMOutput(MoeCausalLMOutputWithPast):
    """`loss` is cross-entropy plus the router's weighted losses; `ce_loss` is cross-entropy alone (nats a token).

    `aux_loss` (load balancing) and `z_loss` are there where the model has a router that learns and the loss a weight.
    The field of the cache comes from transformers, which has given it another name.
    """

    ce_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None


CACHE = "cache" if "cache" in NMMOutput.__dataclass_fields__ else "past_key_values"
"""What `generate` of the transformers that is installed calls the cache."""


class NMMPreTrainedModel(PreTrainedModel):
    config_class = NMMConfig
    config: NMMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer", "EncoderLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """L3M's initialisation: truncated normal with variance 1 / (fan_in * (1 + depth)); embeddings U(-0.1, 0.1).
        Positions in an image are ours: N(0, 1)."""

        def fan_in(weight: torch.Tensor) -> None:
            std = (weight.shape[-1] * (1 + self.config.num_hidden_layers)) ** -0.5
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

        if isinstance(module, nn.Linear):
            fan_in(module.weight)
        elif isinstance(module, Experts):
            fan_in(module.gate_up_proj)
            fan_in(module.down_proj)
        elif isinstance(module, PositionTable):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.uniform_(module.weight, -0.1, 0.1)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class NMMModel(NMMPreTrainedModel):
    """Embeddings, image front and decoder; returns the normed residual stream."""

    always_run_image_front = False
    """For training with several processes, which must all run the same modules: a batch without images then sends one
    blank patch through the image front, and adds nothing of it."""

    def __init__(self, config: NMMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.encoder is None or config.encoder.pretrained is None:
            self.patch_embed = PatchEmbed(config)
        if config.encoder is not None:
            self.vision = build_encoder(config.encoder)
            self.connector = nn.Linear(config.encoder.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def image_tokens(self, pixel_values: torch.Tensor, image_grid: torch.Tensor) -> torch.Tensor:
        """Raw patches [P, K] of images with `image_grid` [I, 2] rows and columns -> decoder inputs [P, D], or [I, D]
        where images are pooled."""
        return image_tokens(self, self.config, pixel_values, image_grid)

    def is_image(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where the placeholders of patches are. Nowhere in a model without images."""
        return input_ids == (-1 if self.config.image_token_id is None else self.config.image_token_id)

    def embed(self, input_ids: torch.Tensor, pixel_values=None, image_grid=None) -> torch.Tensor:
        """Token embeddings with the image tokens put in the place of their placeholders. [B, T, D]

        Raises PromptError when the number of placeholders is not that of image tokens: scattering anyway would silently
        show the model the wrong image.
        """
        x_BTD = self.embed_tokens(input_ids)
        is_image_BT = self.is_image(input_ids)
        num_slots, num_given = int(is_image_BT.sum()), 0
        if pixel_values is not None:
            num_given = len(image_grid) if self.config.pool_image else pixel_values.shape[0]
        if num_slots != num_given:
            given = f"{num_given} pooled images" if self.config.pool_image else f"its images give {num_given} patches"
            raise PromptError(
                f"the prompt has {num_slots} image tokens but {given}; "
                "build both with the processor, and give one <|image|> for each image"
            )
        if pixel_values is None:
            if self.always_run_image_front:
                blank_1K, one_by_one = x_BTD.new_zeros(1, self.config.patch_dim), input_ids.new_ones(1, 2)
                x_BTD = x_BTD + 0 * self.image_tokens(blank_1K, one_by_one).sum()
            return x_BTD
        image_PD = self.image_tokens(pixel_values, image_grid).to(x_BTD.dtype)
        return x_BTD.masked_scatter(is_image_BT[:, :, None], image_PD)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, tuple[RouterOutput, ...]]:
        """Returns the final hidden states [B, T, D] and, for MoE, what the router of each layer did."""
        T = input_ids.shape[1]
        num_past, num_keys = 0, T
        if past_key_values is not None:
            # a static cache counts on the device, and has room behind the new tokens
            num_past, num_keys = int(past_key_values.get_seq_length()), past_key_values.get_mask_sizes(T, 0)[0]
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(num_past, num_past + T, device=input_ids.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        x_BTD = self.embed(input_ids, pixel_values, image_grid)
        is_image_BT = self.is_image(input_ids)
        rope = rope_tables(position_ids, self.config.head_dim, self.config.rope_theta, x_BTD.dtype)
        mask: torch.Tensor | DocumentMasks | None = None
        if T > 1 or attention_mask is not None or num_keys != num_past + T:
            span_BT = image_spans(is_image_BT)
            eager_cpu = x_BTD.device.type == "cpu" and not torch.compiler.is_compiling()
            if eager_cpu and document_ids is not None and attention_mask is None and num_keys == T:
                mask = document_masks(span_BT, document_ids, x_BTD.dtype)
            else:
                mask = additive(build_mask(span_BT, num_keys, attention_mask, document_ids, num_past), x_BTD.dtype)
        real_BT = attention_mask if document_ids is None else document_ids
        counted_N = None if real_BT is None else (real_BT[:, -T:] > 0).reshape(-1)
        marks = TokenMarks(is_image_BT.reshape(-1), counted_N)
        routers = []
        for layer in self.layers:
            x_BTD, router = layer(x_BTD, mask, rope, past_key_values, marks)
            if router is not None:
                routers.append(router)
        return self.norm(x_BTD), tuple(routers)


class NMMForConditionalGeneration(NMMPreTrainedModel, GenerationMixin):
    """Image and text in, text out (arXiv 2504.07951)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    batch_group: ProcessGroup | None = None
    """For training with several processes: those that hold the other rows of each batch. The routers' losses are then
    this process's part of those of the whole batch, which are no sum over rows."""

    def __init__(self, config: NMMConfig):
        super().__init__(config)
        self.model = NMMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, image_grid: torch.Tensor) -> list[torch.Tensor]:
        """One [tokens, D] tensor an image."""
        lengths = [self.config.image_tokens(patches) for patches in image_grid.prod(-1).tolist()]
        return list(self.model.image_tokens(pixel_values, image_grid).split(lengths))

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_router_logits: bool = False,
        cache: Cache | None = None,
        return_dict: bool | None = None,
        **unread,
    ) -> NMMOutput | tuple:
        """
        Args:
            input_ids: [B, T], each image as one placeholder a patch.
            pixel_values: [P, K] raw patches of all images in order of appearance, in [-1, 1]; or their uint8 pixels.
            image_grid: [I, 2] rows and columns of patches.
            attention_mask: [B, S], 0 for padding.
            document_ids: [B, T], 1, 2, ... to keep attention inside documents that share a row; 0 is padding.
            labels: [B, T]; -100 does not count. Shifted here: position t is predicted from t - 1.
            num_items_in_batch: divisor of the summed loss; default: the labels of this batch. Gradient accumulation
                gives the labels of all its micro-batches.
            use_cache: return the keys and values of these tokens; default: as the config says, but not for a loss.
            logits_to_keep: compute logits for the last so many positions only; 0 is all.
            cache: `past_key_values` under the name that newer releases of transformers give it.
            unread: what transformers and PEFT hand over to every model; nothing may be asked for with it.

        In training with labels, logits are computed only where a label is, and not returned: image positions
        carry no loss (section 2) and would be half of the largest matrix product.
        """
        if asked := [name for name, value in unread.items() if value is not None and value is not False]:
            raise ConfigError(f"this model takes no {' and no '.join(asked)}; leave it out")
        past_key_values = cache if past_key_values is None else past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x_BTD, routers = self.model(
            input_ids, pixel_values, image_grid, attention_mask, position_ids, document_ids, past_key_values
        )
        output = NMMOutput(
            router_logits=tuple(r.logits_NE for r in routers) if output_router_logits else None,
            **{CACHE: past_key_values},
        )
        if labels is None or not self.training:
            output.logits = self.lm_head(x_BTD[:, -logits_to_keep:] if logits_to_keep else x_BTD)
            if self.config.image_token_id is not None:
                # only an image can stand behind its placeholder; the loss never teaches the model not to say one
                output.logits[..., self.config.image_token_id] = torch.finfo(output.logits.dtype).min
        if labels is not None:
            target_BT = F.pad(labels[:, 1:], (0, 1), value=-100)
            has_label_BT = target_BT != -100
            logits_NV = self.lm_head(x_BTD[has_label_BT]).float()
            divisor = has_label_BT.sum() if num_items_in_batch is None else num_items_in_batch
            output.ce_loss = F.cross_entropy(logits_NV, target_BT[has_label_BT], reduction="sum") / divisor
            output.loss = output.ce_loss
            if routers and self.config.router == "learned":
                num_labels, totals = self.over_batch(has_label_BT.sum(), [r.stats.totals() for r in routers])
                # under gradient accumulation each micro-batch weighs by its share of the labels, like its cross-entropy
                share = 1.0 if num_items_in_batch is None else num_labels / num_items_in_batch
                balance = [r.stats.load_balancing_loss(t) for r, t in zip(routers, totals, strict=True)]
                output.aux_loss = share * torch.stack(balance).mean()
                output.loss = output.loss + self.config.router_aux_loss_coef * output.aux_loss
                if self.config.router_z_loss_coef:
                    z_losses = [r.stats.z_loss(t) for r, t in zip(routers, totals, strict=True)]
                    output.z_loss = share * torch.stack(z_losses).mean()
                    output.loss = output.loss + self.config.router_z_loss_coef * output.z_loss
        output = NMMOutput(**output)  # anew: in the order of its fields, for who takes them by position
        return output.to_tuple() if return_dict is False else output

    def over_batch(
        self, num_labels: torch.Tensor, totals: list[RouterTotals]
    ) -> tuple[torch.Tensor, list[RouterTotals]]:
        """Counts of this process's rows -> of the whole batch."""
        if self.batch_group is None:
            return num_labels, totals
        counts = torch.cat([num_labels[None].float(), *(part.reshape(-1) for total in totals for part in total)])
        torch.distributed.all_reduce(counts, group=self.batch_group)
        E = totals[0].slots_E.shape[0]
        layers = [RouterTotals(part[:E], part[E]) for part in counts[1:].split(E + 1)]
        return counts[0], layers

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Each copy of a row gets the row's images, whole: transformers would repeat every patch by itself."""
        pixel_values, image_grid = kwargs.pop("pixel_values", None), kwargs.pop("image_grid", None)
        if expand_size > 1 and pixel_values is not None:
            images = list(zip(pixel_values.split(image_grid.prod(-1).tolist()), image_grid.split(1), strict=True))
            tokens_I = torch.tensor([self.config.image_tokens(len(patches)) for patches, _ in images])
            ends_B = self.model.is_image(input_ids).sum(-1).cumsum(-1).cpu()
            rows = torch.searchsorted(ends_B, tokens_I.cumsum(-1)).clamp(max=len(ends_B) - 1).tolist()
            copies = [
                image
                for row in range(len(ends_B))
                for _ in range(expand_size)
                for image, its_row in zip(images, rows, strict=True)
                if its_row == row
            ]
            pixel_values, image_grid = (torch.cat(column) for column in zip(*copies, strict=True))
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | {"pixel_values": pixel_values, "image_grid": image_grid}

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, image_grid=None, **kwargs):
        """The images go with the first tokens. They are kept from transformers, which gives an assistant model none."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get(CACHE)
        if cache is None or cache.get_seq_length() == 0:
            return inputs | {"pixel_values": pixel_values, "image_grid": image_grid}
        new_ids_BT = inputs["input_ids"]
        if new_ids_BT.shape[1] > 1 and self.model.is_image(new_ids_BT).any():
            raise PromptError(
                f"the prompt has images after the first {cache.get_seq_length()} tokens, which the cache "
                f"holds already; give the whole prompt and all of its images again, without {CACHE}"
            )
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        """The padding as it is: our mask is made of it. For a static cache transformers would make a causal one."""
        return attention_mask
