"""Next-token prediction over text and other token streams."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ...model.nets.mamba_lm import MambaConfig, MambaLM
from ...model.nets.transformer_vq import TransformerVQ, TransformerVQConfig, absorb
from ..errors import UserError
from .base import Task

STREAM_TIMELESS, STREAM_DROPOUT = 0, 1  # names of random streams, folded into the key


class LanguageModelTask(Task):
    """Next-token prediction over token streams, with any net of `NETS`.

    loss = sum(mask * nll) / weight, for a net with codebooks + commit_weight * l_commit, with
    l_commit the masked squared quantisation error per position, summed over sublayers (arXiv
    2309.16354, section 3.4).
    """

    unit = "tokens"

    @property
    def config(self) -> TransformerVQConfig | MambaConfig:
        return self.run.net

    @property
    def net(self) -> TransformerVQ | MambaLM:
        precision = self.run.precision
        net = NETS[type(self.run.net)]
        return net(self.run.net, self.dtype, precision.remat, precision.unroll)

    @property
    def updates_per_sequence(self) -> int:
        data = self.run.data
        return data.sequence_len // (data.update_len or data.sequence_len)

    @property
    def units_per_update(self) -> int:
        return self.run.batch_size * (self.run.data.sequence_len // self.updates_per_sequence)

    def abstract_batch(self):
        shape = (self.run.batch_size, self.run.data.sequence_len // self.updates_per_sequence)
        tokens = jax.ShapeDtypeStruct(shape, "int32")
        batch = dict.fromkeys(("inputs", "targets", "mask", "segment_ids"), tokens)
        return batch | {"start": jax.ShapeDtypeStruct(shape[:1], "bool")}

    def init(self, key: Array):
        tokens = jnp.zeros((1, min(8, self.run.data.sequence_len)), jnp.int32)
        variables = self.net.init({"params": key}, tokens)
        return {"params": variables["params"], "stats": variables.get("stats", {})}

    def init_carry(self, batch_size: int):
        if self.updates_per_sequence == 1:
            return {}
        return self.net.init_state(batch_size, max_length=self.run.data.sequence_len)

    def loss(self, params, stats, carry, batch, key):
        sequence = batch["step"] // self.updates_per_sequence
        stream = lambda name, n: jax.random.fold_in(jax.random.fold_in(key, name), n)
        rngs = {
            "timeless": stream(STREAM_TIMELESS, sequence),
            "dropout": stream(STREAM_DROPOUT, batch["step"]),
        }
        variables = {"params": params, "stats": stats}
        inputs, mask = batch["inputs"], batch["mask"]
        common = dict(segment_ids=batch["segment_ids"], rngs=rngs)
        if stats:  # tokens that count for them
            common["mask"] = mask
        if carry:
            fresh = self.init_carry(inputs.shape[0])
            start = batch["start"]
            pick = lambda new, old: jnp.where(start.reshape(1, -1, *[1] * (old.ndim - 2)), new, old)
            carry = jax.tree.map(pick, fresh, carry)
            logits, carry, aux = self.net.apply(variables, inputs, carry, **common, method="extend")
            carry = jax.lax.stop_gradient(carry)
        else:
            logits, aux = self.net.apply(variables, inputs, **common)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        nll_sum = jnp.sum(jnp.where(mask != 0, nll, 0.0))
        tokens = jnp.sum(mask != 0).astype(jnp.float32)
        positions = jnp.float32(mask.size)
        by_position = self.run.process.normalise == "positions"
        weight = positions if by_position else jnp.maximum(tokens, 1.0)
        loss_sum = nll_sum
        sums = {"nll": nll_sum, "tokens": tokens, "positions": positions}
        if "commit" in aux:
            sums["commit"] = sum(jnp.sum(c) for c in aux["commit"].values())
            loss_sum += self.config.commit_weight * sums["commit"]
        metrics = {"sum": sums, "mean": aux.get("metrics", {})}
        return loss_sum, weight, aux.get("stats_delta", {}), carry, metrics

    def absorb(self, stats, delta):
        return absorb(self.config, stats, delta) if stats else stats

    def report(self, sums):
        nats = sums["nll"] / jnp.maximum(sums["tokens"], 1.0)
        out = {self.metric: nats / jnp.log(2.0)}
        if "commit" in sums:
            out["commit"] = sums["commit"] / sums["positions"]
        return out

    def check_data(self, data):
        if data.vocab.size != self.run.net.vocab_size:
            raise UserError(
                f"the vocabulary of data.vocab={self.run.data.vocab} has {data.vocab.size} ids, "
                f"the net has net.vocab_size={self.run.net.vocab_size}; "
                f"set net.vocab_size={data.vocab.size}"
            )

    def yardstick(self, data, batches: int) -> dict[str, float]:
        """Bits per byte of `gzip -9` on the bytes that the validation predicts."""
        if self.run.data.vocab != "bytes":
            return {}
        from ..data import gzip_bits_per_byte, raw_validation_bytes  # a benchmark reads no data

        return {
            "gzip_bits_per_byte": gzip_bits_per_byte(raw_validation_bytes(data, batches or None))
        }

    @property
    def metric(self) -> str:
        """Name of the metric validation reports: bits per byte for bytes, else bits per token."""
        return "bits_per_byte" if self.run.data.vocab == "bytes" else "bits_per_token"

    def validation(self, sums):
        tokens = jnp.maximum(sums["tokens"], 1.0)
        return {"loss": sums["nll"] / tokens, **self.report(sums), "tokens": sums["tokens"]}

    def evaluate(self, params, stats, batch) -> dict[str, Array]:
        """Sums over one validation batch of whole sequences: {"nll", "tokens"}; no dropout.

        Sequences are run in pieces of the update length with carried state, so memory does not grow
        with their length.
        """
        variables = {"params": params, "stats": stats}
        keys = ("inputs", "targets", "mask", "segment_ids")
        pieces = self.updates_per_sequence
        rows = batch["inputs"].shape[0]

        def nll_of(logits, targets, mask):
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return jnp.sum(jnp.where(mask != 0, nll, 0.0))

        if pieces == 1:
            inputs, targets, mask, ids = (batch[k] for k in keys)
            logits, _ = self.net.apply(variables, inputs, segment_ids=ids)
            nll = nll_of(logits, targets, mask)
        else:
            cut = lambda a: jnp.moveaxis(a.reshape(rows, pieces, -1), 1, 0)

            def piece(carry, part):
                inputs, targets, mask, ids = part
                logits, carry, _ = self.net.apply(
                    variables, inputs, carry, segment_ids=ids, method="extend"
                )
                return carry, nll_of(logits, targets, mask)

            _, nll = jax.lax.scan(piece, self.init_carry(rows), tuple(cut(batch[k]) for k in keys))
            nll = jnp.sum(nll)
        return {"nll": nll, "tokens": jnp.sum(batch["mask"] != 0).astype(jnp.float32)}


NETS = {TransformerVQConfig: TransformerVQ, MambaConfig: MambaLM}
