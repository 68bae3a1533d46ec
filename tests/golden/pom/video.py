"""Families tvdih and t2i: the text-to-video net, also frame by frame, and text-to-image."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.dih import text_video_config_from_fields
from lintime.model.layers.unit_positions import unit_positions
from lintime.model.nets.text_video_dih import TextVideoDiH

from ..compare import Report
from ..manifest import Case
from ..quick import quick_jit
from .dih import check_losses, check_round_trip, last, loader, second, variables_of
from .hom import block_causal


def net_and_variables(case: Case) -> tuple[TextVideoDiH, dict]:
    """The net of a case and its variables."""
    config = text_video_config_from_fields(case.config)
    params, constants = variables_of(case, config)
    return TextVideoDiH(config), {"params": params, "constants": constants}


def check_temporal_mask(report: Report, net: TextVideoDiH) -> None:
    """The given mask must be that of the net's frames."""
    if "in_temporal_mask" in report:
        times, *place = net.config.grid
        same = block_causal((int(np.prod(place)),) * times)
        given = report.input("in_temporal_mask")
        if not net.config.block_causal or not np.array_equal(same, given.reshape(same.shape)):
            report.fail("in_temporal_mask", "is not that of frames")


def video(report: Report) -> None:
    """Output, losses, gradients, what comes on the way; frame by frame where the net is causal."""
    net, variables = net_and_variables(report.case)
    params = variables["params"]
    told = {"context": report.input("in_txt"), "context_mask": report.input("in_txt_mask")}
    check_temporal_mask(report, net)
    predict = lambda params, x, t: net.apply(
        variables | {"params": params}, x, t, **told, mutable=["intermediates"]
    )
    seen = check_losses(report, params, predict, net.config.timesteps, "fm")
    report.check_params("gp.", seen.pop("gradient"), loader(net.config))
    report.check("mid_patch", seen["patches"][0])
    report.check("mid_text", seen["text"][0], where=(told["context_mask"] != 0)[..., None])
    report.check("mid_pos", unit_positions(net.config.d_model, net.config.grid)[None])
    report.check("mid_after_block0", seen["blocks"]["out"][0][0])
    check_round_trip(report, params, net.config)
    if net.config.block_causal:
        report.check("out_y", second(stream(net, variables, report, told)), how="frame by frame")


def stream(net: TextVideoDiH, variables, report: Report, told) -> jax.Array:
    """The output from one frame of patches after another."""
    x, t = last(report.input("in_xt")), report.input("in_t")
    state, found = net.init_state(len(x)), []
    step = quick_jit(
        lambda x, frame, state: net.apply(variables, x, t, frame, state, **told, method="extend")
    )
    for frame in range(net.config.grid[0]):
        size = net.config.patch_frames
        y, state = step(x[:, frame * size : (frame + 1) * size], frame, state)
        found.append(y)
    return jnp.concatenate(found, axis=1)
