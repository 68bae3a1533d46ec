"""Batches of labelled videos as pure functions of (seed, step, row)."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from ..schema import VideoData
from .batches import RowOrder, StepDataset, pick, row_uniforms
from .crops import center_crop, check_size, resize_shorter, to_unit
from .image_arrays import ArrayImages, BuiltinImages
from .image_dataset import classes_hash, describe
from .image_sources import Subset, hold_out
from .images import group_by_name, is_array_file
from .sources import SPLITS

FORMAT_VERSION = 1  # of the batches: raise it when the same config would give other ones
BUILTIN = "builtin:moving_digits"
DIGIT = 8  # least side of a moving digit: that of the scans
SLOWEST, FASTEST = 0.5, 1.5  # pixels per frame and 8 pixels of a digit's side


class MovingDigits(BuiltinImages):
    """Scikit-learn's digits (`builtin:digits`), each moving through a black frame and bouncing off
    its edges (after Moving MNIST, Srivastava et al. 2015, arXiv 1502.04681, with one digit).

    Args:
        size: side of a frame; a digit is half as wide, but at least 8 pixels.

    Raises:
        UserError: frames without room to move.
    """

    def __init__(self, size: int):
        if size <= DIGIT:
            raise UserError(
                f"data.size={size} leaves digits of {DIGIT} pixels no room to move; set "
                f"data.size={2 * DIGIT} or more"
            )
        super().__init__("builtin:digits")
        self.size, self.side = size, max(DIGIT, size // 2)

    def clip(self, i: int, frames: int, stride: int, draws: np.ndarray) -> tuple[np.ndarray, int]:
        """([frames, size, size, 3] uint8, label) of digit i; `draws` [4] in [0, 1) say where it
        starts (row, column), how fast it is, and where it goes."""
        digit, label = self.read(i)
        if self.side != DIGIT:
            picture = Image.fromarray(digit)
            digit = np.asarray(picture.resize((self.side,) * 2, Image.Resampling.BICUBIC))
        room = self.size - self.side
        speed = (SLOWEST + (FASTEST - SLOWEST) * draws[2]) * self.side / DIGIT
        angle = 2 * math.pi * draws[3]
        at = (
            np.arange(frames)[:, None]
            * stride
            * speed
            * np.array([[math.sin(angle), math.cos(angle)]])
        )
        places = np.floor(bounce(room * draws[:2] + at, room) + 0.5).astype(int)
        clip = np.zeros((frames, self.size, self.size, 3), np.uint8)
        for frame, (top, left) in zip(clip, places):
            frame[top : top + self.side, left : left + self.side] = digit
        return clip, label


def bounce(at: np.ndarray, room: float) -> np.ndarray:
    """Where a point is that is reflected at 0 and `room`: a triangle wave of period 2 room."""
    return room - np.abs(np.mod(at, 2 * room) - room)


class ArrayVideos(ArrayImages):
    """Videos in .npy and .npz files, as `ArrayImages`: uint8 [N, F, H, W, 3] or [N, F, H, W, 1]."""

    what, axes = "videos", 5

    def clip(self, i: int, frames: int, stride: int, draws: np.ndarray) -> tuple[np.ndarray, int]:
        """([frames, H, W, 3] uint8, label) of video i; draws[0] in [0, 1) says where the clip
        starts.

        Raises:
            UserError: the video is too short.
        """
        video, label = self.read(i)
        free = len(video) - (frames - 1) * stride
        if free < 1:
            raise UserError(
                f"{self.name(i)} has {len(video)} frames, data.frames={frames} data.stride={stride}"
                f" take {1 + (frames - 1) * stride}; lower one of them"
            )
        start = pick(draws[0], free)
        return video[start : start + (frames - 1) * stride + 1 : stride], label


class VideoReader:
    """What the reader threads and processes hold: the videos, their order, and how they are cut."""

    def __init__(self, videos, config: VideoData, *, split: str, seed: int, batch_size: int):
        self.training = split == "train"
        self.videos, self.seed, self.batch_size = videos, seed, batch_size
        self.order = RowOrder(
            len(videos), batch_size, endless=self.training,
            seed=seed if self.training and config.shuffle else None,
        )  # fmt: skip
        self.num_batches = self.order.num_batches
        subset = isinstance(videos, Subset)
        self.source = videos.images if subset else videos
        self.numbers = videos.indices if subset else None
        self.size, self.frames, self.stride = config.size, config.frames, config.stride

    def read(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `rows` of batch `step`; see VideoDataset."""
        indices = self.order.indices(step, rows)
        if self.training:
            draws = row_uniforms(self.seed, step, rows, 4)
        else:  # of the video alone, whatever the batch size
            draws = row_uniforms(0, 0, indices, 4)
            draws[:, 0] = draws[:, 0] if isinstance(self.source, MovingDigits) else 0.5
        count, size = len(indices), self.size
        batch = {
            "videos": np.zeros((count, self.frames, size, size, 3), np.float32),
            "labels": np.zeros(count, np.int32),
            "valid": indices < len(self.videos),
        }
        for k in np.flatnonzero(batch["valid"]):
            i = int(indices[k] if self.numbers is None else self.numbers[indices[k]])
            clip, batch["labels"][k] = self.source.clip(i, self.frames, self.stride, draws[k])
            if clip.shape[1:3] != (size, size):
                check_size(clip[0], size, lambda i=i: self.source.name(i))
                clip = np.stack(
                    [center_crop(resize_shorter(f, size, "bicubic"), size) for f in clip]
                )
            batch["videos"][k] = to_unit(clip)
        return batch


class VideoDataset(StepDataset):
    """Batches of labelled videos of one split. Made by `open_video_data`.

    A batch holds videos: [R, frames, size, size, 3] float32 in [-1, 1]; labels: [R] int32; valid:
    [R] bool, False in the rows past the end of an evaluation split, whose videos and labels are
    zero.

    Attributes:
        fingerprint, num_batches: see StepDataset.
        num_classes, class_names: K, and K names; class ids are positions in them.
        description: e.g. "1,707 videos of 10 classes".
    """

    read_ahead = 4

    def __init__(self, reader: VideoReader, *, fingerprint: dict, workers: int):
        super().__init__(reader, fingerprint=fingerprint, workers=workers)
        self.class_names = reader.videos.class_names
        self.num_classes = len(self.class_names)
        described = describe(len(reader.videos), self.num_classes)
        self.description = described.replace("image", "video", 1)


def open_video_data(config: VideoData, *, split: str, seed: int, batch_size: int) -> VideoDataset:
    """Opens one split of labelled videos.

    Args:
        config: the data section of a Run.
        split: "train" (endless, shuffled, clips from anywhere), "validation" or "test" (in order,
            each video once, its middle; the last batch filled with rows that are not valid).
        seed: of the training order, the clips, and the motion of digits.
        batch_size: global rows.

    Raises:
        UserError: whatever the user can mend: missing or unreadable files, videos that are too
            short or small, settings out of range.
    """
    for name in ("size", "frames", "stride"):
        if getattr(config, name) < 1:
            raise UserError(f"data.{name}={getattr(config, name)} must be at least 1")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    videos = find_videos(config, split)
    reader = VideoReader(videos, config, split=split, seed=seed, batch_size=batch_size)
    reader.source.clip(0, config.frames, config.stride, np.zeros(4))  # its errors come first
    fingerprint = {
        "format": FORMAT_VERSION,
        "split": split,
        "kind": "videos",
        "source": videos.fingerprint,
        "classes": classes_hash(videos.class_names),
        "size": config.size,
        "frames": config.frames,
        "stride": config.stride,
        "batch_size": batch_size,
        "shuffle": split == "train" and config.shuffle,
        "seed": seed,
    }
    return VideoDataset(reader, fingerprint=fingerprint, workers=config.workers)


def find_videos(config: VideoData, split: str):
    """The labelled videos of one split; test is validation where there is none of its own. Without
    validation files `validation_fraction` of the videos of every class are held out.

    Raises:
        UserError: missing, empty or unreadable data, or the split is empty.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {SPLITS}")
    if not 0 <= config.validation_fraction < 1:
        raise UserError(
            f"data.validation_fraction={config.validation_fraction} must be at least 0 and below 1"
        )
    splits = _open(config)
    if "validation" not in splits:
        train, held_out = hold_out(splits["train"], config.validation_fraction)
        splits |= {"train": train} | ({"validation": held_out} if len(held_out) else {})
    found = splits.get(split, splits.get("validation") if split == "test" else None)
    if found is None:
        raise UserError(
            f"data.path={config.path!r} leaves no {split} videos with data.validation_fraction="
            f"{config.validation_fraction}; set a fraction such as 0.05, or give more videos"
        )
    return found


def _open(config: VideoData) -> dict[str, object]:
    """The splits that the source itself has."""
    if config.path.startswith("builtin:"):
        if config.path != BUILTIN:
            raise UserError(f"data.path={config.path!r} is unknown; built-in videos are {BUILTIN}")
        return {"train": MovingDigits(config.size)}
    path = os.path.expanduser(config.path)
    found = (
        sorted(Path(path).iterdir()) if os.path.isdir(path) else map(Path, sorted(glob.glob(path)))
    )
    files = [f for f in found if is_array_file(f) and not f.name.endswith(".labels.npy")]
    if not files:
        raise UserError(
            f"data.path={config.path!r}: no .npy or .npz file there (looked in {os.getcwd()}); "
            f"correct it or use {BUILTIN!r}"
        )
    return _by_name(files, config.path)


def _by_name(files: Sequence[Path], path: str) -> dict[str, ArrayVideos]:
    groups = group_by_name(list(files))
    if not groups["train"]:
        raise UserError(
            f"data.path={path!r} holds no training videos ({len(files)} files named after other "
            "splits); add some or rename a file"
        )
    train = ArrayVideos(groups["train"])
    rest = {s: groups[s] for s in ("validation", "test") if groups[s]}
    return {"train": train} | {s: ArrayVideos(g, train.class_names) for s, g in rest.items()}
