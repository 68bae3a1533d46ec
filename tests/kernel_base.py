"""The checks that every kernel passes, in every implementation.

An op plugs in with a `Spec` and one line:

    SPEC = Spec(op=vq_attention, make=make_inputs, time_axis={"q": 2, ...}, ...)
    test_vq_attention = kernel_tests(SPEC)

which makes one test per check and variant. The truth is the variant {"implementation": "reference"}
in float64. Checks take values and gradients from one compiled function per variant and shape, so
the whole set costs few compilations. Keep `make` tiny.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lintime.kernels_pallas.compat import auto_mesh, enable_x64

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """What the checks need to know about an op.

    Attributes:
        op: `op(**inputs, **options, **variant)`, returning `out`, or `(out, state)` if `state` is
            set. All arguments go by name.
        make: `make(rng, length, dtype)` -> inputs by name, drawn from a numpy Generator: an even
            number of rows, `length` tokens, float arrays in `dtype`; the initial state under the
            name `state`; no `lengths`.
        time_axis: time axis of each input that has one.
        batch_axis: batch axis of each input that has one (0 for `state`, implied); all other inputs
            are weights, shared by the rows.
        grad: names of the inputs to differentiate (`state`: its float leaves).
        constant: names of state leaves without a meaningful gradient (counts, say).
        variants: name -> keyword arguments, e.g. {"xla": {"implementation": "xla"}}.
        block: block length of the op (of `options`); lengths around it are tried.
        options: keyword arguments of all variants, the reference included.
        out_time_axis, out_batch_axis: axes of `out`.
        state: name of the state argument, or None for an op without state. Every leaf has the batch
            axis first.
        lengths: name of the argument with the number of valid tokens per row, or None.
        causal: False leaves out causality, prefixes and splitting.
        tolerance: largest error by dtype name, relative to the largest entry of each array.
        skip: checks that do not apply; say why where it is set.
        slow: variants that are marked slow; another one has to run always.
        clean_padding: inputs whose padding must stay valid (everything else gets NaN, or the
            largest integer).
    """

    op: Callable[..., Any]
    make: Callable[[np.random.Generator, int, Any], Inputs]
    time_axis: Mapping[str, int]
    batch_axis: Mapping[str, int]
    grad: tuple[str, ...]
    variants: Mapping[str, Mapping[str, Any]]
    block: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    out_time_axis: int = 1
    out_batch_axis: int = 0
    state: str | None = "state"
    lengths: str | None = "lengths"
    constant: tuple[str, ...] = ()
    causal: bool = True
    tolerance: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"float32": 1e-5, "bfloat16": 3e-2}
    )
    skip: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    clean_padding: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """The length used where any will do: a prime of more than two blocks."""
        n = 2 * self.block + 3
        while any(n % i == 0 for i in range(2, int(n**0.5) + 1)):
            n += 1
        return n

    @property
    def all_lengths(self) -> tuple[int, ...]:
        around = {1, self.block - 1, self.block, self.block + 1, self.length}
        return tuple(sorted(n for n in around if n >= 1))


# Running an op: values and gradients together, compiled once per variant and shape.


def call(spec: Spec, variant: str, inputs: Inputs) -> tuple[Any, Any]:
    """(out, state) of the op; state is None for an op without state."""
    kwargs = {"implementation": "reference"} if variant == "truth" else spec.variants[variant]
    result = spec.op(**inputs, **spec.options, **kwargs)
    return result if spec.state else (result, None)


def value_and_grads(spec: Spec, variant: str, inputs: Inputs, cotangent, wrap=lambda f: f):
    """((out, state), gradients by name) of the sum of both, weighted by the cotangent."""
    fixed = {k: v for k, v in inputs.items() if k not in spec.grad}

    def loss(moving):
        result = wrap(lambda m, f: call(spec, variant, {**m, **f}))(moving, fixed)
        pairs = zip(jax.tree.leaves(result), jax.tree.leaves(cotangent), strict=True)
        total = sum(
            jnp.sum(a.astype(jnp.promote_types(a.dtype, jnp.float32)) * c)
            for a, c in pairs
            if jnp.issubdtype(a.dtype, jnp.inexact)
        )
        return total, result

    moving = {k: inputs[k] for k in spec.grad}
    grads, result = jax.grad(loss, has_aux=True, allow_int=True)(moving)

    def keep(path, g):
        constant = jax.tree_util.keystr(path[-1:], simple=True) in spec.constant
        return None if constant or g.dtype == jax.dtypes.float0 else g

    return result, jax.tree_util.tree_map_with_path(keep, grads)


@functools.lru_cache(maxsize=64)
def compiled(spec: Spec, variant: str):
    return jax.jit(functools.partial(value_and_grads, spec, variant))


def make_cotangent(spec: Spec, inputs: Inputs, seed: int = 7):
    """Random float32 weights for `out` and every leaf of the state."""
    shapes = jax.eval_shape(functools.partial(call, spec, "truth"), inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32), shapes)


def run(spec: Spec, variant: str, inputs: Inputs, cotangent=None):
    """((out, state), gradients) as numpy; bfloat16 comes back as float32."""
    cotangent = make_cotangent(spec, inputs) if cotangent is None else cotangent
    return to_numpy(compiled(spec, variant)(inputs, cotangent))


def run_truth(spec: Spec, inputs: Inputs, cotangent=None):
    """The same by the reference in float64, from the same values."""
    cotangent = make_cotangent(spec, inputs) if cotangent is None else cotangent
    inputs, cotangent = to_numpy(inputs), to_numpy(cotangent)
    with enable_x64():
        wide = lambda a: jnp.asarray(a, jnp.float64 if a.dtype == np.float32 else a.dtype)
        inputs, cotangent = jax.tree.map(wide, (inputs, cotangent))
        return to_numpy(compiled(spec, "truth")(inputs, cotangent))


def to_numpy(tree):
    def convert(a):
        a = jnp.asarray(a)
        return np.asarray(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a)

    return jax.tree.map(convert, tree)


# Inputs.


def blank(spec: Spec, length: int, dtype=jnp.float32, seed: int = 0) -> Inputs:
    """Inputs from `make`."""
    return jax.tree.map(jnp.asarray, spec.make(np.random.default_rng(seed), length, dtype))


def fresh(spec: Spec, length: int, dtype=jnp.float32, seed: int = 0) -> Inputs:
    """Inputs from `make`, continuing from a state that has seen more than a block of tokens."""
    inputs = blank(spec, length, dtype, seed)
    if spec.state:
        before = blank(spec, spec.block + 2, dtype, seed + 1000)
        for name in inputs:
            if name not in spec.time_axis and name != spec.state:
                before[name] = inputs[name]  # one set of weights
        (_, state), _ = compiled(spec, "truth")(before, make_cotangent(spec, before))
        like = inputs[spec.state]
        inputs[spec.state] = jax.tree.map(lambda a, b: a.astype(b.dtype), state, like)
    return inputs


def cut(spec: Spec, inputs: Inputs, start: int, stop: int) -> Inputs:
    """Tokens start .. stop-1 of every input that runs along time."""
    part = lambda name, a: jax.lax.slice_in_dim(a, start, stop, axis=spec.time_axis[name])
    return {k: part(k, a) if k in spec.time_axis else a for k, a in inputs.items()}


def rows(spec: Spec, inputs: Inputs) -> int:
    name, axis = next(iter(spec.batch_axis.items()))
    return inputs[name].shape[axis]


def fill_padding(spec: Spec, inputs: Inputs, lengths, junk: bool) -> Inputs:
    """Zeros, or NaN and the largest integer, at and after `lengths` in every row."""
    filled = dict(inputs)
    for name, time in spec.time_axis.items():
        if name in spec.clean_padding or name not in spec.batch_axis:
            continue
        a = np.moveaxis(np.array(to_numpy(inputs[name])), (spec.batch_axis[name], time), (0, 1))
        if junk:
            value = np.iinfo(a.dtype).max if a.dtype.kind in "iu" else np.nan
        else:
            value = 0
        for row, n in enumerate(lengths):
            a[row, n:] = value
        a = np.moveaxis(a, (0, 1), (spec.batch_axis[name], time))
        filled[name] = jnp.asarray(a, inputs[name].dtype)
    return filled


def out_slice(spec: Spec, out, start: int, stop: int):
    return np.take(out, np.arange(start, stop), axis=spec.out_time_axis)


# Comparing.


def assert_close(got, want, tolerance: float, what: str):
    """Error of every leaf at most `tolerance` times its largest entry (taken as 0.01 at least)."""
    flat, structure = jax.tree.flatten_with_path(got)
    wanted, structure_wanted = jax.tree.flatten_with_path(want)
    assert structure == structure_wanted, f"{what}: {structure} is not {structure_wanted}"
    for (path, a), (_, b) in zip(flat, wanted, strict=True):
        name = f"{what}{jax.tree_util.keystr(path)}"
        assert a.shape == b.shape, f"{name}: shape {a.shape}, expected {b.shape}"
        if a.size == 0:
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        assert np.isfinite(a).all(), f"{name}: not finite"
        scale = max(np.abs(b).max(), 1e-2)
        error = np.abs(a - b).max() / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def assert_same(got, want, what: str):
    """Bitwise equality of every leaf."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, err_msg=what), got, want)


def _tolerance(spec, dtype="float32"):
    return spec.tolerance[dtype]


# The checks.


def check_reference(spec: Spec, variant: str, length: int):
    """Values, state and gradients equal the float64 reference's, at lengths around the block."""
    inputs = fresh(spec, length)
    (result, grads), (want, want_grads) = run(spec, variant, inputs), run_truth(spec, inputs)
    assert_close(result, want, _tolerance(spec), f"T={length} result")
    assert_close(grads, want_grads, 5 * _tolerance(spec), f"T={length} gradient of ")


def check_bfloat16(spec: Spec, variant: str):
    """bfloat16 inputs: near the float64 reference on the same values, result in bfloat16."""
    inputs = fresh(spec, spec.length, jnp.bfloat16)
    out, _ = jax.eval_shape(functools.partial(call, spec, variant), inputs)
    if spec.variants[variant].get("implementation") != "reference":
        assert out.dtype == jnp.bfloat16, f"bfloat16 inputs give {out.dtype}"
    (result, grads), (want, want_grads) = run(spec, variant, inputs), run_truth(spec, inputs)
    assert_close(result, want, _tolerance(spec, "bfloat16"), "bfloat16 result")
    assert_close(grads, want_grads, 3 * _tolerance(spec, "bfloat16"), "bfloat16 gradient of ")


def check_state(spec: Spec, variant: str):
    """The state that comes out has the structure, shapes and dtypes of the one that went in."""
    for dtype in (jnp.float32, jnp.bfloat16):
        inputs = blank(spec, spec.length, dtype)
        _, state = jax.eval_shape(functools.partial(call, spec, variant), inputs)
        describe = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
        assert describe(state) == describe(inputs[spec.state]), f"state for {dtype.__name__}"


def check_no_state(spec: Spec, variant: str):
    """state=None starts like the initial state of `make`."""
    inputs = blank(spec, spec.length)
    with_none = jax.jit(lambda i: call(spec, variant, {**i, spec.state: None}))
    got, want = to_numpy(with_none(inputs)), run(spec, variant, inputs)[0]
    assert_close(got, want, _tolerance(spec), "result with state=None")


def check_vmap(spec: Spec, variant: str):
    """vmap over rows-inputs with shared weights equals a loop, values and gradients."""
    many = [fresh(spec, spec.length, seed=s) for s in (0, 1)]
    mapped = {*spec.batch_axis, spec.state} & set(many[0])
    for inputs in many:
        inputs.update({k: many[0][k] for k in inputs if k not in mapped})
    cotangent = make_cotangent(spec, many[0])
    stacked = {
        k: jax.tree.map(lambda *a: jnp.stack(a), *(i[k] for i in many)) if k in mapped else v
        for k, v in many[0].items()
    }
    axes = ({k: 0 if k in mapped else None for k in stacked}, None)
    f = functools.partial(value_and_grads, spec, variant)
    got = to_numpy(jax.jit(jax.vmap(f, in_axes=axes))(stacked, cotangent))
    want = [run(spec, variant, inputs, cotangent) for inputs in many]
    want = jax.tree.map(lambda *a: np.stack(a), *want)
    assert_close(got, want, _tolerance(spec), "under vmap ")


def check_remat(spec: Spec, variant: str):
    """Gradients under jax.checkpoint equal those without."""
    inputs = fresh(spec, spec.length)
    f = functools.partial(value_and_grads, spec, variant, wrap=jax.checkpoint)
    got = to_numpy(jax.jit(f)(inputs, make_cotangent(spec, inputs)))
    assert_close(got, run(spec, variant, inputs), _tolerance(spec), "under remat ")


def check_shard_map(spec: Spec, variant: str):
    """Rows split over two devices, weights replicated, check_vma=True, gradient taken outside.

    Once from a given state and once from state=None (whose zeros are made inside).
    """
    mesh = auto_mesh((2,), ("data",))
    along = lambda axis: P(*(None,) * axis, "data")
    outputs = (along(spec.out_batch_axis), P("data") if spec.state else None)

    def wrap(f):
        def sharded(moving, fixed):
            place = lambda names: {
                k: P("data") if k == spec.state else along(spec.batch_axis[k])
                if k in spec.batch_axis
                else P()
                for k in names
            }  # fmt: skip
            specs = {"in_specs": (place(moving), place(fixed)), "out_specs": outputs}
            return jax.shard_map(f, mesh=mesh, check_vma=True, **specs)(moving, fixed)

        return sharded

    inputs = fresh(spec, spec.length)
    cotangent = make_cotangent(spec, inputs)
    f = functools.partial(value_and_grads, spec, variant, wrap=wrap)
    got = to_numpy(jax.jit(f)(inputs, cotangent))
    assert_close(got, run(spec, variant, inputs, cotangent), _tolerance(spec), "under shard_map ")
    if spec.state:
        inputs = blank(spec, spec.length)
        g = wrap(lambda moving, fixed: call(spec, variant, {**moving, spec.state: None}))
        got = jax.jit(g)({k: v for k, v in inputs.items() if k != spec.state}, {})
        want = run(spec, variant, inputs)[0]
        assert_close(to_numpy(got), want, _tolerance(spec), "under shard_map, no state ")


def check_padding(spec: Spec, variant: str):
    """Junk past each row's length changes nothing, bitwise, and gets no gradient; rows end
    right.
    """
    inputs = fresh(spec, spec.length)
    short = (0, 1, spec.block + 1, spec.length, spec.block)
    lengths = [short[i % len(short)] for i in range(1, 1 + rows(spec, inputs))]
    if len(lengths) > 2:
        lengths[-1] = 0
    ragged = {spec.lengths: jnp.asarray(lengths, jnp.int32)}
    cotangent = make_cotangent(spec, {**inputs, **ragged})
    go = lambda junk: run(
        spec, variant, {**fill_padding(spec, inputs, lengths, junk), **ragged}, cotangent
    )
    clean, dirty = go(False), go(True)
    assert_same(dirty, clean, "junk in the padding changed the result")
    for name in set(spec.grad) & set(spec.time_axis) & set(spec.batch_axis):
        g = np.moveaxis(dirty[1][name], (spec.batch_axis[name], spec.time_axis[name]), (0, 1))
        for row, n in enumerate(lengths):
            assert not g[row, n:].any(), f"gradient of {name} flows into the padding"
    (out, state), _ = dirty
    for row, n in enumerate(lengths):
        part = lambda a, axis, row=row: np.take(a, [row], axis=axis)
        of_row = functools.partial(jax.tree.map, functools.partial(part, axis=0))
        got_state = of_row(state)
        if n == 0:
            before = to_numpy(inputs.get(spec.state))
            assert_close(got_state, of_row(before), _tolerance(spec), "state after no token ")
            continue
        (want, want_state), _ = run(spec, variant, cut(spec, inputs, 0, n))
        got = out_slice(spec, part(out, spec.out_batch_axis), 0, n)
        assert_close(got, part(want, spec.out_batch_axis), _tolerance(spec), f"row of length {n} ")
        assert_close(got_state, of_row(want_state), _tolerance(spec), f"state after length {n} ")


def check_causality(spec: Spec, variant: str):
    """Outputs before t do not depend on inputs from t on, bitwise, nor have a gradient there."""
    first, other = (fresh(spec, spec.length, seed=s) for s in (0, 5))
    cotangent = make_cotangent(spec, first)
    (out, _), _ = run(spec, variant, first, cotangent)
    for t in (1, spec.block, spec.length - 1):
        head, tail = cut(spec, first, 0, t), cut(spec, other, t, spec.length)
        changed = dict(first)
        for name, axis in spec.time_axis.items():
            changed[name] = jnp.concatenate([head[name], tail[name]], axis=axis)
        weights, rest = jax.tree.map(np.copy, cotangent)
        np.moveaxis(weights, spec.out_time_axis, 0)[t:] = 0
        rest = jax.tree.map(np.zeros_like, rest)
        (got, _), grads = run(spec, variant, changed, (weights, rest))
        assert_same(
            out_slice(spec, got, 0, t), out_slice(spec, out, 0, t), f"the past of t={t} changed"
        )
        for name in set(spec.grad) & set(spec.time_axis):
            later = np.moveaxis(grads[name], spec.time_axis[name], 0)[t:]
            assert not later.any(), f"outputs before t={t} have a gradient in later {name}"


def check_prefix(spec: Spec, variant: str):
    """The op on the first n tokens gives the first n outputs."""
    inputs = fresh(spec, spec.length)
    (out, _), _ = run(spec, variant, inputs)
    for n in spec.all_lengths[:-1]:
        (got, _), _ = run(spec, variant, cut(spec, inputs, 0, n))
        assert_close(got, out_slice(spec, out, 0, n), _tolerance(spec), f"first {n} tokens ")


def check_split(spec: Spec, variant: str):
    """Going on from the carried state equals one call over everything, wherever it is split."""
    inputs = fresh(spec, spec.length)
    whole, _ = run(spec, variant, inputs)
    b = spec.block
    for points in ((1, 1 + b, 2 + 2 * b), (b, 2 * b + 1)):  # chunks of lengths compiled already
        outs, state, start = [], inputs[spec.state], 0
        for stop in (*points, spec.length):
            part = {**cut(spec, inputs, start, stop), spec.state: state}
            (out, state), _ = compiled(spec, variant)(part, make_cotangent(spec, part))
            outs.append(to_numpy(out))
            start = stop
        got = (np.concatenate(outs, axis=spec.out_time_axis), to_numpy(state))
        assert_close(got, whole, _tolerance(spec), f"split at {points} ")


def checks_for(spec: Spec) -> dict[str, Callable[[Spec, str], None]]:
    """The checks that apply to an op, by name."""
    checks = {
        f"reference-T{n}": functools.partial(check_reference, length=n) for n in spec.all_lengths
    }
    checks |= {
        "bfloat16": check_bfloat16,
        "vmap": check_vmap,
        "remat": check_remat,
        "shard_map": check_shard_map,
    }
    if spec.state:
        checks |= {"state": check_state, "no_state": check_no_state}
    if spec.lengths:
        checks |= {"padding": check_padding}
    if spec.causal:
        checks |= {"causality": check_causality, "prefix": check_prefix}
        if spec.state:
            checks |= {"split": check_split}
    unknown = set(spec.skip) - set(checks)
    assert not unknown, f"skip names no check: {sorted(unknown)}"
    return {name: check for name, check in checks.items() if name not in spec.skip}


def kernel_tests(spec: Spec):
    """A test function, parametrised over the checks and variants of `spec`."""
    checks = checks_for(spec)

    assert set(spec.slow) < set(spec.variants)
    mark = lambda v: pytest.param(v, marks=pytest.mark.slow) if v in spec.slow else v

    @pytest.mark.parametrize("variant", [mark(v) for v in spec.variants])
    @pytest.mark.parametrize("check", checks)
    def test(check, variant):
        checks[check](spec, variant)

    return test
