"""Families model and opt_model: the whole net of the main and of the optimized branch."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lintime.model.convert.transformer_vq import (
    config_from_reference,
    from_reference_main,
    from_reference_optimized,
)
from lintime.model.nets.transformer_vq import TransformerVQ, absorb, attention_names
from lintime.train.schema import Data, Precision, Run
from lintime.train.tasks.table import LanguageModelTask, make_task

from ..compare import EXACT, Report
from ..quick import quick_jit
from .common import check_metrics, check_state, codebook_gradient, dtype_of, is_codebook

# Suffix of an intermediate of a sublayer -> name under which the net sows it.
INTERMEDIATES = {"z": "codes", "q": "q", "k": "k", "v": "v", "g": "gate"}


def language_task(
    report: Report, sequence_len: int, update_len: int, **fields
) -> LanguageModelTask:
    """The training task of a case's config over sequences of the given lengths."""
    config = report.case.config
    return make_task(
        Run(
            net=config_from_reference(config),
            data=Data(sequence_len=sequence_len, update_len=update_len),
            precision=Precision(compute=config.get("dtype", "float32")),
            **fields,
        )
    )


def read_batch(report: Report, prefix: str = "") -> dict[str, np.ndarray]:
    """The batch of the arrays `prefix`inputs, targets, loss_mask and, if there, doc_ids."""
    inputs = report.input(f"{prefix}inputs")
    return {
        "inputs": inputs,
        "targets": report.input(f"{prefix}targets"),
        "mask": report.input(f"{prefix}loss_mask"),
        "segment_ids": report.input(f"{prefix}doc_ids", default=np.ones_like(inputs)),
    }


def cut_batch(batch: dict, number: int, update_len: int, step: int) -> dict[str, np.ndarray]:
    """Update `number` of a batch of sequences; `step` counts all updates."""
    here = slice(number * update_len, (number + 1) * update_len)
    rows = len(batch["inputs"])
    part = {name: array[:, here] for name, array in batch.items()}
    return part | {"start": np.full(rows, number == 0), "step": np.int32(step)}


def make_update(task: LanguageModelTask, variables):
    """update(carry, batch) -> logprobs, loss, gradient, statistics, carry, metrics."""

    def update(carry, batch):
        logits, _, _ = task.net.apply(
            variables, batch["inputs"], carry, segment_ids=batch["segment_ids"], method="extend"
        )

        def objective(params):
            out = task.loss(params, variables["stats"], carry, batch, jax.random.key(0))
            total, weight, delta, new_carry, metrics = out
            return total / weight, (delta, new_carry, metrics)

        (loss, aux), gradient = jax.value_and_grad(objective, has_aux=True)(variables["params"])
        return (jax.nn.log_softmax(logits), loss, gradient, *aux)

    return quick_jit(update)


def per_position(sums) -> dict[str, jax.Array]:
    """Mean losses over all positions, padding included, under the reference's names."""
    total = sums["positions"]
    return {
        "l_lm_unscaled": sums["nll"] / total,
        "l_commit": sums["commit"] / total,
        "loss_lm_per_token_unscaled": sums["nll"] / total,
        "loss_commit_per_token": sums["commit"] / total,
        "loss_mask_per_token": sums["tokens"] / total,
    }


def model(report: Report) -> None:
    """Updates with carried state, intermediates, block lengths, evaluation, greedy decoding."""
    case = report.case
    variables = jax.tree.map(jnp.asarray, from_reference_main(case.params))
    batch = read_batch(report)
    rows, length = batch["inputs"].shape
    update_len = case.config["update_len"]
    # Several updates per sequence, or no state would be carried.
    task = language_task(report, max(length, 2 * update_len), update_len)
    update = make_update(task, variables)
    carry = task.init_carry(rows)
    devices = case.config.get("n_device", 1)
    for n in range(length // update_len):
        part = cut_batch(batch, n, update_len, step=n)
        logprobs, loss, gradient, delta, carry, metrics = update(carry, part)
        report.check(f"update{n}_logprobs", logprobs)
        losses = per_position(metrics["sum"])
        report.check(f"update{n}_loss", loss)
        for name, value in losses.items():
            report.check(f"update{n}_{name}", value)
        report.check(f"update{n}_l_codebook", np.float32(0), tolerance=EXACT)
        check_metrics(report, f"update{n}_metric_", {**losses, **metrics["mean"]})
        codebooks = codebook_gradient(variables["stats"], delta, task.absorb, times=devices)
        tree = {"params": gradient, "stats": codebooks}
        report.check_params(f"update{n}_grad/", tree, from_reference_main)
        _check_states(report, f"update{n}_state/", carry)
    _check_forward(report, task.net, variables, batch, first_sublayer=1)
    _check_block_lengths(report, task, variables, batch["inputs"])
    whole = language_task(report, length, update_len)
    sums = quick_jit(whole.evaluate)(variables["params"], variables["stats"], batch)
    report.check("eval_loss_lm_per_token", sums["nll"] / sums["tokens"])
    report.check("eval_total_tokens", sums["tokens"])
    if "decode_prompt" in report:
        _check_decoding(report, task.net, variables)


def _check_states(report: Report, prefix: str, carry) -> None:
    """Entries `prefix`<layer>/<sublayer>/<entry of the state>."""
    found = (re.match(r"(\d+)/(\d+)/", rest) for _, rest in report.matching(prefix))
    for layer, sublayer in sorted({match.groups() for match in found if match}):
        state = carry[list(carry)[int(sublayer)]]
        state = jax.tree.map(operator.itemgetter(int(layer)), state)
        check_state(report, f"{prefix}{layer}/{sublayer}/", state)


def _check_forward(
    report: Report, net: TransformerVQ, variables, batch, first_sublayer: int
) -> None:
    """Logits and what every sublayer computes, in one call over whole sequences."""
    run = quick_jit(functools.partial(_forward, net, variables, mutable=["intermediates"]))
    logits, logprobs, sown = run(batch["inputs"], segment_ids=batch["segment_ids"])
    report.check("logits", logits)
    _check_logprobs(report, logprobs, "whole sequence")
    report.check("inter_emb_out", sown["embedded"][0])
    layers = sown["layers"]
    sublayers = list(attention_names(net.config))
    outputs = [f"{name}_out" for name in sublayers] + ["mlp_out"]
    for name, rest in report.matching("inter_layer"):
        match = re.fullmatch(r"(\d+)_(attn|sub)(\d+)_(\w+)", rest)
        if not match:
            continue
        layer, number = int(match[1]), int(match[3]) - first_sublayer
        if match[4] == "out":
            report.check(name, layers[outputs[number]][0][layer])
        elif match[4] in INTERMEDIATES:
            report.check(name, layers[sublayers[number]][INTERMEDIATES[match[4]]][0][layer])


def _forward(net: TransformerVQ, variables, tokens, **options):
    """Logits, log-probabilities and what was sown."""
    out = net.apply(variables, tokens, **options)
    (logits, _), sown = out if "mutable" in options else (out, {})
    return logits, jax.nn.log_softmax(logits), sown.get("intermediates", {})


def _check_logprobs(report: Report, logprobs, how: str) -> None:
    """Log-probabilities of whole sequences against those given update by update."""
    for name, rest in report.matching("update"):
        if match := re.fullmatch(r"(\d+)_logprobs", rest):
            length = report.case.arrays[name].shape[1]
            start = int(match[1]) * length
            report.check(name, logprobs[:, start : start + length], how=how)


def _check_block_lengths(report: Report, task: LanguageModelTask, variables, tokens) -> None:
    """The function computed depends neither on the block length nor on document ids."""
    for block_len in report.case.config.get("alt_block_len_checked", ()):
        config = dataclasses.replace(task.config, block_len=block_len, reduction="serial")
        net = TransformerVQ(config, task.net.dtype)
        _, logprobs, _ = quick_jit(functools.partial(_forward, net, variables))(tokens)
        _check_logprobs(report, logprobs, f"block_len {block_len}")


def _check_decoding(report: Report, net: TransformerVQ, variables) -> None:
    """The prompt token by token, then the most likely token each time."""
    prompt = report.input("decode_prompt")
    rows, length = prompt.shape
    steps = report.case.arrays["decode_logprobs"].shape[1]
    tables = quick_jit(lambda: net.apply(variables, method="rel_tables"))()

    @quick_jit
    def step(tokens, state):
        logits, state = net.apply(variables, tokens, state, tables=tables, method="step")
        return jax.nn.log_softmax(logits), jnp.argmax(logits, axis=-1).astype(jnp.int32), state

    state = net.init_state(rows)
    logprobs, chosen = [], None
    generated = []
    for t in range(steps):
        tokens = prompt[:, t] if t < length else chosen
        logp, chosen, state = step(tokens, state)
        logprobs.append(logp)
        if t >= length - 1:
            generated.append(chosen)
    report.check("decode_logprobs", np.stack(logprobs, axis=1))
    report.check("decode_tokens", np.stack(generated, axis=1))


def opt_model(report: Report) -> None:
    """Forward and backward of whole sequences, any head type, VQ or quadratic."""
    case = report.case
    variables = jax.tree.map(jnp.asarray, from_reference_optimized(case.params))
    config = config_from_reference(case.config)
    net = TransformerVQ(config, dtype_of(case.config))
    batch = read_batch(report)
    _check_forward(report, net, variables, batch, first_sublayer=0)
    inputs, targets, mask = (jnp.asarray(batch[name]) for name in ("inputs", "targets", "mask"))

    @quick_jit
    def run(params):
        def loss(params):
            # This branch masks the likelihood only: all tokens count for codes and commitment.
            logits, aux = net.apply({**variables, "params": params}, inputs)
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            lm = jnp.mean(jnp.where(mask != 0, nll, 0))
            by_sublayer = aux.get("commit", {}).values()  # [n_layer, B, T] each
            commit = sum((jnp.mean(jnp.sum(c, axis=0)) for c in by_sublayer), 0.0 * lm)
            return lm + config.commit_weight * commit, (lm, commit, aux.get("stats_delta"))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (lm, commit, delta)), gradient = run(variables["params"])
    report.check("l_ce_term_avg", lm)
    report.check("l_commit", commit)
    report.check("loss", loss)
    tree = {"params": gradient, "stats": {}}
    ordinary = lambda name: not is_codebook(name)
    report.check_params("grad/", tree, from_reference_optimized, where=ordinary)
    if delta:
        # It also multiplies statistics that it has summed over all blocks by the number of blocks.
        times = case.config.get("n_device", 1) * (inputs.shape[1] // config.block_len)
        update = functools.partial(absorb, config)
        tree["stats"] = codebook_gradient(variables["stats"], delta, update, times=times)
        how = "the reference's over-count"
        report.check_params("grad/", tree, from_reference_optimized, where=is_codebook, how=how)
