"""Text from a language model: prefill, decode and streaming, all inside `jax.jit`.

A stream is explicit state: what the net remembers of the consumed tokens, and one pending token
per row that it has not seen yet. Drawing the next token feeds the pending one to the net and makes
the draw the new pending one, so a prompt's prefill needs no logits at all and nothing is computed
that is not used.

    sampler = make_sampler(net, length=200, stop_ids=(EOS,))
    prompts, lengths = pack_prompts([vocab.encode("The "), vocab.encode("def ")])
    tokens, used = sampler(variables, jax.random.key(0), prompts, lengths, temperature=0.8)

Row i's t-th draw uses the key fold_in(fold_in(key, i), t) and nothing else of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .filters import DROPPED, draw

PAD, EOS, UNK = 0, 1, 2
PREFILL_CHUNK = 256


class StreamState(NamedTuple):
    """State of a batch of streams; but for dense attention its size is the same for any context.

    Attributes:
        net_state: state of the net after all tokens but the pending one (`net.init_state`).
        token: [B] int32 pending token, which the net has not seen yet.
        segment: [B] int32 document id of the pending token.
        row_keys: [B] PRNG keys, fold_in(key, row).
        drawn: [] int32, tokens drawn so far.
        tables: position tables of the net, computed once, or None.
    """

    net_state: Any
    token: Array
    segment: Array
    row_keys: Array
    drawn: Array
    tables: Any


class TextStream(NamedTuple):
    """A net's streaming functions, jitted, made by `make_stream`.

    Attributes:
        init: (variables, key, prompts, lengths=None) -> StreamState; see `init_stream`.
        next: (variables, stream, *, temperature, top_k, top_p) -> tokens [B, n], StreamState.
    """

    init: Callable[..., StreamState]
    next: Callable[..., tuple[Array, StreamState]]


def pack_prompts(
    prompts: Sequence[Sequence[int]], *, multiple: int = 32, start: Sequence[int] = (EOS,)
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as one right-padded batch.

    Args:
        prompts: token ids of each prompt; may be empty.
        multiple: P is rounded up to 1 + a multiple of this, so that few shapes are ever compiled.
        start: put in front of every prompt; EOS is the first token of every document.

    Returns:
        tokens [B, P] int32 padded with 0, lengths [B] int32 (including `start`).
    """
    rows = [
        np.concatenate([np.asarray(list(start), np.int32), np.asarray(p, np.int32)])
        for p in prompts
    ]
    lengths = np.array([len(r) for r in rows], np.int32)
    if not rows or lengths.min() < 1:
        raise ValueError("every prompt needs at least one token; start=(EOS,) gives it one")
    width = 1 + -(-(int(lengths.max()) - 1) // multiple) * multiple
    tokens = np.full((len(rows), width), PAD, np.int32)
    for row, tokens_row in zip(rows, tokens):
        tokens_row[: len(row)] = row
    return tokens, lengths


def cast_weights(net, variables: dict[str, Any]) -> dict[str, Any]:
    """Matrices in the net's compute dtype: the same outputs from half the bytes in bfloat16.

    Decoding reads every weight once per token, so this is most of its cost. The output head and
    everything that the net uses in float32 (norms, biases, codebooks, a tied embedding) stay as
    they are.
    """

    def cast(path, a):
        names = [getattr(p, "key", None) for p in path]
        inside = names[0] == "layers" and names[-1] == "kernel"
        table = names == ["embedding"] and not net.config.tie_embeddings
        return a.astype(net.dtype) if inside or table else a

    params = jax.tree_util.tree_map_with_path(cast, variables["params"])
    return {**variables, "params": params}


def _strong(temperature, top_k, top_p) -> dict[str, Array]:
    """Settings as arrays of fixed dtypes: a float and an array must not compile twice."""
    return {
        "temperature": jnp.asarray(temperature, jnp.float32),
        "top_k": jnp.asarray(top_k, jnp.int32),
        "top_p": jnp.asarray(top_p, jnp.float32),
    }


def _int32(prompts, lengths, rows) -> tuple[Array, Array, Array]:
    """Prompts, lengths and row numbers as arrays, with their defaults."""
    prompts = jnp.asarray(prompts, jnp.int32)
    batch, width = prompts.shape
    lengths = np.full((batch,), width) if lengths is None else lengths
    rows = np.arange(batch) if rows is None else rows
    return prompts, jnp.asarray(lengths, jnp.int32), jnp.asarray(rows, jnp.int32)


def init_stream(
    net,
    variables: dict[str, Any],
    key: Array,
    prompts: Array,
    lengths: Array | None = None,
    *,
    rows: Array | None = None,
    max_new: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> StreamState:
    """Read prompts of different lengths and stop before the first draw.

    Args:
        net: a language model (TransformerVQ, MambaLM). variables: its {"params", "stats"}.
        key: PRNG key of the whole batch.
        prompts: [B, P] int32, right-padded; a document begins with EOS, so put one in front.
        lengths: [B] int32 in 1..P valid tokens per row; None means P.
        rows: [B] int32 numbers that seed the rows; 0..B-1 unless given.
        max_new: most tokens that will be drawn; only the quadratic kinds of attention need it,
            whose state has a slot for every token.
        prefill_chunk: tokens per prefill step; bounds the memory of a long prompt.

    Returns:
        The stream, its pending token being each row's last prompt token.
    """
    prompts, lengths, rows = _int32(prompts, lengths, rows)
    batch, width = prompts.shape
    lengths = jnp.clip(lengths, 1, width)
    segments = jnp.cumsum(prompts == EOS, axis=1, dtype=jnp.int32)
    last = (lengths - 1)[:, None]
    pick = lambda a: jnp.take_along_axis(a, last, axis=1)[:, 0]

    chunk = max(1, min(prefill_chunk, width - 1))
    slots = None
    if net.state_grows:
        if max_new is None:
            raise ValueError("this net's state has a slot for every token: give max_new")
        slots = width + max(max_new, chunk)  # a chunk is written whole, its padding included
    tables = net.decoding_tables(variables, slots)
    state = net.init_state(batch, max_length=slots)

    if width > 1:  # everything but the last token of each row
        n_chunk = -(-(width - 1) // chunk)
        padding = [(0, 0), (0, n_chunk * chunk - (width - 1))]
        cut = lambda a: jnp.moveaxis(
            jnp.pad(a[:, :-1], padding).reshape(batch, n_chunk, chunk), 1, 0
        )

        def read(state, inputs):
            start, tokens, ids = inputs
            valid = jnp.clip(lengths - 1 - start, 0, chunk)
            _, state, _ = net.apply(
                variables, tokens, state, lengths=valid, segment_ids=ids, tables=tables,
                method="extend",
            )  # fmt: skip
            return state, None

        starts = jnp.arange(n_chunk, dtype=jnp.int32) * chunk
        state, _ = lax.scan(read, state, (starts, cut(prompts), cut(segments)))

    row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    zero = jnp.zeros((), jnp.int32)
    return StreamState(state, pick(prompts), pick(segments), row_keys, zero, tables)


def next_logits(net, variables: dict[str, Any], stream: StreamState) -> tuple[Array, Any]:
    """Logits [B, V] float32 after the pending token, and the net's state with it consumed."""
    logits, state, _ = net.apply(
        variables, stream.token[:, None], stream.net_state, segment_ids=stream.segment[:, None],
        tables=stream.tables, method="extend",
    )  # fmt: skip
    return logits[:, 0], state


def push(stream: StreamState, net_state: Any, tokens: Array) -> StreamState:
    """The stream after its pending token was consumed (`net_state`), with `tokens` [B] pending."""
    tokens = tokens.astype(jnp.int32)
    return stream._replace(
        net_state=net_state,
        token=tokens,
        segment=stream.segment + (tokens == EOS),
        drawn=stream.drawn + 1,
    )


def next_tokens(
    net,
    variables: dict[str, Any],
    stream: StreamState,
    *,
    temperature: Array | float = 1.0,
    top_k: Array | int = 0,
    top_p: Array | float = 1.0,
    never: Sequence[int] = (PAD, UNK),
    vocab_size: int | None = None,
) -> tuple[Array, StreamState]:
    """Draw one token per row.

    Args:
        net, variables, stream: as in `init_stream`.
        temperature, top_k, top_p: numbers, or one per row [B]; 0, 0 and 1 mean greedy, off and off.
        never: ids that are not drawn.
        vocab_size: ids from here on are not drawn, where the vocabulary is smaller than the net's.

    Returns:
        tokens [B] int32 and the stream.
    """
    logits, state = next_logits(net, variables, stream)
    ids = np.arange(logits.shape[-1])
    barred = np.isin(ids, np.asarray(never, np.int64)) | (ids >= (vocab_size or len(ids)))
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(stream.row_keys, stream.drawn)
    allowed = jnp.where(barred, DROPPED, logits)
    tokens = draw(keys, allowed, temperature=temperature, top_k=top_k, top_p=top_p)
    return tokens, push(stream, state, tokens)


def make_sampler(
    net,
    *,
    length: int,
    stop_ids: Sequence[int] = (),
    never: Sequence[int] = (PAD, UNK),
    vocab_size: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Callable[..., tuple[Array, Array]]:
    """A jitted function that reads prompts and draws `length` tokens per row, in one call.

    Args:
        net: as in `init_stream`; its dtype decides in which precision the weights are read.
        length: tokens to draw.
        stop_ids: a row ends with the first of these that it draws (EOS, a newline, ..).
        never, vocab_size: as in `next_tokens`.
        prefill_chunk: as in `init_stream`.

    Returns:
        sampler(variables, key, prompts, lengths=None, *, rows=None, temperature=1.0, top_k=0,
            top_p=1.0) -> tokens [B, length] int32, used [B] int32
        with prompts and lengths as in `init_stream`. `used` counts the tokens drawn by each row,
        its stop token included; after them a row holds pad (0). Settings are traced: changing them
        compiles nothing.
    """
    stops = np.asarray(tuple(stop_ids), np.int32)

    def run(variables, key, prompts, lengths, rows, settings):
        variables = cast_weights(net, variables)
        stream = init_stream(
            net, variables, key, prompts, lengths, rows=rows, max_new=length,
            prefill_chunk=prefill_chunk,
        )  # fmt: skip
        tables = stream.tables  # constants stay out of the carry

        def one(carry, _):
            stream, done = carry
            tokens, stream = next_tokens(
                net, variables, stream._replace(tables=tables), never=never,
                vocab_size=vocab_size, **settings,
            )  # fmt: skip
            shown = jnp.where(done, PAD, tokens)
            carry = stream._replace(tables=None), done | jnp.isin(tokens, stops)
            return carry, (shown, ~done)

        carry = stream._replace(tables=None), jnp.zeros(prompts.shape[:1], bool)
        _, (tokens, live) = lax.scan(one, carry, length=length)
        return tokens.T, jnp.sum(live, axis=0, dtype=jnp.int32)

    run = jax.jit(run)

    def sampler(
        variables, key, prompts, lengths=None, *, rows=None, temperature=1.0, top_k=0, top_p=1.0
    ):
        settings = _strong(temperature, top_k, top_p)
        return run(variables, key, *_int32(prompts, lengths, rows), settings)

    return sampler


def make_stream(
    net,
    *,
    chunk: int = 1,
    max_new: int | None = None,
    never: Sequence[int] = (PAD, UNK),
    vocab_size: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    donate: bool = False,
) -> TextStream:
    """Streaming generation, as long as one likes: `stream = make_stream(net)`, then

        state = stream.init(variables, key, prompts, lengths)
        tokens, state = stream.next(variables, state, temperature=0.8)      # again and again

    Args:
        net: as in `init_stream`.
        chunk: tokens drawn per call of `next` (one trip to the host each).
        max_new: as in `init_stream`.
        never, vocab_size, prefill_chunk: as in `make_sampler`.
        donate: let `next` reuse the memory of the state passed to it, which must then not be used
            again.

    The variables are read as they are: pass them through `cast_weights` once for a bfloat16 net.
    """

    def init(variables, key, prompts, lengths, rows):
        return init_stream(
            net, variables, key, prompts, lengths, rows=rows, max_new=max_new,
            prefill_chunk=prefill_chunk,
        )  # fmt: skip

    def draw_chunk(stream, variables, settings):
        tables = stream.tables

        def one(stream, _):
            tokens, stream = next_tokens(
                net, variables, stream._replace(tables=tables), never=never,
                vocab_size=vocab_size, **settings,
            )  # fmt: skip
            return stream._replace(tables=None), tokens

        stream, tokens = lax.scan(one, stream._replace(tables=None), length=chunk)
        return tokens.T, stream._replace(tables=tables)

    init, draw_chunk = jax.jit(init), jax.jit(draw_chunk, donate_argnums=(0,) if donate else ())

    def start(variables, key, prompts, lengths=None, *, rows=None):
        return init(variables, key, *_int32(prompts, lengths, rows))

    def advance(variables, stream, *, temperature=1.0, top_k=0, top_p=1.0):
        return draw_chunk(stream, variables, _strong(temperature, top_k, top_p))

    return TextStream(start, advance)
