"""Pictures a person looks at: grids of images as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from .files import write_atomic


def to_uint8(images: np.ndarray | jax.Array) -> np.ndarray:
    """Images in [-1, 1] as the bytes of their files, of any shape: floor of clip(127.5 x + 128, 0,
    255), which rounds to the nearest level (as LlamaGen does). uint8 passes through.

    Raises:
        ValueError: other integers.
    """
    if images.dtype == np.uint8:
        return np.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are uint8, or float in [-1, 1], got {images.dtype}")
    xp = jnp if isinstance(images, jax.Array) else np  # on the device: bytes are less to fetch
    levels = xp.clip(127.5 * images.astype(np.float32) + 128, 0, 255)
    return np.asarray(levels.astype(np.uint8))


def image_grid(
    images: np.ndarray, columns: int = 0, *, gap: int = 2, enlarge: int = 0
) -> np.ndarray:
    """Images side by side on white.

    Args:
        images: [N, H, W, 3] uint8.
        columns: of the grid; 0 makes it about square.
        gap: pixels between images.
        enlarge: whole factor by which small images are enlarged; 0 brings them to >= 48 pixels.

    Returns:
        [rows * (H + gap) + gap, ..., 3] uint8.
    """
    count, height, width, _ = images.shape
    factor = enlarge or max(1, math.ceil(48 / height))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[y : y + height, x : x + width] = image
    return canvas


def save_png(image: np.ndarray, path: str | Path) -> Path:
    """Write [H, W, 3] uint8 as a PNG file, whole or not at all.

    Raises:
        UserError: the disk is full or the path cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())
    return Path(path)


def save_each(images: np.ndarray, folder: Path, names: Sequence[str]) -> list[Path]:
    """One PNG per image."""
    return [save_png(image, folder / f"{name}.png") for image, name in zip(images, names)]
