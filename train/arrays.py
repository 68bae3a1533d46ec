"""Arrays in files: checkpoints of every kind are read, weights of a run are written."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..model.convert.names import flatten
from .checkpoint import FOLDER
from .config_files import from_json
from .errors import UserError
from .schema import Run

# Names of the weights within a folder, by format; the first that is there is read.
WEIGHTS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "npz": "model.npz"}
INDEX = ".index.json"  # a file in shards: {"weight_map": {name: file}}
TORCH = (".bin", ".pt", ".pth", ".ckpt")
# Averages that a trainer keeps as lists, in the order of its parameters.
AVERAGE = re.compile(r"(?:^|[./])(?P<name>ema_params\d+)/(?P<index>\d+)$")


# ---------------------------------------------------------------- reading checkpoints


def read_arrays(source: str | Path) -> dict[str, np.ndarray]:
    """Parameters of a checkpoint as {"a/b/c": float32 array}; optimiser states are left out, and
    lists of averages are {"ema_params1/0": array, ..}.

    Args:
        source: see `convert`. Nothing in it is ever executed: PyTorch files are read with
            `weights_only`, numpy's without pickles.

    Raises:
        UserError: not there, damaged, of an unknown kind, or a package for it is missing.
    """
    source = _locate(Path(source))
    try:
        tree = _read_orbax(source) if source.is_dir() else _read_file(source)
    except UserError:
        raise
    except Exception as error:  # each reader raises kinds of its own for damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read {source} ({type(error).__name__}: {reason}); it is damaged or not a "
            "checkpoint: give .safetensors, .npz, PyTorch .bin, flax checkpoint_<step> or Orbax "
            "state_<step>"
        ) from error
    # Of a TrainState, variables, a trainer's checkpoint: its averaged weights, if it has them.
    inner = ("params", "ema", "model", "state_dict")
    held = lambda tree: [tree[k] for k in inner if tree.get(k) and isinstance(tree[k], Mapping)]
    averages: dict[str, Any] = {}
    while isinstance(tree, Mapping):
        averages |= _lists(tree)
        if not held(tree):
            break
        tree = held(tree)[0]
    if not isinstance(tree, Mapping):
        raise UserError(f"{source} holds no parameters (it is a {type(tree).__name__})")
    flat = flatten({n: a for n, a in tree.items() if f"{n}/0" not in averages}) | averages
    del tree
    for name, array in flat.items():
        is_array = isinstance(array, np.ndarray | np.generic)
        if not is_array or not jnp.issubdtype(array.dtype, jnp.number):
            raise UserError(
                f"{source}: {name} is a {type(array).__name__}, not an array of numbers"
            )
        flat[name] = np.asarray(array, np.float32)
    return flat


def _lists(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of averages that a mapping holds, by `AVERAGE`."""
    return {
        f"{name}/{index}": array
        for name, arrays in tree.items()
        if isinstance(arrays, list) and AVERAGE.search(f"{name}/0")
        for index, array in enumerate(arrays)
    }


def _locate(source: Path) -> Path:
    """The file or Orbax directory that `source` means."""
    if not source.exists():
        raise UserError(f"{source} does not exist; name a file or folder of weights")
    if source.is_file():
        return source
    if (source / "config.json").exists() and (source / FOLDER).is_dir():
        raise UserError(
            f"{source} is a lintime run already; convert it with --to vq or safetensors"
        )
    for name in WEIGHTS.values():
        for path in (source / name, source / (name + INDEX)):
            if path.is_file():
                return path
    for folder in (source, source / "default", *sorted(p for p in source.iterdir() if p.is_dir())):
        if any((folder / name).exists() for name in ("_METADATA", "checkpoint", "manifest.ocdbt")):
            return folder
    found = [
        (m, p)
        for p in source.iterdir()
        if (m := re.fullmatch(r"(?:checkpoint|state)_(\d+)", p.name))
    ]
    if not found:
        raise UserError(
            f"{source} holds no checkpoint: no {', '.join(WEIGHTS.values())}, checkpoint_<step>, "
            "state_<step> or Orbax directory"
        )
    return _locate(max(found, key=lambda f: int(f[0][1]))[1])


def _read_file(path: Path) -> Any:
    """What a file holds, as nested mappings of numpy arrays."""
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _package("safetensors.numpy").load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    if path.suffix in TORCH:
        torch = _package("torch")

        def as_numpy(value):  # numpy has no bfloat16, so by way of float32
            if isinstance(value, Mapping):
                return {name: as_numpy(v) for name, v in value.items()}
            if isinstance(value, list | tuple):
                return [as_numpy(v) for v in value]
            is_tensor = isinstance(value, torch.Tensor)
            return value.detach().float().numpy() if is_tensor else value

        with torch.serialization.safe_globals([argparse.Namespace]):  # trainers' settings
            return as_numpy(torch.load(path, weights_only=True, map_location="cpu"))
    from flax import serialization

    return serialization.msgpack_restore(path.read_bytes())


def _read_shards(index: Path) -> dict[str, Any]:
    """The arrays of all files that an index names."""
    wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    arrays: dict[str, Any] = {}
    for name in sorted(set(wanted.values())):
        shard = index.with_name(name)  # raises for anything but a plain file name
        if not shard.is_file():
            raise UserError(f"{index} names {name}, which is not there; fetch all its files")
        arrays |= _read_file(shard)
    lacking = sorted(wanted.keys() - arrays.keys())
    if lacking:
        raise UserError(f"the files of {index} lack {', '.join(lacking[:5])}; fetch them again")
    return arrays


def _read_orbax(folder: Path) -> Any:
    """The tree of an Orbax checkpoint as numpy arrays: only `params` where it is written apart."""
    import orbax.checkpoint as ocp

    folder = folder.absolute()
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    if not (folder / "_METADATA").exists():  # the first Orbax versions
        return checkpointer.restore(folder)
    tree = checkpointer.metadata(folder).item_metadata.tree
    wanted = {"params": tree["params"]} if "params" in tree else tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    return checkpointer.restore(
        folder,
        args=ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True),
    )


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{name.partition('.')[0]} is not installed; install it with: "
            "pip install 'lintime[convert]'"
        ) from None


def config_beside(source: str | Path) -> Path | None:
    """FILE.json beside a checkpoint FILE.safetensors, or the `config.json` in its folder, if there
    is one."""
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    places = {source.with_suffix(".json"), folder / "config.json"} - {source}
    return next(
        filter(Path.is_file, sorted(places, key=lambda place: place.stem == "config")), None
    )


def read_hyperparameters(path: str | Path) -> tuple[Run | None, dict | None]:
    """A JSON file: (run, None) for a lintime config, (None, hyperparameters) for a reference's.

    Raises:
        UserError: no such file, or no JSON object in it.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the hyperparameters in {path}: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object of hyperparameters")
    if isinstance(data.get("net"), dict):
        return from_json(data), None
    return None, data


def encode_arrays(flat: Mapping[str, np.ndarray], file_format: str) -> bytes:
    """The content of a "safetensors", "npz" or PyTorch "bin" file.

    Raises:
        UserError: a package is missing.
    """
    flat = {name: np.array(a, order="C") for name, a in flat.items()}
    if file_format == "safetensors":
        return _package("safetensors.numpy").save(flat)
    buffer = io.BytesIO()
    if file_format == "npz":
        np.savez(buffer, **flat)
    else:
        torch = _package("torch")
        torch.save({name: torch.from_numpy(a) for name, a in flat.items()}, buffer)
    return buffer.getvalue()


def must_be_new(out: Path) -> Path:
    """`out`, unless something is there.

    Raises:
        UserError: a file, or a folder with something in it.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out or remove it")
    return out
