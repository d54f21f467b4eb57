"""The way from raw patches to decoder inputs: one linear layer (early), or a ViT and a connector (late).

Legend: P patches of all images, R = rows*cols patches of one image, I images, K numbers in a patch, D width.
"""

import torch
from torch import nn

from nmm_serve.images import MAX_ASPECT_RATIO
from nmm_serve.kernels.image_front import cut_image, image_front, normalise, patch_positions
from nmm_serve.models.blocks import EncoderLayer, RMSNorm


def max_grid_side(config) -> int:
    """Rows or columns of patches at the largest aspect ratio: a 16:1 image of equal area is 4 times as long."""
    return config.image_size // config.patch_size * int(MAX_ASPECT_RATIO**0.5)


class PositionTable(nn.Embedding):
    """Rows or columns. It starts at N(0, 1): Adam moves every weight alike, so the projection of a patch, with its
    hundreds of inputs, soon gives numbers of about 6; a position of a tenth beside them would not be heard."""


class PatchEmbed(nn.Module):
    """One linear projection of raw RGB patches, plus a learned position of the row and of the column.

    The paper does not say how early fusion tells an image's shape; two tables cost nothing and allow any aspect ratio.
    """

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.patch_dim, config.vision_width, bias=False)
        self.row_embed = PositionTable(max_grid_side(config), config.vision_width)
        self.col_embed = PositionTable(max_grid_side(config), config.vision_width)

    def forward(self, patches_PK: torch.Tensor, grid_I2: torch.Tensor) -> torch.Tensor:
        """float patches in [-1, 1], or uint8 pixels as `image_front` takes them, which is one launch on a GPU."""
        weight_DK = self.proj.weight
        if patches_PK.dtype == torch.uint8:
            device = weight_DK.device.type
            if torch.is_autocast_enabled(device):  # knows nothing of our ops
                weight_DK = weight_DK.to(torch.get_autocast_dtype(device))
            return image_front(patches_PK, grid_I2, weight_DK, self.row_embed.weight, self.col_embed.weight)
        row_P, col_P = patch_positions(grid_I2, patches_PK.shape[0])
        position_PD = self.row_embed(row_P) + self.col_embed(col_P)
        return self.proj(patches_PK.to(weight_DK.dtype)) + position_PD


class VisionEncoder(nn.Module):
    """The ViT of late fusion. Images of one batch may differ in size: they are padded and masked."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_PD: torch.Tensor, grid_I2: torch.Tensor) -> torch.Tensor:
        lengths = grid_I2.prod(-1).tolist()
        if len(set(lengths)) == 1:
            x_IRD, mask_I1RR = x_PD.view(len(lengths), lengths[0], -1), None
        else:
            x_IRD = nn.utils.rnn.pad_sequence(x_PD.split(lengths), batch_first=True)
            length_I = torch.tensor(lengths, device=x_PD.device)
            real_IR = torch.arange(x_IRD.shape[1], device=x_PD.device) < length_I[:, None]
            mask_I1RR = real_IR[:, None, None, :].expand(-1, 1, x_IRD.shape[1], -1)
        for layer in self.layers:
            x_IRD = layer(x_IRD, mask_I1RR)
        x_IRD = self.norm(x_IRD)
        return x_IRD.flatten(0, 1) if mask_I1RR is None else x_IRD[real_IR]


def build_encoder(config) -> nn.Module:
    """Our ViT, or the encoder of transformers that the config names."""
    if config.pretrained is None:
        return VisionEncoder(config)
    from nmm_serve.models.pretrained_vision import PretrainedEncoder

    return PretrainedEncoder(config)


def image_tokens(front, config, pixels_PK: torch.Tensor, grid_I2: torch.Tensor) -> torch.Tensor:
    """Patches to decoder inputs through the modules of `front`, a model of any engine: [P, D], or [I, D] where images
    are pooled. A grid on the host, as vLLM has it, lets an encoder read its numbers without waiting for the device."""
    if config.encoder is not None and config.encoder.pretrained is not None:
        return front.connector(front.vision(pixels_PK, grid_I2, config.pool_image))
    x_PD = front.patch_embed(pixels_PK, grid_I2.to(pixels_PK.device))
    if config.encoder is None:
        return x_PD
    x_PD = front.vision(x_PD, grid_I2)
    if config.pool_image:
        x_PD = torch.stack([x_RD.mean(0) for x_RD in x_PD.split(grid_I2.prod(-1).tolist())])
    return front.connector(x_PD)


def patchify(pixels_HWC: torch.Tensor, patch_size: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> float32 [rows*cols, patch_size*patch_size*3] in [-1, 1], patches in reading order.

    The one definition of "image to patches"; the trainer and every engine use it.
    """
    return normalise(cut_image(pixels_HWC, patch_size))
