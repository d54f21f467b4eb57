"""CLIP's and SigLIP's image encoders in the place of our ViT, as transformers has them.

Legend: P patches of all images, I images, K numbers in a patch, p patch size, R C rows and columns of patches, D width.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from nmm_serve.kernels.image_front import cut_patches, normalise


class PretrainedEncoder(nn.Module):
    """The whole encoder with its own patch layer and positions, which are interpolated for images of other shapes.

    It gives its last hidden states, for CLIP without the class token and before the norm that follows it.
    """

    def __init__(self, config):
        super().__init__()
        theirs = AutoConfig.for_model(**config.pretrained)
        self.patch_size = theirs.patch_size
        self.mean, self.std = config.image_mean, config.image_std
        self.has_class_token = theirs.model_type == "clip_vision_model"
        model = AutoModel.from_config(theirs, attn_implementation="sdpa")
        self.tower = getattr(model, "vision_model", model)

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.encoder.layers

    def forward(self, patches_PK: torch.Tensor, grid_I2: torch.Tensor, pooled: bool) -> torch.Tensor:
        """Patches in [-1, 1], or raw uint8 pixels, to [P, D], or with `pooled` to one row an image, [I, D]."""
        if patches_PK.dtype == torch.uint8:
            patches_PK = normalise(cut_patches(patches_PK, grid_I2))
        sizes = [tuple(size) for size in grid_I2.tolist()]
        images = patches_PK.split([rows * cols for rows, cols in sizes])
        found: dict[int, torch.Tensor] = {}
        for size in dict.fromkeys(sizes):  # images of one shape go together
            indices = [index for index, other in enumerate(sizes) if other == size]
            output = self.tower(
                self.pixels(torch.stack([images[i] for i in indices]), *size), interpolate_pos_encoding=True
            )
            if pooled:
                states = output.pooler_output[:, None]
            else:
                states = output.last_hidden_state[:, 1:] if self.has_class_token else output.last_hidden_state
            found |= dict(zip(indices, states, strict=True))
        return torch.cat([found[index] for index in range(len(sizes))])

    def pixels(self, x_IPK: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
        """Patches of images of one shape to [I, 3, R*p, C*p], normalised as the encoder was trained."""
        p = self.patch_size
        x = x_IPK.view(-1, rows, cols, p, p, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * p, cols * p)
        mean_3, std_3 = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((x + 1) / 2 - mean_3) / std_3
