"""`lintime convert`: published checkpoints in and out, and dense attention into VQ attention."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..model.convert import transformer_vq as layouts
from ..model.convert.dense_to_vq import dense_to_vq
from ..model.convert.names import check_shapes, flatten
from ..model.nets.transformer_vq import TransformerVQConfig, head_geometry
from .checkpoint import FOLDER, restore_inference, save_inference
from .config_files import from_json, load_config, read_config, save_config, validate
from .errors import UserError
from .files import write_atomic
from .override import apply_overrides
from .schema import Run
from .tasks import DTYPES, make_task

EXAMPLES = """\
examples:
  lintime convert --from checkpoint_125000 --config hyperparameters.json --out runs/enwik8
  lintime convert --from x.npz --out runs/x net.block_len=512 net.mem_len=512 net.logit_scale=1
  lintime convert --run runs/x --to safetensors --out x.safetensors
  lintime convert --run runs/dense --to vq --out runs/dense-vq net.n_code=512
"""
LAYOUTS = {"transformer-vq-main": "main", "transformer-vq-optimized": "optimized"}
FROM = {"main": layouts.from_reference_main, "optimized": layouts.from_reference_optimized}
TO = {"main": layouts.to_reference_main, "optimized": layouts.to_reference_optimized}

# What the arrays cannot tell, with the reference's name for it.
THEIR_NAME = {
    "net.block_len": "block_len", "net.mem_len": "mem_len", "net.logit_scale": "e_scale",
    "net.out_norm": "e_preln", "net.d_k": "d_k",
}  # fmt: skip
RUN_FIELDS = {  # of a reference config, besides the net's
    "sequence_len": "data.sequence_len", "update_len": "data.update_len",
    "global_batch_size": "batch_size", "p_nucleus": "sample.top_p",
}  # fmt: skip
TOKENS_PER_CODE = 64  # tokens run through the dense model for every code to make
LONGEST = 8192  # and at most this many from the beginning of each sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lintime convert`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--from", "--run", dest="source", metavar="PATH", required=True,
        help="checkpoint to read (.safetensors, .npz, checkpoint_<step>, state_<step>), "
        "or a run directory",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="PATH", required=True, help="run directory or file to make"
    )
    parser.add_argument(
        "--to", choices=["run", "vq", "safetensors", "npz"], default="run",
        help="run: run directory from a checkpoint (default); vq: dense run into a VQ run; "
        "safetensors, npz: run into a file of the reference's layout",
    )  # fmt: skip
    parser.add_argument("--layout", choices=list(LAYOUTS), help="default: the one that fits")
    parser.add_argument(
        "--config", metavar="JSON|NAME",
        help="hyperparameters of the reference as a JSON object, or a lintime config",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. net.mem_len=512")


def run_command(arguments: argparse.Namespace) -> None:
    """`lintime convert`: dispatches on --to and says what to do next."""
    source, out = Path(arguments.source), Path(arguments.out)
    if arguments.to == "vq":
        dense_run_to_vq(source, out, overrides=arguments.overrides)
        print(
            f"{out} holds the VQ model. Fine-tune it for a few percent of the training steps:\n"
            f"  lintime train CONFIG net.attention=vq init_from={out}\n"
            "with the CONFIG and the settings of the dense run. As it is:\n"
            f"  lintime eval --run {out}"
        )
    elif arguments.to == "run":
        config, reference = _read_config_argument(arguments.config)
        convert(
            source, out, layout=arguments.layout, config=config, reference=reference,
            overrides=arguments.overrides,
        )  # fmt: skip
        print(f"{out} is ready:\n  lintime eval --run {out} data.path=FILE\n"
              f"  lintime sample --run {out}\n  lintime train CONFIG init_from={out}")  # fmt: skip
    else:
        branch = export(source, out, file_format=arguments.to, layout=arguments.layout)
        print(f"{out} holds the weights in the {branch} layout, "
              f"{out.with_suffix('.json')} the hyperparameters.")  # fmt: skip


# ---------------------------------------------------------------- checkpoint -> run directory


def convert(
    source: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    config: Run | None = None,
    reference: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Make a run directory, for `eval`, `sample` and `init_from`, of a published checkpoint.

    Args:
        source: .safetensors, .npz, a flax `checkpoint_<step>` file, an Orbax `state_<step>`
            directory, or a folder of such (the newest is taken). Nothing is ever unpickled.
        out: run directory to make.
        layout: "transformer-vq-main" or "transformer-vq-optimized"; None finds out.
        config: the run to use; its net must fit the arrays.
        reference: instead of `config`, hyperparameters under the reference's names. With neither,
            the net is inferred from the arrays and `overrides` tell the rest.
        overrides: `field=value`, applied last.

    Returns:
        `out`.

    Raises:
        UserError: an unreadable source, arrays of another model, or hyperparameters missing.
    """
    out = _must_be_new(Path(out))
    flat = read_arrays(source)
    try:
        branch = LAYOUTS[layout] if layout else layouts.detect_layout(flat)
        variables = FROM[branch](flat)
        inferred = layouts.infer_config(flat)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    if config is None and reference is None:
        config = _inferred_run(inferred, branch, overrides, source)
    elif config is None:
        config, more = _reference_run(reference)
        overrides = [*more, *overrides]
    run = apply_overrides(config, overrides)
    differences = _differences(run.net, inferred)
    if differences:
        raise UserError(f"{source} does not fit the config: {'; '.join(differences)}")
    if run.data.vocab == "bytes" and run.net.vocab_size != 259:
        raise UserError(
            f"the checkpoint has {run.net.vocab_size} token ids, bytes have 259; name the "
            "SentencePiece model it was trained with: data.vocab=FILE"
        )
    validate(run)
    _check_model(run, variables, source)
    save_inference(out, variables, 0, {"converted_from": str(source)})
    save_config(run, out / "config.json")
    return out


def _inferred_run(inferred: dict, branch: str, overrides: Sequence[str], source) -> Run:
    """A run whose net is what the arrays tell; asks for what they do not."""
    needed = ["net.block_len", "net.mem_len", "net.logit_scale"]
    if branch == "optimized":
        needed = ["net.block_len"] if inferred["attention"] == "vq" else []
        needed += ["net.logit_scale", "net.out_norm"]
        needed += [] if "d_k" in inferred else ["net.d_k"]
    told = {o.partition("=")[0].strip(): o.partition("=")[2] for o in overrides}
    missing = [f"{path} (there: {THEIR_NAME[path]})" for path in needed if path not in told]
    if missing:
        raise UserError(
            f"the arrays of {source} do not tell {', '.join(missing)}; give them as FIELD=VALUE, "
            "or all hyperparameters of the reference with --config FILE.json"
        )
    run = Run(net=TransformerVQConfig(**inferred))
    if branch == "optimized" and "net.block_len" in told:  # its window is one block
        run = apply_overrides(run, [f"net.mem_len={told['net.block_len']}"])
    return run


def _reference_run(reference: Mapping[str, Any]) -> tuple[Run, list[str]]:
    """A run from the reference's hyperparameters: the net, and the other fields as overrides."""
    try:
        net = layouts.config_from_reference(reference)
    except ValueError as error:
        raise UserError(f"--config: {error}") from error
    known = {ours: reference[theirs] for theirs, ours in RUN_FIELDS.items() if theirs in reference}
    return Run(net=net), [f"{path}={value}" for path, value in known.items()]


def _differences(net: TransformerVQConfig, inferred: dict) -> list[str]:
    """Fields in which a config contradicts the arrays, as text; only those that have an effect."""
    inferred, given = dict(inferred), vars(net) | {}
    if not net.tie_embeddings:
        inferred.pop("tied_bias")
    if net.logit_scale == 1:
        inferred.pop("scale_on")
    if net.head_type != "shga" or inferred["head_type"] != "shga":
        inferred.pop("n_head")
        inferred.pop("d_v")
    else:
        given["d_v"] = head_geometry(net)["value_dim"]
        width = 2 * inferred["d_model"] // inferred["n_head"]
        inferred["d_v"] = inferred["d_v"] or width
    return [
        f"net.{name} is {value} in the checkpoint, {given[name]} in the config"
        for name, value in inferred.items()
        if given[name] != value
    ]


def _check_model(run: Run, variables: dict[str, Any], source) -> None:
    """The net of `run` must have exactly these arrays."""
    wanted = jax.eval_shape(make_task(run).init, jax.random.key(0))
    shapes = {name: tuple(a.shape) for name, a in flatten(wanted).items()}
    try:
        check_shapes(flatten({"stats": {}} | variables), shapes)
    except ValueError as error:
        raise UserError(f"{source} does not fit the config: {error}") from error


def _read_config_argument(text: str | None) -> tuple[Run | None, dict | None]:
    """--config: (run, None) for a lintime config, (None, hyperparameters) for the reference's."""
    if not text:
        return None, None
    if Path(text).suffix != ".json":
        return load_config(text)[0], None
    try:
        data = json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --config {text}: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("net"), dict):
        return from_json(data), None
    if not isinstance(data, dict):
        raise UserError(f"--config {text}: expected a JSON object of hyperparameters")
    return None, data


# ---------------------------------------------------------------- run directory -> other things


def export(
    run_dir: str | Path, out: str | Path, *, file_format: str, layout: str | None = None
) -> str:
    """Write the newest weights of a run (averaged ones, where it keeps them) in a reference layout.

    `out` gets the arrays, `out` with suffix .json the hyperparameters under the reference's names.

    Args:
        run_dir: run directory. file_format: "safetensors" or "npz".
        layout: as in `convert`; None takes the main layout if it can hold the model.

    Returns:
        The layout written, "main" or "optimized".

    Raises:
        UserError: no layout can hold the model, `out` exists, or a package is missing.
    """
    out = _must_be_new(Path(out))
    run = read_config(Path(run_dir) / "config.json")
    reasons = []
    for branch in [LAYOUTS[layout]] if layout else LAYOUTS.values():
        try:
            reference = layouts.config_to_reference(run.net, branch)
            break
        except ValueError as error:
            reasons.append(str(error))
    else:
        raise UserError(f"{run_dir} does not fit the reference: {'; '.join(reasons)}")
    flat = TO[branch](_load(run, run_dir))
    flat = {name: np.array(a, order="C") for name, a in flat.items()}
    reference |= {
        "sequence_len": run.data.sequence_len,
        "update_len": run.data.update_len or run.data.sequence_len,
        "global_batch_size": run.batch_size,
        "p_nucleus": run.sample.top_p,
    }
    if file_format == "safetensors":
        data = _safetensors().save(flat)
    else:
        buffer = io.BytesIO()
        np.savez(buffer, **flat)
        data = buffer.getvalue()
    write_atomic(out, data)
    write_atomic(out.with_suffix(".json"), json.dumps(reference, indent=2) + "\n")
    return branch


def dense_run_to_vq(
    run_dir: str | Path, out: str | Path, *, overrides: Sequence[str] = ()
) -> dict[str, float]:
    """Make a run directory with the VQ model nearest to a trained dense or flash one.

    The codebooks are k-means centres of the keys on the run's own training data (`dense_to_vq`).

    Args:
        run_dir: run of a dense model. out: run directory to make.
        overrides: e.g. net.n_code=512, net.mem_len=256, or data.path=... where the data has moved.

    Returns:
        {"dense": ..., "vq": ...}: nats per token of both models on one batch.

    Raises:
        UserError: the run is a VQ run, an override changes the shape of its weights, or no data.
    """
    run_dir, out = Path(run_dir), _must_be_new(Path(out))
    saved = read_config(run_dir / "config.json")
    if saved.net.attention == "vq":
        raise UserError(f"{run_dir} has VQ attention already; --to vq takes a dense or flash run")
    variables = _load(saved, run_dir)
    run = apply_overrides(saved, overrides)
    kind = saved.net.attention
    dense = dataclasses.replace(run, net=dataclasses.replace(run.net, attention=kind))
    run = dataclasses.replace(run, net=dataclasses.replace(run.net, attention="vq"), init_from="")
    validate(run)
    _check_model(dense, variables, run_dir)

    data, batches = _calibration_batches(run, run_dir / "cache")
    if data.vocab.size != run.net.vocab_size:
        raise UserError(
            f"the vocabulary of data.vocab={run.data.vocab} has {data.vocab.size} ids, {run_dir} "
            f"has {run.net.vocab_size}; name the one it was trained with: data.vocab=FILE"
        )
    update_len = run.data.update_len or run.data.sequence_len
    with tqdm(desc="codebooks", unit="", disable=None) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        converted = dense_to_vq(
            variables, dense.net, batches, key=jax.random.key(run.seed),
            tokens_per_update=run.batch_size * update_len, dtype=DTYPES[run.precision.compute],
            report=report,
        )  # fmt: skip
    _check_model(run, converted, run_dir)
    losses = {"dense": _loss(dense, variables, batches[0]), "vq": _loss(run, converted, batches[0])}
    print(
        f"nats per token before fine-tuning: {losses['dense']:.4f} {kind}, {losses['vq']:.4f} VQ "
        f"with {run.net.n_code} codes and a window of {run.net.mem_len}"
    )
    save_inference(out, converted, 0, {"converted_from": str(run_dir)})
    save_config(run, out / "config.json")
    return losses


def _calibration_batches(run: Run, cache: Path):
    """The run's training data, and enough whole sequences of it for every code."""
    length = run.data.sequence_len
    used = min(length, LONGEST)
    rows = max(1, min(run.batch_size, LONGEST // length))
    config = dataclasses.replace(run.data, update_len=0)
    from .data import open_data  # Grain is needed here only

    data = open_data(config, split="train", seed=run.seed, batch_size=rows, cache=cache)
    number = -(-TOKENS_PER_CODE * run.net.n_code // (rows * used))
    names = ("inputs", "targets", "mask", "segment_ids")
    batches = [data.batch(step, np.arange(rows)) for step in range(number)]
    return data, [{n: b[n][:, :used] for n in names} for b in batches]


def _loss(run: Run, variables: dict[str, Any], batch: Mapping[str, Any]) -> float:
    whole = dataclasses.replace(run, data=dataclasses.replace(run.data, update_len=0))
    evaluate = jax.jit(make_task(whole).evaluate)
    sums = evaluate(variables["params"], variables["stats"], dict(batch))
    return float(sums["nll"] / sums["tokens"])


def _load(run: Run, run_dir: str | Path) -> dict[str, Any]:
    """{"params", "stats"} of a run as numpy arrays."""
    abstract = jax.eval_shape(make_task(run).init, jax.random.key(0))
    return jax.tree.map(np.asarray, restore_inference(run_dir, abstract))


def _must_be_new(out: Path) -> Path:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out or remove it")
    return out


# ---------------------------------------------------------------- reading checkpoints


def read_arrays(source: str | Path) -> dict[str, np.ndarray]:
    """Parameters of a checkpoint as {"a/b/c": float32 array}; optimiser states are left out.

    Args:
        source: see `convert`.

    Raises:
        UserError: not there, damaged, or of an unknown kind.
    """
    source = _locate(Path(source))
    try:
        if source.is_dir():
            tree = _read_orbax(source)
        elif source.suffix == ".safetensors":
            tree = _safetensors().load_file(source)
        elif source.suffix == ".npz":
            with np.load(source, allow_pickle=False) as file:
                tree = {name: file[name] for name in file.files}
        else:
            from flax import serialization

            tree = serialization.msgpack_restore(source.read_bytes())
    except UserError:
        raise
    except Exception as error:  # each reader raises kinds of its own for damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read {source} ({type(error).__name__}: {reason}); it is damaged or not a "
            "checkpoint: give .safetensors, .npz, flax checkpoint_<step> or Orbax state_<step>"
        ) from error
    while isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        tree = tree["params"]  # of a TrainState, or of the variables of a module
    if not isinstance(tree, Mapping):
        raise UserError(f"{source} holds no parameters (it is a {type(tree).__name__})")
    flat = flatten(tree)
    for name, array in flat.items():
        is_array = isinstance(array, np.ndarray | np.generic)
        if not is_array or not jnp.issubdtype(array.dtype, jnp.number):
            raise UserError(
                f"{source}: {name} is a {type(array).__name__}, not an array of numbers"
            )
    return {name: np.asarray(a, np.float32) for name, a in flat.items()}


def _locate(source: Path) -> Path:
    """The file or Orbax directory that `source` means."""
    if not source.exists():
        raise UserError(f"{source} does not exist; name a checkpoint with --from")
    if source.is_file():
        return source
    if (source / "config.json").exists() and (source / FOLDER).is_dir():
        raise UserError(
            f"{source} is a lintime run already; convert it with --to vq or safetensors"
        )
    for folder in (source, source / "default", *sorted(p for p in source.iterdir() if p.is_dir())):
        if any((folder / name).exists() for name in ("_METADATA", "checkpoint", "manifest.ocdbt")):
            return folder
    found = [
        (m, p)
        for p in source.iterdir()
        if (m := re.fullmatch(r"(?:checkpoint|state)_(\d+)", p.name))
    ]
    if not found:
        raise UserError(f"{source} holds no checkpoint_<step>, state_<step> or Orbax checkpoint")
    return _locate(max(found, key=lambda f: int(f[0][1]))[1])


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


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError(
            "safetensors is not installed; install it with: pip install 'lintime[convert]'"
        ) from None
    return safetensors.numpy
