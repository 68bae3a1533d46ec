"""Family aim_hub: both stages out of one file of the hub's layout, from images to images."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lintime.model.convert.aim import (
    config_from_reference,
    from_reference,
    join_hub,
    split_hub,
    to_reference,
)
from lintime.model.nets.aim import AiM

from ..compare import Report
from ..quick import quick_jit
from .net import cfg_scale, check_generation
from .tokenizer import nchw, nhwc, tokenizer_of


def hub(report: Report) -> None:
    """Image to codes to logits; class to greedy tokens to image."""
    case = report.case
    stage2, tokenizer_arrays = split_hub(case.params)
    config = config_from_reference(hub_config(report))
    variables = jax.tree.map(jnp.asarray, from_reference(stage2, config))
    tokenizer, params = tokenizer_of(case.config.get("tokenizer", {}), tokenizer_arrays)

    encode = quick_jit(lambda x: tokenizer.apply({"params": params}, x, method="encode"))
    found = encode(nhwc(report.input("images")))
    grid, codes = found.shape[1:], np.asarray(found).reshape(len(found), -1)
    report.check("codes", codes)
    labels = report.input("labels")
    report.check("logits", quick_jit(AiM(config).apply)(variables, codes, labels)[0])

    decode = quick_jit(lambda x: tokenizer.apply({"params": params}, x, method="decode"))
    drawn = check_generation(report, config, variables, cfg_scale(report))
    # Without a word about positions an image is of the convention of released weights.
    for name, convention in [("gen_images", "reference")] + [
        (f"gen_images_{c}_positions", c) for c in drawn
    ]:
        if name in report:
            images = decode(drawn[convention].reshape(-1, *grid))
            report.check(name, nchw(images))

    # Written again, the file is the same but for what the tokenizer does not need.
    back = join_hub(to_reference(variables, config), tokenizer_arrays, config.tie_embeddings)
    for name in sorted(case.params.keys() ^ back.keys()):
        if not name.endswith("lm_head.weight"):
            report.fail(name, "not in both the file and what would be written")


def hub_config(report: Report) -> dict[str, Any]:
    """The hub's config.json, which the case's own config repeats.

    Raises:
        AssertionError: they differ.
    """
    case = report.case
    said = case.config.get("stage2", {})
    for file in case.entry.get("files", ()):
        if file.endswith("config.json"):
            config = json.loads((case.folder / file).read_text(encoding="utf-8"))
            differ = sorted(n for n, v in said.items() if config.get(n) != v)
            assert not differ, f"{file} and the manifest differ in {', '.join(differ)}"
            return config
    return said
