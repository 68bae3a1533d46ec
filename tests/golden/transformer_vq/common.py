"""What several families share: names of the recurrent state, codebook gradients, metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..compare import Report
from ..manifest import Tolerance

# Entry of the reference's state -> field of VQState.
STATE = {
    "pos_offset": "offset",
    "xlcache/z": "codes",
    "xlcache/k_hat": "keys",
    "xlcache/v": "values",
    "xlcache/doc_ids": "segments",
    "aggcache/upper_div_lower": "mean",
    "aggcache/lower": "count",
    "aggcache/latest_doc_id": "cache_segment",
}


def dtype_of(config: Mapping[str, Any]) -> Any:
    """Activation dtype of a case."""
    return jnp.dtype(config.get("dtype", "float32"))


def check_state(report: Report, prefix: str, state, **options) -> None:
    """Compares a VQState with the entries `prefix`<entry> of the case, whichever there are."""
    for name, entry in report.matching(prefix):
        if entry not in STATE:
            continue
        got = np.asarray(getattr(state, STATE[entry]))
        if entry == "pos_offset" and report.case.arrays[name].ndim == 0:
            if np.unique(got).size != 1:
                report.fail(name, f"rows are at different positions {got}")
                continue
            got = got[0]
        report.check(name, got, **options)


def codebook_gradient(stats, delta, absorb: Callable, *, times: float = 1.0):
    """Gradient of the reference's codebook surrogate: the codebook minus the updated one.

    Args:
        stats, delta: codebooks and statistics seen, trees of the same structure.
        absorb: (stats, delta) -> updated codebooks.
        times: factor the reference puts on the statistics.
    """
    scaled = jax.tree.map(lambda d: d * times, delta)
    return jax.tree.map(jnp.subtract, stats, absorb(stats, scaled))


def is_codebook(name: str) -> bool:
    """Whether a parameter of the reference is a codebook leaf, learned by EMA."""
    return name.rpartition("/")[2].startswith("c_")


def check_metrics(report: Report, prefix: str, metrics: Mapping[str, Any], **options) -> None:
    """Compares the arrays `prefix`<metric> with the metrics of those names."""
    tolerance = metric_tolerance(report)
    for name, metric in report.matching(prefix):
        if metric in metrics:
            report.check(name, metrics[metric], tolerance=tolerance, **options)


def metric_tolerance(report: Report) -> Tolerance:
    """The case's tolerance, with the wider relative part its note may give for metrics."""
    tolerance = report.case.tolerance
    found = re.search(r"metric_\S+.*?rtol (\d[\d.]*(?:e[+-]?\d+)?)", tolerance.note)
    return tolerance.loosened(float(found[1])) if found else tolerance
