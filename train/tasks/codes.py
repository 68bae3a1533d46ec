"""Stage 2 of AiM: the next token code given the class (arXiv 2408.12245, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from ...model.nets.aim import AiM, AiMConfig
from ..errors import UserError
from .base import Task


class ClassCodesTask(Task):
    """Cross-entropy of codes given classes: loss = sum of nll over codes / number of codes.

    Label, token and branch dropout act in training only.
    """

    metric = "bits_per_token"

    @property
    def net(self) -> AiM:
        precision = self.run.precision
        return AiM(self.run.net, self.dtype, precision.remat, precision.unroll)

    def abstract_batch(self):
        rows = self.run.batch_size
        return {
            "codes": jax.ShapeDtypeStruct((rows, self.run.net.num_tokens), "int32"),
            "labels": jax.ShapeDtypeStruct((rows,), "int32"),
            "valid": jax.ShapeDtypeStruct((rows,), "bool"),
        }

    def init(self, key):
        codes = jnp.zeros((1, self.run.net.num_tokens), jnp.int32)
        variables = self.net.init({"params": key}, codes, jnp.zeros((1,), jnp.int32))
        return {"params": variables["params"], "stats": {}}

    def loss(self, params, stats, carry, batch, key):
        rngs = {"dropout": jax.random.fold_in(key, batch["step"])}
        nll = self._nll(params, batch, rngs)
        total, weight = jnp.sum(nll), jnp.float32(nll.size)
        return total, weight, {}, carry, {"sum": {"nll": total, "tokens": weight}, "mean": {}}

    def report(self, sums):
        nats = sums["nll"] / jnp.maximum(sums["tokens"], 1.0)
        return {"bits_per_token": nats / jnp.log(2.0)}

    def evaluate(self, params, stats, batch):
        nll = jnp.where(batch["valid"][:, None], self._nll(params, batch, {}), 0.0)
        tokens = jnp.sum(batch["valid"]).astype(jnp.float32) * nll.shape[1]
        return {"nll": jnp.sum(nll), "tokens": tokens}

    def validation(self, sums):
        return {"loss": sums["nll"] / jnp.maximum(sums["tokens"], 1.0), **self.report(sums)}

    def _nll(self, params, batch, rngs):
        codes = batch["codes"]
        logits, _ = self.net.apply({"params": params}, codes, batch["labels"], rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes)

    def check_data(self, data):
        check_codes(
            self.run.net, vocab_size=data.codebook_size, num_tokens=data.num_tokens,
            num_classes=data.num_classes,
        )  # fmt: skip


def check_codes(net: AiMConfig, **needs: int) -> None:
    """Whether a net has the `vocab_size`, `num_tokens` and `num_classes` that codes need.

    Raises:
        UserError: it has fewer, or another number of tokens.
    """
    for field, need in needs.items():
        have = getattr(net, field)
        if have < need or (field == "num_tokens" and have != need):
            raise UserError(
                f"net.{field}={have} does not fit these codes, which have {need}; set "
                f"net.{field}={need}"
            )
