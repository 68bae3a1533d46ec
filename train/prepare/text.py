"""`lintime prepare text`: features of captions, computed once, in the order of their images."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from ..data.image_sources import find_image_splits
from ..data.text_features import Shard, TextInfo, has_shard, write_shard
from ..data.tokens import progress
from ..encoders.text import LoadedTextEncoder
from ..errors import UserError
from ..files import write_atomic
from ..schema import ImageData

SHARD_SIZE = 1024  # captions; at 120 tokens of 4,096 features a shard has 1 GB


def read_captions(images, root: str | Path, table: str | Path = "") -> list[tuple[str, ...]]:
    """The captions of every image of a split, one or more of each.

    Args:
        images: see `find_image_splits`.
        root: the folder that the names of a table start from.
        table: .jsonl of {"file": .., "caption": ..} or .csv with these columns, a row for every
            caption; "" reads NAME.txt beside the image NAME.png, a line for every caption.

    Raises:
        UserError: an image without a caption, or a table that cannot be read.
    """
    names = [images.name(i) for i in range(len(images))]
    if table:
        held = _read_table(Path(table).expanduser())
        root = Path(root).expanduser()
        keys = [_below(Path(name), root) for name in names]
        lacking = [key for key in keys if key not in held]
        if lacking:
            raise UserError(
                f"{table} has no caption for {len(lacking)} of {len(keys)} images, the first is "
                f"{lacking[0]}; its files are named from {root}"
            )
        return [held[key] for key in keys]
    captions = []
    for name in names:
        file = Path(name).with_suffix(".txt")
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(
                f"no caption for {name}: cannot read {file} ({error}); write it there, or name a "
                "table with --captions"
            ) from error
        captions.append(tuple(filter(None, map(str.strip, lines))) or ("",))
    return captions


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _read_table(path: Path) -> dict[str, tuple[str, ...]]:
    """{file: captions, in the order of their rows}.

    Raises:
        UserError: not there, of another kind, or a row without both.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets mark their files
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            raise UserError(f"{path}: captions come from a .jsonl or .csv file")
        found: dict[str, tuple[str, ...]] = {}
        for row in rows:
            found[row["file"]] = (*found.get(row["file"], ()), row["caption"].strip())
        return found
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error}); name a .jsonl or .csv file with --captions"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read captions from {path} ({type(error).__name__}: {error}); every row needs "
            "file and caption"
        ) from error


def prepare_text(
    images: ImageData,
    encoder: LoadedTextEncoder,
    out: str | Path,
    *,
    captions: str | Path = "",
    batch_size: int = 64,
    shard_size: int = SHARD_SIZE,
    say: Callable[[str], None] = print,
) -> TextInfo:
    """Encodes the captions of images once, or continues where that was interrupted. One process.

    Args:
        images: the source; its `path` and `validation_fraction` are used.
        encoder: of the features.
        out: folder to make or to continue.
        captions: see `read_captions`.
        batch_size: captions encoded at a time.
        shard_size: captions per shard.
        say: takes a line for the user.

    Returns:
        What the folder holds.

    Raises:
        UserError: a missing caption, features that are not finite, or `out` holds features of
            another encoder, other captions or settings, or files of another kind.
    """
    if batch_size < 1 or shard_size < 1:
        raise UserError(f"batch={batch_size} and shard size {shard_size} must be at least 1")
    out = Path(out).expanduser()
    splits = find_image_splits(images)
    texts = {}  # split: (number of the image, caption) of every caption
    for split, found in splits.items():
        of_images = read_captions(found, images.path, captions)
        texts[split] = [(i, text) for i, some in enumerate(of_images) for text in some]
    info = TextInfo(
        encoder=encoder.fingerprint,
        place=str(encoder.path.resolve()) if encoder.path else "",
        length=encoder.length,
        width=encoder.width,
        pooled_width=encoder.pooled_width,
        source={split: found.fingerprint for split, found in splits.items()},
        captions={split: _hash(found) for split, found in texts.items()},
        splits={split: len(found) for split, found in texts.items()},
        images={split: len(found) for split, found in splits.items()},
        shard_size=shard_size,
    )
    done, plan = out / "text.json", out / "text.unfinished.json"
    _compare_with(out, info, done, plan)
    wanted = [(split, shard) for split in info.splits for shard in info.shards(split)]
    of_shard = lambda split, shard: [texts[split][i] for i in info.shard_range(split, shard)]
    missing = [at for at in wanted if not has_shard(out, info, *at, _hash(of_shard(*at)))]
    if not missing and done.exists():
        write_atomic(done, info.to_json())  # where the encoder is now
        say(f"{out} already holds the features of {sum(info.splits.values()):,} captions")
        return info
    if not done.exists():
        write_atomic(plan, info.to_json())
    total = sum(len(info.shard_range(*at)) for at in missing)
    with progress(total, "encoding", unit=" captions") as bar:
        for split, shard in missing:
            some = of_shard(split, shard)
            numbers, captions_of = zip(*some, strict=True)
            arrays = _encode(encoder, captions_of, batch_size, bar.update)
            write_shard(out, split, shard, Shard(*arrays, numbers, captions_of), _hash(some))
    write_atomic(done, info.to_json())
    plan.unlink(missing_ok=True)
    say(f"{out} holds the features of {sum(info.splits.values()):,} captions")
    return info


def _hash(captions: Sequence[tuple[int, str]]) -> str:
    return hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()


def _compare_with(out: Path, info: TextInfo, *files: Path) -> None:
    """Raises UserError if the folder holds something else."""
    for path in files:
        try:
            found = TextInfo.read(path)
        except FileNotFoundError:
            continue
        old, new = (json.loads(i.to_json()) for i in (found, info))
        for key in [name for name in old if name != "place"]:  # an encoder may have moved
            if old[key] != new[key]:
                what = f"{key}={old[key]}" if isinstance(old[key], int | str) else f"other {key}"
                raise UserError(
                    f"{out} holds features made with {what}; give another --out, or delete it"
                )
        return
    if out.exists() and not (out.is_dir() and all(p.name.startswith(".") for p in out.iterdir())):
        raise UserError(
            f"{out} exists and is not a folder of features; give another --out, or empty it"
        )


def _encode(encoder, captions: Sequence[str], batch_size: int, advance):
    """(features [n, T, D] float16, lengths [n], pooled [n, P]); all batches have one size."""
    done = []
    for at in range(0, len(captions), batch_size):
        some = list(captions[at : at + batch_size])
        rows = encoder.encode(some + [""] * (batch_size - len(some)))
        features, mask, pooled = (np.asarray(a)[: len(some)] for a in jax.device_get(rows))
        with np.errstate(over="ignore"):
            features = features.astype(np.float16)
        if not (np.isfinite(features).all() and np.isfinite(pooled).all()):
            raise UserError(
                "the text encoder gave features that are not finite in float16; its weights are "
                "damaged, or not of this layout"
            )
        done.append((features, mask.sum(1), pooled))
        advance(len(some))
    return tuple(np.concatenate(part) for part in zip(*done, strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lintime prepare text`."""
    parser.add_argument("images", metavar="IMAGES", help="a folder of class folders of images")
    parser.add_argument(
        "--encoder", metavar="DIR", required=True,
        help="folder of published weights of CLIP or T5 v1.1, with its tokenizer",
    )  # fmt: skip
    parser.add_argument(
        "--captions", metavar="FILE", default="",
        help=".jsonl or .csv with file and caption, as named from IMAGES; several rows of a file "
        "are several captions (default: NAME.txt beside NAME.png, a line for each)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make or continue")
    parser.add_argument(
        "--length", type=int, default=0, metavar="T",
        help="tokens of a caption (default: CLIP's positions, 128 for T5)",
    )  # fmt: skip
    parser.add_argument(
        "--validation-fraction", type=float, default=ImageData().validation_fraction, metavar="F",
        help="share held out where the images have no validation split (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int, default=64, metavar="N", help="captions at a time (default 64)"
    )
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)


def run_command(arguments: argparse.Namespace) -> None:
    """`lintime prepare text`: encodes the captions and says what a net needs to read them."""
    from ..encoders.text import load_text_encoder

    images = ImageData(path=arguments.images, validation_fraction=arguments.validation_fraction)
    encoder = load_text_encoder(arguments.encoder, length=arguments.length)
    info = prepare_text(
        images, encoder, arguments.out, captions=arguments.captions, batch_size=arguments.batch
    )
    print(
        f"a net reads them with data.text={arguments.out} net.context=cross "
        f"net.context_dim={info.width} net.context_length={info.length}"
    )
