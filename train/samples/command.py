"""Sampling from a trained run: text streamed to the terminal, images to files."""

from __future__ import annotations

import codecs
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import jax
import matplotlib.image
import numpy as np
import tqdm

from ...model.sampling import pack_prompts
from ..errors import UserError
from ..files import write_atomic, write_error
from ..loaded.text import CHUNK, LoadedText, draw_settings, stream_text, text_stream
from ..schema import Run, Sample


def sample_text(
    loaded: LoadedText,
    sample: Sample,
    *,
    seed: int = 0,
    out: TextIO | None = None,
    save: bool = True,
) -> list[str]:
    """Continue `sample.prompt` in `sample.rows` ways, printing the first one as it is drawn.

    A run on images draws images instead; see `sample_images`.

    Args:
        loaded: the run.
        sample: what to draw.
        seed: of the draws; the same seed gives the same rows.
        out: where to print; standard output unless given.
        save: also write the rows to the samples/ folder of the run.

    Returns:
        The continuations, without the prompt.
    """
    out = sys.stdout if out is None else out
    if draws_images(loaded.config):
        sample_images(loaded, sample, seed=seed, out=out)
        return []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a chunk may end inside a character
    rows = [bytearray() for _ in range(sample.rows)]
    _heading(out, 0, sample.rows)
    _write(out, sample.prompt)
    for new in stream_text(loaded, [sample.prompt] * sample.rows, sample, seed=seed):
        for row, piece in zip(rows, new):
            row += piece
        _write(out, decoder.decode(new[0]))
    _write(out, decoder.decode(b"", final=True) + "\n")
    texts = [bytes(row).decode("utf-8", "replace") for row in rows]
    for i, text in enumerate(texts[1:], start=1):
        _heading(out, i, sample.rows)
        _write(out, f"{sample.prompt}{text}\n")
    if save and loaded.path is not None:
        write_samples(loaded.path, [sample.prompt + text for text in texts], loaded.step, seed)
    return texts


def _heading(out: TextIO, row: int, rows: int) -> None:
    if rows > 1:
        _write(out, f"--- {row + 1} of {rows}\n")


def _write(out: TextIO, text: str) -> None:
    """Print at once; a terminal gets no control characters, and none it cannot show."""
    if out.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    encoding = getattr(out, "encoding", None) or "utf-8"
    out.write(text.encode(encoding, "replace").decode(encoding))
    out.flush()


def write_samples(run_dir: str | Path, texts: Sequence[str], step: int, seed: int) -> list[Path]:
    """Write samples/step<step>-seed<seed>-<row>.txt, one file per row, replacing older ones of
    that name."""
    paths = []
    for row, text in enumerate(texts):
        paths.append(Path(run_dir) / "samples" / f"step{step:08d}-seed{seed}-{row}.txt")
        write_atomic(paths[-1], text)
    return paths


def draws_images(run: Run) -> bool:
    """Whether the sequences of a run are images (RGB bytes) and not text."""
    arrays = run.data.path.lower().endswith((".npy", ".npz"))
    return run.data.format == "images" or (run.data.format == "auto" and arrays)


def sample_images(
    loaded: LoadedText, sample: Sample, *, seed: int = 0, out: TextIO | None = None
) -> list[Path]:
    """Draw `sample.rows` square RGB images and write them to samples/*.png; no special id is ever
    drawn.

    Raises:
        UserError: the sequence length is not 3 * side * side.
    """
    out = sys.stdout if out is None else out
    length = loaded.config.data.sequence_len
    side = math.isqrt(length // 3)
    if 3 * side * side != length:
        raise UserError(
            f"data.sequence_len={length} is not 3 x side x side: this run's images are not square, "
            "use loaded.sampler from Python and reshape its tokens - 3 yourself"
        )
    stream = text_stream(loaded, length, never=(0, 1, 2))
    tokens, lengths = pack_prompts([()] * sample.rows)
    state = stream.init(loaded.decoding_variables, jax.random.key(seed), tokens, lengths)
    settings = draw_settings(sample)
    pieces = []
    bar = tqdm.tqdm(
        total=length, unit="tokens", desc="sampling", disable=not out.isatty(), file=out
    )
    with bar:
        for _ in range(0, length, CHUNK):
            new, state = stream.next(loaded.decoding_variables, state, **settings)
            pieces.append(np.asarray(new))
            bar.update(CHUNK)
    pixels = (np.concatenate(pieces, axis=1)[:, :length] - 3).astype(np.uint8)
    folder = Path(loaded.path or ".") / "samples"
    paths = []
    for row, image in enumerate(pixels.reshape(sample.rows, side, side, 3)):
        paths.append(folder / f"step{loaded.step:08d}-seed{seed}-{row}.png")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            matplotlib.image.imsave(paths[-1], image)
        except OSError as error:
            raise write_error(error, paths[-1]) from error
        _write(out, f"{paths[-1]}\n")
    return paths
