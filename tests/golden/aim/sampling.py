"""Family sampling_filters: probabilities after temperature, top-k and top-p."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lintime.model.sampling.filters import keep_likely

from ..compare import Report


def sampling_filters(report: Report) -> None:
    """Every combination, and with the filters that are off left out of the program."""
    combos = report.case.config["combos_array_topk_topp_temperature"]
    for number, (name, top_k, top_p, temperature) in enumerate(combos):
        logits = jnp.asarray(report.input(name))
        given = {"top_k": top_k, "top_p": top_p}
        on = {n: v for n, v in given.items() if v != {"top_k": 0, "top_p": 1}[n]}
        for how, settings in (("all filters", given), ("those that act", on)):
            kept = keep_likely(logits, temperature=temperature, **settings)
            report.check(f"probs{number}", jax.nn.softmax(kept, axis=-1), how=how)
