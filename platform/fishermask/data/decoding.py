"""Conversion of a picture to the channels and the size that the settings request."""

import numpy as np
from PIL import Image

from fishermask.config import DataConfig


def is_gray(config: DataConfig, stored_as_gray: bool) -> bool:
    """Return whether images become gray, with one channel; otherwise they become RGB, with three."""
    return stored_as_gray if config.channels == "keep" else config.channels == "gray"


def picture_to_pixels(picture: Image.Image, gray: bool, image_size: int | None) -> np.ndarray:
    """Return uint8 [channels, height, width]. Gray is the luma of PIL; a gray picture as RGB repeats its channel."""
    picture = picture.convert("L" if gray else "RGB")
    if image_size is not None and picture.size != (image_size, image_size):
        picture = picture.resize((image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return pixels[None] if gray else pixels.transpose(2, 0, 1)
