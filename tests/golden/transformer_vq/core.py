"""Families units, quantizer, dense_equiv and docmask: functions without parameters."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from lintime.kernels_pallas.vq_attention import (
    codebook_statistics,
    codewords,
    log_count,
    quantize,
    skew,
    vq_attention,
    window_mask,
)
from lintime.model.layers.codebook import codebook_metrics, quantisation_metrics, update_codebook
from lintime.model.layers.embeddings import sinusoids
from lintime.model.layers.norms import RMSNorm
from lintime.model.sampling.filters import nucleus_filter

from ..compare import EXACT, Report
from ..quick import quick_jit
from .common import check_metrics, check_state, codebook_gradient


def units(report: Report) -> None:
    """Sinusoids, relative shift, masks, RMS norm, count bias, nucleus filter."""
    config = report.case.config
    for name, rest in report.matching("sinusoid"):
        length, width = report.case.arrays[name].shape
        start = 0
        if rest == "_start":
            said = re.search(r"start at (\d+)", report.case.meaning.get(name, ""))
            start = config.get("start", int(said[1]) if said else 0)
        table = sinusoids(start + jnp.arange(length), width, config["pe_lam"])
        report.check(name, table[::-1] if rest == "_flip" else table)
    for name, rest in report.matching("relshift"):
        if rest.endswith("_out"):
            _check_shift(report, name)
    for name, rest in report.matching("mask"):
        if match := re.fullmatch(r"\d+_inv(\d+)_loc([01])", rest):
            rows, columns = report.case.arrays[name].shape
            keep = window_mask(rows, columns - rows, int(match[1]), locality=match[2] == "1")
            report.check(name, keep.astype(jnp.int32))
    if "rms_in" in report:
        x = report.input("rms_in")
        affine = {"params": {"g": report.input("rms_g"), "b": report.input("rms_b")}}
        report.check("rms_out", RMSNorm(affine=True).apply(affine, x))
        report.check("rms_out_nogainbias", RMSNorm(affine=False).apply({}, x))
    if "agg_counts" in report:
        report.check("agg_bias", log_count(jnp.asarray(report.input("agg_counts"))))
    for name, rest in report.matching("nucleus_"):
        if match := re.fullmatch(r"(.*)p([\d.]+)", rest):
            logits = jnp.asarray(report.input(f"nucleus_{match[1]}logits"))
            report.check(name, nucleus_filter(logits, float(match[2])))


def _check_shift(report: Report, name: str) -> None:
    """`skew` over the whole row; entries after the query (column > M + row) are always masked."""
    x = jnp.asarray(report.input(name.replace("_out", "_in")))
    rows, columns = x.shape[-2:]
    report.input(name.replace("_out", "_LM"), default=())
    shifted = skew(x, columns + rows - 1)[..., rows - 1 :]
    report.check(name, shifted, where=window_mask(rows, columns - rows, 0, locality=False))


def quantizer(report: Report) -> None:
    """Codes, straight-through gradient, commitment loss, EMA update, metrics."""
    case, config = report.case, report.case.config
    k, mask = report.input("vecs"), report.input("loss_mask")
    cotangent = report.input("cot_quantized", default=np.zeros_like(k))
    stats = {name: case.params[name] for name in ("c_sum", "c_count")}
    # The reference multiplies by devices and blocks what it then averages over them.
    times = config.get("n_device", 1) * config.get("n_block_per_update", 1)
    for name in ("n_device", "n_block_per_update"):
        report.input(name, default=())
    update = functools.partial(update_codebook, decay=config["c_gamma"])

    @quick_jit
    def run(k, stats):
        codebook = codewords(**stats)
        codes, k_hat, errors = quantize(k, codebook)
        commit = lambda k: jnp.mean(jnp.sum(quantize(k, codebook)[2], axis=1) * mask)
        _, back = jax.vjp(lambda k: quantize(k, codebook)[1], k)
        delta = codebook_statistics(k, codes, mask, stats["c_sum"].shape[1])
        target = update(stats, jax.tree.map(lambda d: d * times, delta))
        gradient = codebook_gradient(stats, delta, update, times=times)
        metrics = codebook_metrics(**stats) | quantisation_metrics(k, k_hat, errors, k.shape[2])
        return metrics, {
            "codebook": codebook,
            "shortcodes": codes,
            "errs2": errors,
            "quantized": k_hat,
            "eval_quantized": k_hat,
            "l_commit": commit(k),
            "grad_lcommit_vecs": jax.grad(commit)(k),
            "grad_quantized_vecs": back(cotangent)[0],
            **{f"{name}_tgt": value for name, value in target.items()},
            **{f"grad_lcodebook_{name}": value for name, value in gradient.items()},
        }

    metrics, results = run(k, stats)
    check_metrics(report, "metric_", metrics)
    for name, value in results.items():
        report.check(name, value)
    # Not computed here: the surrogate's value, always 0, and losses while evaluating.
    for name in ("l_codebook", "eval_l_commit", "eval_l_codebook"):
        report.check(name, np.float32(0), tolerance=EXACT)


def docmask(report: Report) -> None:
    """The attention core with keys of other documents invisible."""
    dense_equiv(report, mask_documents=True)


def dense_equiv(report: Report, mask_documents: bool = False) -> None:
    """The attention core against dense attention.

    With gradients in the given block length, by the default order of the cache recurrence and by
    the dense reference implementation; outputs in other block lengths and by the other orders too.
    """
    case, config = report.case, report.case.config
    get = lambda name: jnp.asarray(report.input(name))
    q, v, codebook = get("q"), get("v"), get("codebook")
    segments = get("doc_ids") if "doc_ids" in report else None
    block_len = config["block_len"]
    if "k" in report:
        k = get("k")
        codes, k_hat, _ = quick_jit(quantize)(k, codebook)
        report.check("shortcodes", codes)
        report.check("k_hat", k_hat)
    else:
        k, codes = get("k_hat"), get("shortcodes")

    def core(q, k, v, **options):
        keys = quantize(k, codebook)[1] if "k" in report else k
        out, state = vq_attention(
            q, keys, codes, v, codebook,
            content_bias=get("u_scaled"), position_bias=get("v_scaled"), rel=get("r_table"),
            segment_ids=segments, mask_segments=mask_documents,
            use_cache=bool(config.get("agg_cache", True)),
            grad_through_cache=bool(config.get("grad_thru_cache", True)), **options,
        )  # fmt: skip
        batch, heads, length, width = out.shape
        return jnp.moveaxis(out, 1, 2).reshape(batch, length, heads * width), state

    cotangent = get("cot") if "cot" in report else jnp.ones_like(case.arrays["attn_out"])
    for how, options in (("xla", {}), ("reference", {"implementation": "reference"})):

        def run(q, k, v, options=options):
            out, back, state = jax.vjp(
                functools.partial(core, block_len=block_len, **options), q, k, v, has_aux=True
            )
            return out, state, back(cotangent)

        out, state, gradients = quick_jit(run)(q, k, v)
        report.check("attn_out", out, how=how)
        for name, gradient in zip(("grad_q", "grad_k", "grad_v"), gradients):
            report.check(name, gradient, how=how)
        check_state(report, "final_state/", state, how=how)
    for block, reduction in ((1, "serial"), (5, "matmul"), (q.shape[2], "serial")):
        run = functools.partial(core, block_len=block, reduction=reduction)
        out, state = quick_jit(run)(q, k, v)
        report.check("attn_out", out, how=f"{reduction}, block_len {block}")
        check_state(report, "final_state/", state, how=f"{reduction}, block_len {block}")
