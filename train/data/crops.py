"""Images as squares of a fixed size: resizing of the shorter side, crops, mirrored images, views.

Arrays are [height, width, 3] uint8; the pixel value p becomes p / 127.5 - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from ..errors import UserError

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
VIEWS = {"center": 1, "flip": 2, "ten": 10}  # crops per image
LARGEST_ENLARGEMENT = 8


def check_size(image: np.ndarray, size: int, name: Callable[[], str]) -> None:
    """Refuses an image with less than 1/8 of the wanted pixels a side; others are enlarged.

    Raises:
        UserError: names the image and both sizes.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter * LARGEST_ENLARGEMENT < size:
        raise UserError(
            f"{name()} has {width} x {height} pixels, less than 1/{LARGEST_ENLARGEMENT} of size="
            f"{size}; remove it, or set a size of at most {shorter * LARGEST_ENLARGEMENT}"
        )


def resize_shorter(image: np.ndarray, side: int, filter: str) -> np.ndarray:
    """Resizes an image so that its shorter side has `side` pixels; the longer one keeps the aspect.

    "bicubic" is the preprocessing of ADM (Dhariwal and Nichol 2021), used by LlamaGen: while the
    shorter side is at least 2 * side, both sides are halved (rounded down) by a box filter; then
    one bicubic step, the longer side rounded to nearest. "lanczos" and "nearest" resize in one
    step, the longer side rounded down, as common image pipelines do (AiM's recipe).

    Args:
        image: [H, W, 3] uint8.
        side: wanted pixels of the shorter side.
        filter: one of FILTERS.

    Returns:
        [H', W', 3] uint8, min(H', W') = side.
    """
    picture = Image.fromarray(image)
    width, height = picture.size
    if filter == "bicubic":
        while min(width, height) >= 2 * side:
            width, height = width // 2, height // 2
            picture = picture.resize((width, height), Image.Resampling.BOX)
        scale = side / min(width, height)
        target = (round(width * scale), round(height * scale))
    else:
        shorter = min(width, height)
        target = (side * width // shorter, side * height // shorter)
    if target != picture.size:
        picture = picture.resize(target, FILTERS[filter])
    return np.asarray(picture)


def crop(image: np.ndarray, size: int, top: int, left: int) -> np.ndarray:
    """The square of `size` pixels whose first pixel is (top, left)."""
    return image[top : top + size, left : left + size]


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The square of `size` pixels in the middle; of two middles the upper left one."""
    height, width = image.shape[:2]
    return crop(image, size, (height - size) // 2, (width - size) // 2)


def views_of(image: np.ndarray, *, resize: float, size: int, filter: str, views: str) -> np.ndarray:
    """The crops of one image that are encoded ahead of training.

    The image is resized and cut at its centre to a square of floor(resize * size) pixels, from
    which squares of `size` pixels are taken: the centre ("center"); the centre and its mirror image
    ("flip"); or ten ("ten"): top left, top right, bottom left, bottom right, centre, then the same
    of the mirrored square (LlamaGen's code caching).

    Returns:
        [V, size, size, 3] uint8, V = VIEWS[views].
    """
    side = math.floor(resize * size + 1e-9)  # 1e-9: 1.15 * 20 is 23, whatever its last bit says
    square = center_crop(resize_shorter(image, side, filter), side)
    if views == "center":
        return center_crop(square, size)[None]
    if views == "flip":
        middle = center_crop(square, size)
        return np.stack([middle, middle[:, ::-1]])
    end = side - size
    corners = [(0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2)]
    return np.stack(
        [crop(s, size, top, left) for s in (square, square[:, ::-1]) for top, left in corners]
    )


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [-1, 1]: p / 127.5 - 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
