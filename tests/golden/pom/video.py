"""Families tvdih and t2i: the text-to-video net, also frame by frame, and text-to-image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.dih import dih_from_reference, text_video_config_from_fields
from lintime.model.layers.unit_positions import unit_positions
from lintime.model.mixers.aggregation import block_causal_mask
from lintime.model.nets.text_video_dih import TextVideoDiH

from ..compare import Report
from ..manifest import Case
from ..quick import quick_jit
from .dih import check_losses, check_round_trip, last, loader, second


def net_and_params(case: Case) -> tuple[TextVideoDiH, dict]:
    """The net of a case and its parameters."""
    config = text_video_config_from_fields(case.config)
    params = dih_from_reference(case.params, config)
    return TextVideoDiH(config), jax.tree.map(jnp.asarray, params)


def check_temporal_mask(report: Report, net: TextVideoDiH) -> None:
    """The given mask must be that of the net's frames."""
    if "in_temporal_mask" in report:
        times, *place = net.config.grid
        same = block_causal_mask((int(np.prod(place)),) * times)
        given = report.input("in_temporal_mask")
        if not net.config.block_causal or not np.array_equal(same, given.reshape(same.shape)):
            report.fail("in_temporal_mask", "is not that of frames")


def video(report: Report) -> None:
    """Output, losses, gradients, what comes on the way; frame by frame where the net is causal."""
    net, params = net_and_params(report.case)
    told = {"context": report.input("in_txt"), "context_mask": report.input("in_txt_mask")}
    check_temporal_mask(report, net)
    predict = lambda params, x, t: net.apply(
        {"params": params}, x, t, **told, mutable=["intermediates"]
    )
    seen = check_losses(report, params, predict, net.config.timesteps, "fm")
    report.check_params("gp.", seen.pop("gradient"), loader(net.config))
    report.check("mid_patch", seen["patches"][0])
    report.check("mid_text", seen["text"][0], where=(told["context_mask"] != 0)[..., None])
    report.check("mid_pos", unit_positions(net.config.d_model, net.config.grid)[None])
    report.check("mid_after_block0", seen["blocks"]["out"][0][0])
    check_round_trip(report, params, net.config)
    if net.config.block_causal:
        report.check("out_y", second(stream(net, params, report, told)), how="frame by frame")


def stream(net: TextVideoDiH, params, report: Report, told) -> jax.Array:
    """The output from one frame of patches after another."""
    x, t = last(report.input("in_xt")), report.input("in_t")
    state, found = net.init_state(len(x)), []
    step = quick_jit(
        lambda x, frame, state: net.apply(
            {"params": params}, x, t, frame, state, **told, method="extend"
        )
    )
    for frame in range(net.config.grid[0]):
        size = net.config.patch_frames
        y, state = step(x[:, frame * size : (frame + 1) * size], frame, state)
        found.append(y)
    return jnp.concatenate(found, axis=1)
