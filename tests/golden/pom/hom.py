"""Families hom (the layer of 2024 with all masks) and hom_stream."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.dih import mixer_from_reference
from lintime.model.mixers.hom import HigherOrderMixer

from ..compare import Report
from ..manifest import Case
from ..quick import quick_jit


def layer_and_params(case: Case) -> tuple[HigherOrderMixer, dict]:
    """The layer of a case and its parameters."""
    c = case.config
    layer = HigherOrderMixer(c["dim"], c["order"], c["order_expand"], c.get("bias", True))
    return layer, jax.tree.map(jnp.asarray, mixer_from_reference(case.params))


def hom(report: Report) -> None:
    """Output, aggregated products, and all gradients."""
    case = report.case
    layer, params = layer_and_params(case)
    x, cross = report.input("in_xq"), "in_xc" in report
    context = report.input("in_xc") if cross else None
    kind = str(case.config.get("mask", "none")).startswith("causal")
    layer = dataclasses.replace(layer, causal=kind and "in_mask" not in report)
    mask = jnp.asarray(report.input("in_mask")) if "in_mask" in report else None
    weights = "context_mask" if cross else "mask"
    told = {} if mask is None else {weights if mask.ndim == 2 else "query_mask": mask}
    cotangent = report.input("ct_y")

    def objective(params, x, context):
        (y, _), seen = layer.apply(
            {"params": params}, x, context=context, **told, mutable=["intermediates"]
        )
        return jnp.sum(y * cotangent), (y, seen["intermediates"]["aggregated"][0])

    run = quick_jit(jax.value_and_grad(objective, argnums=(0, 1, 2)[: 2 + cross], has_aux=True))
    (_, (y, rows)), (gradient, *inputs) = run(params, x, context)
    report.check("mid_agg", rows)
    report.check("out_y", y)
    for name, got in zip(("grad_in_xq", "grad_in_xc"), inputs):
        report.check(name, got)
    report.check_params("gp.", gradient, mixer_from_reference)
    if "query_mask" in told and not cross:
        check_frames(report, layer, params, np.asarray(mask))


def check_frames(report: Report, layer, params, mask: np.ndarray) -> None:
    """The linear form of a mask that is block-causal."""
    frames = frames_of(mask)
    if frames:
        y, _ = layer.apply({"params": params}, report.input("in_xq"), frames=frames)
        report.check("out_y", y, how="linear form")


def block_causal(lengths) -> np.ndarray:
    """[1, N, N] float32: the mask that frames of these lengths mean."""
    frame = np.repeat(np.arange(len(lengths)), lengths)
    return np.float32(frame[None, :] <= frame[:, None])[None]


def frames_of(mask: np.ndarray) -> tuple[int, ...]:
    """Lengths of the frames of a block-causal mask [.., N, N]; () for another."""
    mask = mask.reshape(-1, *mask.shape[-2:])
    if (mask != mask[:1]).any():
        return ()
    seen = mask[0].sum(axis=1).astype(int)
    lengths = np.diff(np.unique(seen), prepend=0)
    fits = lengths.sum() == len(seen) and np.array_equal(block_causal(lengths)[0], mask[0])
    return tuple(int(n) for n in lengths) if fits else ()


def hom_stream(report: Report) -> None:
    """Chunk by chunk, and at once by the mask; and by the published count of chunks."""
    layer, params = layer_and_params(report.case)
    x, lengths = report.input("in_x"), report.input("in_chunk_lens").tolist()
    ends = np.cumsum(lengths)[:-1]

    def stream(count_pieces: bool):
        state, found = layer.init_state(len(x)), []
        for part in np.split(x, ends, axis=1):
            y, state, _ = layer.apply(
                {"params": params}, part, state, count_pieces=count_pieces, method="extend"
            )
            found.append(y)
        return np.concatenate(found, axis=1)

    report.check("out_y_correct", stream(False), how="stream")
    report.check("out_y_reference", stream(True))
    for how, told in {
        "mask": {"query_mask": jnp.asarray(report.input("in_mask"))[None]},
        "frames": {"frames": lengths},
    }.items():
        y, _ = layer.apply({"params": params}, x, **told)
        report.check("out_y_correct", y, how=how)
