"""Families that need no net: resize matrices, positions, video embedding."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

from lintime.model.layers.flexible import (
    deembedding_projection,
    embedding_projection,
    lift_deembedding,
    lift_embedding,
    resize_deembedding,
    resize_embedding,
    resize_matrix,
)
from lintime.model.layers.patches import patchify, unpatchify

from ..compare import Report

sizes = lambda text: tuple(int(n) for n in text.split("x"))


def flexivit_resize(report: Report) -> None:
    """Matrix, pseudo-inverse and resized kernel of every pair of patches."""
    for name, rest in list(report.matching("w_")):
        old, new = map(sizes, rest.split("_to_"))
        kernel = report.input(name)  # [rows, columns, C, D]
        report.check(f"B_{rest}", resize_matrix(old, new, "bilinear"))
        report.check(f"P_{rest}", embedding_projection(old, new, "bilinear"))
        flat = kernel.reshape(-1, kernel.shape[-1])
        expected = report.case.arrays[f"r_{rest}"]
        for how, given in (("host", flat), ("device", jnp.asarray(flat))):
            got = resize_embedding(given, old, new, "bilinear")
            report.check(f"r_{rest}", np.asarray(got).reshape(expected.shape), how=how)


def matrices(report: Report) -> None:
    """B, E and their pseudo-inverses, by area and bilinear."""
    for name in list(report.case.arrays):
        kind, method, old, new = re.fullmatch(r"(\w+?)_(\w+)_([\dx]+)_to_([\dx]+)", name).groups()
        old, new = sizes(old), sizes(new)
        if len(old) == 1:  # squares are named by their side
            old, new = old * 2, new * 2
        embed = embedding_projection(old, new, method)
        deembed = deembedding_projection(old, new, method)
        channels = np.eye(len(embed))
        got = {
            "B": deembed,
            "E": embed,
            "Einv": lift_embedding(channels, old, new, method),
            "Dinv": lift_deembedding(channels, old, new, method).T,
        }[kind]
        report.check(name, got)


def pos_embed(report: Report) -> None:
    """Tables at fractional coordinates."""
    from lintime.model.layers.positions import sincos_positions

    for name in list(report.case.arrays):
        d, side, patch, base = map(
            int, re.fullmatch(r"D(\d+)_I(\d+)_p(\d+)_base(\d+)", name).groups()
        )
        grid = (side // patch,) * 2
        report.check(name, sincos_positions(d, grid, scale=patch / base))


def video_embed(report: Report) -> None:
    """Patches with a time axis: both ends of every mode from one set of weights."""
    config = report.case.config
    star, base, method = tuple(config["p_star"]), tuple(config["p0"]), config["resize"]
    rows = lambda w: np.moveaxis(w, (0, 1), (-1, -2)).reshape(-1, len(w))  # (D, C, ..) -> [P C, D]
    columns = lambda w: np.moveaxis(w, -1, 0).reshape(w.shape[-1], -1)  # (P, C, D) -> [D, P C]
    w_star = lift_embedding(rows(report.input("w_pre")), star, base, method)
    wd_star = lift_deembedding(columns(report.input("wd_pre")), star, base, method)
    bd_star = lift_deembedding(report.input("bd_pre").reshape(-1), star, base, method)
    report.check("w_star", w_star, expected=rows(report.case.arrays["w_star"]))
    report.check("wd_star", wd_star, expected=columns(report.case.arrays["wd_star"]))
    report.check("bd_star", bd_star, expected=report.case.arrays["bd_star"].reshape(-1))
    x = jnp.moveaxis(jnp.asarray(report.input("x")), 1, -1)
    device = [jnp.asarray(a) for a in (w_star, wd_star, bd_star)]
    for patch in map(tuple, config["patches"]):
        name = "p" + "x".join(map(str, patch))
        kernel = resize_embedding(device[0], star, patch, method)
        report.check(f"{name}_tokens", patchify(x, patch) @ kernel)
        out, bias = (resize_deembedding(a, star, patch, method) for a in device[1:])
        pixels = jnp.asarray(report.input(f"{name}_hidden")) @ out + bias
        grid = [n // p for n, p in zip(x.shape[1:-1], patch)]
        video = unpatchify(pixels, patch, grid)
        report.check(f"{name}_out", jnp.moveaxis(video, -1, 1))
