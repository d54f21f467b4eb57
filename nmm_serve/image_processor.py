"""Images to patches, for every engine: the one implementation, in transformers' shape."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend

from nmm_serve.errors import ImageError
from nmm_serve.images import fit_to_patches, image_grid
from nmm_serve.models.vision import patchify


class NMMImageProcessor(PilBackend):
    """Scale an image to about `image_size` squared pixels, aspect ratio kept, and cut it into raw patches; with
    `native_resolution` an image that is smaller keeps its size.

    Output: `pixel_values` [patches of all images, 3 * patch_size^2] float32 in [-1, 1] and `image_grid`
    [images, 2] rows and columns of patches. With `raw_pixels`, `pixel_values` are the images' uint8 pixels in the same
    shape, for the model to normalise and cut (see `nmm_serve.kernels.image_front`).
    """

    model_input_names = ["pixel_values", "image_grid"]  # noqa: RUF012
    raw_pixels = False

    def __init__(
        self,
        patch_size: int = 14,
        image_size: int = 224,
        pool_image: bool = False,
        native_resolution: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.image_size = image_size
        self.pool_image = pool_image
        self.native_resolution = native_resolution

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps. `raw_pixels` is how one process hands images over, no property of a model."""
        return {name: value for name, value in super().to_dict().items() if name != "raw_pixels"}

    @property
    def max_image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches that an image of this size gets. Raises ImageError past 16:1."""
        return image_grid(width, height, self.patch_size, self.image_size, self.native_resolution)

    def patches(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """One image -> ([rows*cols, 3*patch_size^2] float32, or uint8 with `raw_pixels`; (rows, cols))."""
        return self.cut(fit_to_patches(image, self.patch_size, self.image_size, self.native_resolution))

    def cut(self, pixels_HWC: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        """The same for pixels that `fit_to_patches` gave."""
        rows, cols = pixels_HWC.shape[0] // self.patch_size, pixels_HWC.shape[1] // self.patch_size
        pixels = torch.from_numpy(pixels_HWC)
        if self.raw_pixels:
            return pixels.view(rows * cols, -1), (rows, cols)
        return patchify(pixels, self.patch_size), (rows, cols)

    def preprocess(self, images, return_tensors=None, **kwargs) -> BatchFeature:
        """One image or a list of images (PIL, or uint8 arrays of shape [H, W, 3] or [H, W])."""
        if isinstance(images, (Image.Image, np.ndarray, torch.Tensor)):
            images = [images]
        results = [self.patches(as_pil(image)) for image in images]
        data = {
            "pixel_values": torch.cat([patches for patches, _ in results])
            if results
            else torch.empty((0, 3 * self.patch_size**2), dtype=torch.uint8 if self.raw_pixels else torch.float32),
            "image_grid": torch.tensor([grid for _, grid in results], dtype=torch.long).view(-1, 2),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)

    def __call__(self, images, *args, **kwargs) -> BatchFeature:
        return self.preprocess(images, *args, **kwargs)


def takes_raw_pixels(device: str) -> bool:
    """Where a model is given raw pixels: on a GPU, where one kernel does the rest and a quarter of the bytes cross."""
    return torch.device(device).type == "cuda"


def as_pil(image) -> Image.Image:
    """Arrays must be uint8 and channels-last: guessing the layout of a 3-pixel-wide image is how engines crash."""
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)):
        raise ImageError(
            f"an image array must be uint8 of shape [H, W, 3] or [H, W], not {array.dtype} {list(array.shape)}"
        )
    return Image.fromarray(array)
