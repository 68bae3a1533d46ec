"""Family stream: piece by piece from a state, against the parallel form with the mask of pieces."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ..compare import Report
from ..quick import quick_jit
from .layers import mixer_of, positions_of


def stream(report: Report) -> None:
    """A stream of pieces of any length with true counts; the published stream, which counts pieces
    instead of tokens, is not reproduced.
    """
    report.informational("*_reference")
    mixer, params = mixer_of(report)
    tokens, lengths = jnp.asarray(report.input("in_x")), report.input("in_chunk_lens")
    lengths = tuple(int(n) for n in lengths)
    cross = "in_xq" in report
    queries = jnp.asarray(report.input("in_xq")) if cross else tokens
    query_lengths = lengths
    if "in_query_lens" in report:
        query_lengths = tuple(int(n) for n in report.input("in_query_lens"))
    weights = jnp.asarray(report.input("in_weights")) if "in_weights" in report else None
    of_weights = "context_mask" if cross else "mask"
    positions = positions_of(report)

    def call(mixer, **options):
        context = {"context": tokens} if cross else {}
        apply = lambda params: mixer.apply(
            {"params": params}, queries, **context, **positions, **options
        )
        return quick_jit(apply)(params)[0]

    masked = {} if weights is None else {of_weights: weights}
    if "in_mask" in report:
        mask = jnp.asarray(report.input("in_mask"))
        mask = mask[None] if mask.ndim == 2 else mask
        report.check("out_y_correct", call(mixer, query_mask=mask), how="matrix")
    own = {"query_frames": query_lengths} if cross else {}
    frames = call(mixer, frames=lengths, **own, **masked)
    report.check("out_y_correct", frames, how="frames")
    if set(lengths) == {1} == set(query_lengths):
        causal = mixer.clone(causal=True)
        report.check("out_y_correct", call(causal, **masked), how="causal")

    state, outputs, means, counts = mixer.init_state(tokens.shape[0]), [], [], []
    start, begin = 0, 0
    for length, count in zip(lengths, query_lengths, strict=True):
        part, own = slice(start, start := start + length), slice(begin, begin := begin + count)
        options = {"context": tokens[:, part]} if cross else {}
        if weights is not None:
            options[of_weights] = weights[:, part]
        if "positions" in positions:
            options["positions"] = positions["positions"][own]
        if "context_positions" in positions:
            options["context_positions"] = positions["context_positions"][part]
        y, state, _ = quick_jit(
            lambda params, x, state, options: mixer.apply(
                {"params": params}, x, state, **options, method="extend"
            )
        )(params, queries[:, own], state, options)
        outputs.append(y)
        means.append(state.tokens.mean)
        counts.append(np.asarray(state.tokens.count))
    report.check("out_y_correct", np.concatenate(outputs, axis=1), how="stream")
    report.check("mid_state_mean_correct", np.stack(means, axis=1))
    counts = np.stack(counts, axis=1)
    if "mid_state_count_correct" in report:
        expected = report.case.arrays["mid_state_count_correct"]
        if expected.ndim == 1:
            expected = np.broadcast_to(expected, counts.shape)
        report.check("mid_state_count_correct", counts, expected)
