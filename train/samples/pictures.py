"""What a person looks at: grids of images as PNG files, of videos as animated GIFs."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ..files import write_atomic

FPS = 8  # of animations


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
    """One PNG per image, one GIF per video."""
    return [save_picture(image, folder / name) for image, name in zip(images, names)]


def picture_grid(images: np.ndarray, columns: int = 0) -> np.ndarray:
    """`image_grid`, of videos [N, F, H, W, 3] frame by frame: [F, ..., 3] uint8."""
    if images.ndim == 4:
        return image_grid(images, columns)
    return np.stack([image_grid(frame, columns) for frame in np.moveaxis(images, 1, 0)])


def save_picture(picture: np.ndarray, stem: str | Path) -> Path:
    """Writes [H, W, 3] as stem.png, or the frames [F, H, W, 3] of a video as stem.gif.

    Raises:
        UserError: as `save_png`.
    """
    path = Path(f"{stem}.gif" if picture.ndim == 4 else f"{stem}.png")
    if picture.ndim == 3:
        return save_png(picture, path)
    first, *rest = map(Image.fromarray, picture)
    buffer = io.BytesIO()
    first.save(
        buffer, format="GIF", save_all=True, append_images=rest, duration=1000 // FPS, loop=0
    )
    write_atomic(path, buffer.getvalue())
    return path


def save_mp4(frames: np.ndarray, stem: str | Path) -> Path | None:
    """Writes the frames [F, H, W, 3] uint8 of a video as stem.mp4; None, and nothing is written,
    where the package imageio-ffmpeg, which carries an encoder, is not installed.

    Raises:
        UserError: as `save_png`.
    """
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    even = np.pad(frames, [(0, 0), (0, -frames.shape[1] % 2), (0, -frames.shape[2] % 2), (0, 0)])
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "video.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(made), even.shape[2:0:-1], fps=FPS, macro_block_size=2
        )
        writer.send(None)  # it is a generator that waits for frames
        for frame in even:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        write_atomic(Path(f"{stem}.mp4"), made.read_bytes())
    return Path(f"{stem}.mp4")
