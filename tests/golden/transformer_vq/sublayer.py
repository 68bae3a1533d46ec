"""Families attn and opt_attn: one attention sublayer of the main and of the optimized branch."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from lintime.kernels_pallas.vq_attention import (
    REDUCTIONS,
    block_summaries,
    cache_prefix,
    codewords,
)
from lintime.model.convert.transformer_vq import (
    config_from_reference,
    sublayer_from_main,
    sublayer_from_optimized,
)
from lintime.model.layers.codebook import update_codebook
from lintime.model.nets.transformer_vq import TransformerVQConfig, make_mixer

from ..compare import EXACT, Report
from ..quick import quick_jit
from .common import check_metrics, check_state, codebook_gradient, dtype_of, is_codebook

# Scaled inside the sublayer, where no public function shows them; all outputs depend on them.
NOT_SHOWN = ("xl_u", "xl_v")


def attn(report: Report) -> None:
    """A sublayer over several blocks: outputs, states, metrics, loss and all gradients."""
    case = report.case
    config = config_from_reference(case.config)
    variables = jax.tree.map(jnp.asarray, sublayer_from_main(case.params))
    blocks = report.case.config.get("n_block")
    _check_sublayer(report, config, variables, sublayer_from_main, blocks)
    _check_blocks(report, config, variables)


def opt_attn(report: Report) -> None:
    """A sublayer of any head type, VQ or quadratic, with all orders of the cache recurrence."""
    case = report.case
    config = config_from_reference(case.config)
    variables = jax.tree.map(jnp.asarray, sublayer_from_optimized(case.params))
    sown = _check_sublayer(report, config, variables, sublayer_from_optimized, None)
    if config.attention != "vq":
        return
    x = jnp.asarray(report.input("x"))
    for reduction in set(REDUCTIONS) - {config.reduction}:
        mixer = make_mixer(dataclasses.replace(config, reduction=reduction), dtype_of(case.config))
        report.check("res", quick_jit(mixer.apply)(variables, x)[0], how=reduction)
    _check_caches(report, config, sown)


def _check_sublayer(report, config: TransformerVQConfig, variables, convert, blocks):
    """Forward and backward of a whole call; returns what the sublayer sowed."""
    case = report.case
    mixer = make_mixer(config, dtype_of(case.config))
    x, cotangent = jnp.asarray(report.input("x")), jnp.asarray(report.input("cot"))
    options = {}
    if "loss_mask" in report:
        options["mask"] = jnp.asarray(report.input("loss_mask"))
    if "doc_ids" in report:
        options["segment_ids"] = jnp.asarray(report.input("doc_ids"))
    beta = case.config["loss_beta"]
    stats = variables["stats"]

    @quick_jit
    def run(params, x):
        def loss(params, x):
            variables = {"params": params, "stats": stats}
            (y, aux), sown = mixer.apply(variables, x, **options, mutable=["intermediates"])
            commit = jnp.mean(aux["commit"]) if aux else jnp.zeros((), y.dtype)
            return jnp.sum(cotangent * y) + beta * commit, (y, commit, aux, sown["intermediates"])

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (loss, (y, commit, aux, sown)), (grad_params, grad_x) = run(variables["params"], x)
    sown = {name: value[0] for name, value in sown.items()}
    for name in ("res", "dense_oracle_res"):
        report.check(name, y)
    report.check("dense_oracle_attn_out", sown["attention"])
    report.check("loss", loss)
    report.check("l_commit", commit)
    report.check("grad_x", grad_x)
    report.check("l_codebook", np.float32(0), tolerance=EXACT)
    for name, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("g", "gate"), ("shortcodes", "codes")):
        if name in report and ours in sown:
            report.check(name, _in_blocks(sown[ours], case.arrays[name].shape))
    if "xl_r" in report:
        length = case.arrays["xl_r"].shape[1]
        table = mixer.apply(variables, length, method="rel_table")
        report.check("xl_r", table[:, ::-1])
    report.informational(*NOT_SHOWN)

    gradient = {"params": grad_params, "stats": {}}
    ordinary = lambda name: not is_codebook(name)
    report.check_params("gradparam/", gradient, convert, where=ordinary)
    if config.attention != "vq":
        return sown
    report.check("codebook", codewords(**stats))
    # Per block the reference multiplies the statistics by the devices and blocks of an update, and
    # the loss averages over blocks. The optimized branch sums over all blocks and multiplies still.
    devices = case.config.get("n_device", 1)
    blocks = blocks or x.shape[1] // config.block_len
    if "head_type" in case.config:
        times, over = devices, devices * blocks
    else:
        passed = case.config.get("n_block_per_update_passed_to_quantiser", blocks)
        times = over = devices * passed / blocks
    update = functools.partial(update_codebook, decay=config.codebook_decay)
    grads = functools.partial(codebook_gradient, stats, aux["stats_delta"], update)
    for name, value in grads(times=times).items():
        report.check(f"grad_{name}_correct", value)
    how = "the reference's over-count" if over != times else ""
    gradient = {"params": grad_params, "stats": grads(times=over)}
    report.check_params("gradparam/", gradient, convert, where=is_codebook, how=how)
    return sown


def _in_blocks(a, shape):
    """[B, h, T, ...] cut along T into blocks where the expected `shape` has one axis more."""
    if len(shape) == a.ndim + 1:
        return a.reshape(*a.shape[:2], *shape[2:4], *a.shape[3:])
    return a


def _check_blocks(report: Report, config: TransformerVQConfig, variables) -> None:
    """One block at a time with carried state: outputs, states and metrics per block."""
    case = report.case
    mixer = make_mixer(config, dtype_of(case.config))
    x = jnp.asarray(case.arrays["x"])
    batch, length, _ = x.shape
    zeros = np.zeros((batch, length), np.int32)
    mask = jnp.asarray(case.arrays.get("loss_mask", zeros + 1))
    segments = jnp.asarray(case.arrays.get("doc_ids", zeros))
    extend = quick_jit(
        lambda x, state, mask, segments: mixer.apply(
            variables, x, state, mask=mask, segment_ids=segments, method="extend"
        )
    )
    state, outputs, commits = mixer.init_state(batch), [], []
    for block, start in enumerate(range(0, length, config.block_len)):
        here = slice(start, start + config.block_len)
        y, state, aux = extend(x[:, here], state, mask[:, here], segments[:, here])
        outputs.append(y)
        commits.append(jnp.mean(aux["commit"]))
        check_state(report, f"state_after_block{block}/", state)
        check_metrics(report, f"metric_block{block}_", aux["metrics"])
    report.check("res", jnp.concatenate(outputs, axis=1), how="block by block")
    report.check("l_commit_per_block", jnp.stack(commits))
    report.check("l_codebook_per_block", np.zeros(len(commits), np.float32), tolerance=EXACT)


def _check_caches(report: Report, config: TransformerVQConfig, sown) -> None:
    """Counts and means before each block, by every order of the recurrence.

    The window before the first block is one empty block, whose codes S count nowhere.
    """
    means = [n for n, rest in report.matching("cache_mean") if re.fullmatch(r"(_\w+)?", rest)]
    if not means and "cache_count" not in report:
        return
    codes, values = sown["codes"], sown["v"]
    batch, heads, length = codes.shape
    blocks = length // config.block_len
    codes = codes.reshape(batch, heads, blocks, config.block_len)
    values = values.reshape(*codes.shape, -1)
    before = lambda a, fill: jnp.concatenate(
        [jnp.full_like(a[:, :, :1], fill), a[:, :, :-1]], axis=2
    )
    codes, values = before(codes, config.n_code), before(values, 0)
    counts, sums = block_summaries(codes, values, config.n_code)
    empty = jnp.zeros_like(counts[:, :, 0]), jnp.zeros_like(sums[:, :, 0])
    segments = jnp.zeros((batch, blocks), jnp.int32)
    for reduction in REDUCTIONS:
        prefix = quick_jit(
            functools.partial(cache_prefix, reduction=reduction, mask_segments=False)
        )
        count, mean = prefix(*empty, segments[:, 0], counts, sums, segments)
        report.check("cache_count", count[:, :, :blocks], how=reduction)
        for name in means:
            report.check(name, mean[:, :, :blocks], how=reduction)
