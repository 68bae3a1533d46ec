"""What is particular to Transformer-VQ in `lintime convert`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ...model.convert import transformer_vq as layouts
from ...model.convert.dense_to_vq import dense_to_vq
from ...model.nets.transformer_vq import TransformerVQConfig, head_geometry
from ..arrays import must_be_new
from ..checkpoint import save_inference
from ..config_files import read_config, save_config
from ..errors import UserError
from ..override import apply_overrides
from ..schema import Run
from ..tasks.base import DTYPES
from ..tasks.table import make_task
from ..validate import validate
from ..weights import check_weights, load_weights

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


def to_run(
    flat: Mapping[str, np.ndarray],
    *,
    layout: str | None,
    config: Run | None,
    reference: Mapping[str, Any] | None,
    overrides: Sequence[str],
    source: str | Path,
) -> tuple[Run, dict[str, Any]]:
    """A run and its {"params", "stats"} from a reference's arrays; arguments as of `convert`.

    Raises:
        UserError: not this layout, or hyperparameters that are missing or do not fit.
    """
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
    if not isinstance(run.net, TransformerVQConfig):
        raise UserError(f"{source} is a Transformer-VQ checkpoint, the config is of another net")
    differences = _differences(run.net, inferred)
    if differences:
        raise UserError(f"{source} does not fit the config: {'; '.join(differences)}")
    if run.data.vocab == "bytes" and run.net.vocab_size != 259:
        raise UserError(
            f"the checkpoint has {run.net.vocab_size} token ids, bytes have 259; name the "
            "SentencePiece model it was trained with: data.vocab=FILE"
        )
    return run, variables


def from_run(
    run: Run, run_dir: str | Path, layout: str | None
) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """Layout, hyperparameters and arrays under the reference's names; arguments as of `export`.

    Raises:
        UserError: no layout can hold the model.
    """
    reasons = []
    for name in [layout] if layout else LAYOUTS:
        try:
            reference = layouts.config_to_reference(run.net, LAYOUTS[name])
            break
        except ValueError as error:
            reasons.append(str(error))
    else:
        raise UserError(f"{run_dir} does not fit the reference: {'; '.join(reasons)}")
    reference |= {
        "sequence_len": run.data.sequence_len,
        "update_len": run.data.update_len or run.data.sequence_len,
        "global_batch_size": run.batch_size,
        "p_nucleus": run.sample.top_p,
    }
    return name, reference, TO[LAYOUTS[name]](load_weights(run, run_dir))


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


# ---------------------------------------------------------------- dense -> VQ


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
    run_dir, out = Path(run_dir), must_be_new(Path(out))
    saved = read_config(run_dir / "config.json")
    if not isinstance(saved.net, TransformerVQConfig):
        raise UserError(f"{run_dir} has no attention; --to vq takes a dense or flash run")
    if saved.net.attention == "vq":
        raise UserError(f"{run_dir} has VQ attention already; --to vq takes a dense or flash run")
    variables = load_weights(saved, run_dir)
    run = apply_overrides(saved, overrides)
    kind = saved.net.attention
    dense = dataclasses.replace(run, net=dataclasses.replace(run.net, attention=kind))
    run = dataclasses.replace(run, net=dataclasses.replace(run.net, attention="vq"), init_from="")
    validate(run)
    check_weights(dense, variables, run_dir)

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
    check_weights(run, converted, run_dir)
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
    from ..data import open_data  # Grain is needed here only

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
