"""Image tokens by class: all decoding steps, with classifier-free guidance, in one jitted call.

    sampler = make_class_sampler(net)
    keys = row_keys(jax.random.key(0), 8)
    codes = sampler(variables, keys, labels, guidance=2.0, top_k=600, top_p=0.98)

Row i's token t is drawn with the key fold_in(keys[i], t) and nothing else of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..mixers.mamba_decode import dual_segments, has_kernel, resize
from .filters import keep_likely

DUAL_TOKENS = 512  # reading n tokens is on average n/2 (d + N) numbers, a state 2 d N

SCHEDULES = {
    "constant": jnp.ones_like,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - jnp.cos(math.pi * x)) / 2,
}


def row_keys(key: Array, count: int, start: int = 0) -> Array:
    """[count] PRNG keys fold_in(key, start), fold_in(key, start + 1), ..: image i has the key of
    its number, whatever the batches in which images are drawn."""
    numbers = jnp.arange(start, start + count, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)


def guidance_schedule(kind: str, strength: Array | float, num_tokens: int) -> Array:
    """Guidance s_t of every token: 1 + ramp(t / (T - 1)) (strength - 1).

    Args:
        kind: "constant", or a ramp from 0 up to 1: "linear", x, or "cosine", (1 - cos(pi x)) / 2.
        strength: s at the last token, a number or [B]. num_tokens: T.

    Returns:
        [T, 1] float32, or [T, B].

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule={kind!r}; choose one of {', '.join(SCHEDULES)}")
    x = jnp.linspace(0.0, 1.0, num_tokens) if num_tokens > 1 else jnp.ones((1,))
    ramp = SCHEDULES[kind](x)[:, None]
    return 1.0 + ramp * (jnp.atleast_1d(jnp.asarray(strength, jnp.float32)) - 1.0)


def _off(value: Any, neutral: float) -> bool:
    """Whether a setting is a plain number that switches its filter off."""
    return value is None or (isinstance(value, int | float) and value == neutral)


def _check(net, keys, labels, guidance):
    """Shapes, and class ids as far as they are known.

    Raises:
        ValueError: with the numbers.
    """
    c = net.config
    if labels.ndim != 1 or not labels.size or keys.shape != labels.shape:
        raise ValueError(
            f"labels have shape {labels.shape} and keys {keys.shape}; one of each per image is "
            "needed (row_keys makes keys)"
        )
    if not isinstance(labels, jax.core.Tracer):
        low, high = int(np.min(labels)), int(np.max(labels))
        if low < 0 or high > c.num_classes:
            wrong = low if low < 0 else high
            raise ValueError(
                f"class id {wrong} is not in 0..{c.num_classes - 1} "
                f"({c.num_classes} stands for no class)"
            )
    if guidance is None:
        return
    shape, wanted = guidance.shape, (c.num_tokens, labels.shape[0])
    try:
        fits = np.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"guidance has shape {shape}; it is a number, one per image ({wanted[1]},), or per "
            f"token ({wanted[0]}, 1) or {wanted}"
        )


def _best_cache(net, rows: int) -> str:
    """See `make_class_sampler`."""
    c = net.config
    if c.mixer != "mamba2" or c.num_tokens > DUAL_TOKENS:
        return "recurrent"
    state = jax.eval_shape(lambda: net.init_state(rows, unroll=True, cache="dual"))
    return "dual" if has_kernel(state) else "recurrent"


def make_class_sampler(
    net,
    *,
    unroll: bool | None = None,
    cache: str | None = None,
    state_dtype=None,
    piece: int = 64,
    return_logits: bool = False,
) -> Callable[..., Any]:
    """A jitted function that draws whole images of given classes.

    Args:
        net: AiM; its dtype decides in which precision the weights are read.
        unroll: compile every block on its own, see `AiM.step`; None does where the cache needs it.
        cache, state_dtype: what the mixers carry from token to token, and its dtype; see
            `AiM.init_state`. None takes the dual form where a kernel reads it and images are short
            enough for it to be the lesser traffic (`DUAL_TOKENS`), else the recurrent one.
        piece: where a dual cache is read whole, it grows by this many tokens, and the program has
            as many copies of a step.
        return_logits: also return the guided logits, before temperature and filters.

    Returns:
        sampler(variables, keys, labels, *, guidance=None, temperature=1.0, top_k=0, top_p=1.0)
            -> codes [B, T] int32, and with return_logits also [T, B, V] float32

        keys: [B] PRNG keys, one per image (`row_keys`). labels: [B] class ids; num_classes is the
            null class.
        guidance: s of uncond + s (cond - uncond), as logits, from the first token on: a number, one
            per image [B], or per token [T, 1] or [T, B] (`guidance_schedule`). None is s = 1
            without the cost of the unconditional rows.
        temperature, top_k, top_p: numbers, or one per image [B]; temperature 0 is greedy. The
            filters are those of `keep_likely`; the plain numbers 0 and 1 leave them out of the
            program.

    All settings are traced: other values compile nothing anew, except for switching guidance or a
    filter on or off. The variables are cast to the net's dtype in every call: where they are wider,
    `net.decoding_variables` saves that, and the memory, once for all.
    """
    c = net.config
    asked_cache, asked_unroll = cache, unroll

    def run(variables, keys, labels, guidance, temperature, top_k, top_p):
        batch = labels.shape[0]
        guided = guidance is not None
        if guided:
            labels = jnp.concatenate([labels, jnp.full_like(labels, c.num_classes)])
            guidance = jnp.broadcast_to(guidance, (c.num_tokens, batch))[:, :, None]
        cache = asked_cache or _best_cache(net, labels.shape[0])
        unroll = cache == "dual" if asked_unroll is None else asked_unroll
        modulation = net.apply(variables, labels, method="modulation")
        variables = net.decoding_variables(variables, unroll=unroll)
        begin = lambda slots: net.init_state(
            labels.shape[0], state_dtype, unroll=unroll, cache=cache, slots=slots
        )
        ends = dual_segments(jax.eval_shape(lambda: begin(0)), c.num_tokens, piece)

        def one(carry, inputs):
            tokens, state = carry
            index, strength = inputs
            rows = jnp.concatenate([tokens, tokens]) if guided else tokens
            logits, state = net.apply(variables, rows, index, state, modulation, method="step")
            if guided:
                cond, uncond = logits[:batch], logits[batch:]
                logits = uncond + strength * (cond - uncond)
            kept = keep_likely(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
            drawn = jax.vmap(jax.random.categorical)(own, kept)
            tokens = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))
            tokens = tokens.astype(jnp.int32)
            return (tokens, state), (tokens, logits if return_logits else None)

        tokens, state, outs = jnp.zeros((batch,), jnp.int32), begin(ends[0]), []
        for start, end in zip((0, *ends), ends):
            inputs = jnp.arange(start, end), guidance[start:end] if guided else None
            (tokens, state), out = lax.scan(one, (tokens, resize(state, end)), inputs)
            outs.append(out)
        codes, logits = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
        return (codes.T, logits) if return_logits else codes.T

    run = jax.jit(run)

    def sampler(variables, keys, labels, *, guidance=None, temperature=1.0, top_k=0, top_p=1.0):
        array = lambda value, dtype: jnp.asarray(value, dtype)
        labels = labels if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
        guidance = None if guidance is None else array(guidance, jnp.float32)
        _check(net, keys, labels, guidance)
        return run(
            variables,
            keys,
            array(labels, jnp.int32),
            guidance,
            array(temperature, jnp.float32),
            None if _off(top_k, 0) else array(top_k, jnp.int32),
            None if _off(top_p, 1) else array(top_p, jnp.float32),
        )

    return sampler
