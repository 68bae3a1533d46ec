"""SSD: every implementation against the float64 recurrence, at any chunk length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import PartitionSpec

from lintime.kernels_pallas.compat import auto_mesh, enable_x64
from lintime.kernels_pallas.ssd import chunk_parts, pallas_tpu, ssd, ssd_step
from lintime.kernels_pallas.ssd.sharded import ssd_sharded
from lintime.kernels_pallas.ssd.xla import pass_states

from .aot import lower_for_cuda
from .aot.test_ssd import gradient, operands
from .kernel_base import Spec, assert_close, checks_for, kernel_tests, to_numpy

B, H, G, P, N = 2, 4, 2, 3, 5


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def make_inputs(
    rng, length, dtype, *, heads=H, groups=G, p=P, n=N, skip="H", gate=True, resets=True
):
    """dt from 0.05 to 1 after the softplus, decays from slow to fast."""
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    inputs = {
        "x": draw(B, length, heads, p),
        "dt": draw(B, length, heads),
        "A": -np.geomspace(0.1, 4, heads).astype(np.float32),
        "B": draw(B, length, groups, n),
        "C": draw(B, length, groups, n),
        "dt_bias": np.linspace(-3, 0, heads).astype(np.float32),
        "state": np.zeros((B, heads, p, n), np.float32),
    }
    if skip:
        inputs["D"] = rng.standard_normal((heads, p)[: len(skip)]).astype(np.float32)
    if gate:
        inputs["z"] = draw(B, length, heads, p)
    if resets:
        inputs["resets"] = (rng.integers(0, 6, (B, length)) == 0) & (np.arange(length) > 0)
    return inputs


def spec(block, variants, sizes=None, skip=(), **options):
    optional = sizes or {}
    make = lambda rng, length, dtype: make_inputs(rng, length, dtype, **optional)
    names = make(np.random.default_rng(0), 1, np.float32)
    series = [k for k in names if k not in ("A", "D", "dt_bias", "state")]
    return Spec(
        op=ssd,
        make=make,
        time_axis=dict.fromkeys(series, 1),
        batch_axis=dict.fromkeys(series, 0),
        grad=tuple(k for k in names if k != "resets"),
        variants=variants,
        block=block,
        options={"dt_softplus": True, **options},
        clean_padding=("resets",),
        skip=skip,
    )


XLA = {"xla": {"implementation": "xla", "chunk": 4}}
TPU = {"pallas_tpu": {"implementation": "pallas_tpu", "chunk": 8}}
FULL = spec(4, XLA)
LENGTHS = ("reference-T1", "reference-T3", "reference-T4")
test_kernel = kernel_tests(spec(4, XLA, skip=LENGTHS))  # they follow, marked slow
# The interpreter cannot run under jax.checkpoint, and it is slow: two lengths next to the chunk,
# prefixes and splits are left to the checks of lengths, causality and states.
test_kernel_tpu = pytest.mark.slow(
    kernel_tests(
        spec(
            8,
            TPU,
            {"heads": 2, "groups": 1},
            skip=("remat", "reference-T7", "reference-T8", "prefix", "split"),
        )
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("check", LENGTHS)
def test_kernel_lengths(check):
    checks_for(FULL)[check](FULL, "xla")


def value_and_grads(inputs, **options):
    """(y, state) and the gradients of a fixed random combination of both."""
    moving = {k: v for k, v in inputs.items() if k != "resets"}
    rest = {k: v for k, v in inputs.items() if k == "resets"}

    def loss(moving):
        y, state = ssd(**moving, **rest, **options)
        return jnp.sum(y * jnp.sin(1.0 + jnp.arange(y.size).reshape(y.shape))) + jnp.sum(
            state * jnp.cos(jnp.arange(state.size).reshape(state.shape))
        ), (y, state)

    grads, result = jax.jit(jax.grad(loss, has_aux=True))(moving)
    return to_numpy((result, grads))


def truth(inputs, **options):
    with enable_x64():
        widen = lambda v: jnp.asarray(v, jnp.float64 if v.dtype == np.float32 else v.dtype)
        wide = jax.tree.map(widen, inputs)
        return value_and_grads(wide, **options, implementation="reference")


def some_inputs(length=11, seed=3, **sizes):
    inputs = make_inputs(np.random.default_rng(seed), length, np.float32, **sizes)
    inputs["state"] += np.random.default_rng(1).standard_normal(inputs["state"].shape)
    return inputs


def loop(a, reverse=False, lengths=None, dt_limit=(0.0, np.inf)):
    """The definition as a loop over rows, steps and heads, in float64 numpy."""
    a = {k: np.asarray(v, np.float64 if v.dtype != bool else bool) for k, v in a.items()}
    rows, t_len, heads, _ = a["x"].shape
    y, final = np.zeros_like(a["x"]), a["state"].copy()
    for b, h in np.ndindex(rows, heads):
        g = h // (heads // a["B"].shape[2])
        steps = range(t_len if lengths is None else lengths[b])
        for t in reversed(steps) if reverse else steps:
            dt = np.clip(np.log1p(np.exp(a["dt"][b, t, h] + a["dt_bias"][h])), *dt_limit)
            if a["resets"][b, t]:
                final[b, h] = 0
            drive = np.outer(dt * a["x"][b, t, h], a["B"][b, t, g])
            final[b, h] = np.exp(dt * a["A"][h]) * final[b, h] + drive
            y[b, t, h] = final[b, h] @ a["C"][b, t, g] + a["D"][h] * a["x"][b, t, h]
            y[b, t, h] *= a["z"][b, t, h] / (1 + np.exp(-a["z"][b, t, h]))
    return y, final


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_definition(implementation, reverse):
    """Groups, D per channel, gate, clamp, resets, ragged rows, both directions: to 1e-12."""
    inputs = some_inputs(skip="HP")
    inputs["resets"][:, ::-1][0, 0] = True  # also where the state would enter
    options = {"dt_limit": (0.1, 0.6), "lengths": np.array([11, 8], np.int32), "reverse": reverse}
    want = loop(inputs, **options)
    with enable_x64():
        wide = jax.tree.map(lambda v: v.astype(np.float64) if v.dtype == np.float32 else v, inputs)
        options |= {"dt_softplus": True, "chunk": 4, "implementation": implementation}
        got = jax.jit(lambda a: ssd(**a, **options))(wide)
    assert_close(to_numpy(got), want, 1e-12, "")


@pytest.mark.slow
def test_any_chunk():
    """The chunk changes nothing, from one step (states passed on over two levels) to all."""
    inputs = some_inputs(length=80)
    want = truth(inputs, dt_softplus=True)
    for chunk in (1, 16, 500):
        got = value_and_grads(inputs, dt_softplus=True, chunk=chunk, implementation="xla")
        assert_close(got, want, 5e-5, f"chunk={chunk} ")


@pytest.mark.parametrize("length, chunk", [(1, 4), (7, 8), (9, 4)])
def test_nothing_optional(length, chunk):
    """No D, z, bias, softplus, state, resets; as many groups as heads; odd sizes."""
    inputs = some_inputs(length, heads=3, groups=3, skip="", gate=False, resets=False)
    del inputs["dt_bias"], inputs["state"]
    inputs["dt"] = np.abs(inputs["dt"])
    got = value_and_grads(inputs, chunk=chunk, implementation="xla")
    assert_close(got, truth(inputs), 2e-5, "")


@pytest.mark.parametrize("wanted", ["y", "state"])
def test_gradient_of_one_output(wanted):
    """Only one of the two outputs is used: the other's part of the gradient is left out."""
    inputs = some_inputs()
    pick = 0 if wanted == "y" else 1

    def grad(implementation):
        run = lambda m: ssd(
            **m, resets=inputs["resets"], dt_softplus=True, chunk=4, implementation=implementation
        )[pick]
        moving = {k: v for k, v in inputs.items() if k != "resets"}
        return to_numpy(jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(run(m)))))(moving))

    assert_close(grad("xla"), grad("reference"), 5e-5, f"only {wanted}: ")


@pytest.mark.parametrize("scale", [1e-4, slow(1.0), 10.0])
def test_strong_and_weak_decay_over_long_chunks(scale):
    """dt from 1e-4 to 10 with A down to -16: decays over 256 steps from almost none to e^-40000."""
    inputs = some_inputs(length=300, gate=False, resets=False)
    inputs["A"] *= 4
    inputs["dt"] = (scale * np.exp(0.3 * inputs["dt"])).astype(np.float32)
    del inputs["dt_bias"]
    got = value_and_grads(inputs, chunk=256, implementation="xla")
    assert_close(got, truth(inputs), 2e-4, f"dt about {scale}: ")


def test_steps_continue_a_sequence():
    """Single steps after a call equal one call over everything, clamp included."""
    inputs = some_inputs(length=9, resets=False)
    options = {"dt_softplus": True, "dt_limit": (0.05, 0.5)}
    run = jax.jit(lambda a: ssd(**a, **options, chunk=4))
    advance = jax.jit(lambda a: ssd_step(**a, **options))
    want, last = run(inputs)
    weights = {k: inputs[k] for k in ("A", "D", "dt_bias")}
    part = lambda f: {k: f(inputs[k]) for k in ("x", "dt", "B", "C", "z")}
    head = part(lambda v: v[:, :6])
    _, state = run({**head, **weights, "state": inputs["state"]})
    for t in range(6, 9):
        now = part(lambda v, t=t: v[:, t])
        y, state = advance({**now, **weights, "state": state})
        np.testing.assert_allclose(y, want[:, t], atol=2e-5)
    np.testing.assert_allclose(state, last, atol=2e-5)


def test_chunk_parts():
    """The four parts of the chunked form add up to the outputs and states."""
    inputs = some_inputs(length=10, gate=False, resets=False)
    del inputs["D"]
    y, last = jax.jit(lambda a: ssd(**a, dt_softplus=True))(inputs)
    parts = jax.jit(lambda a: chunk_parts(**a, dt_softplus=True, chunk=4))(inputs)
    shapes = {k: v.shape for k, v in parts.items()}
    assert shapes == {
        "dt_active": (B, H, 3, 4), "dA_cumsum": (B, H, 3, 4), "CB": (B, 3, G, 4, 4),
        "chunk_states": (B, 3, H, P, N), "states_in": (B, 3, H, P, N),
    }  # fmt: skip
    end = np.exp(parts["dA_cumsum"][..., -1])[:, :, 2, None, None]
    np.testing.assert_allclose(
        end * parts["states_in"][:, 2] + parts["chunk_states"][:, 2], last, atol=1e-5
    )
    assert not np.any(parts["dt_active"][:, :, 2, 2:])
    cs, c = parts["dA_cumsum"][:, :, 1], 1
    heads = lambda v: np.repeat(v, H // G, axis=1)
    mask = np.tril(np.exp(np.tril(cs[..., :, None] - cs[..., None, :])))
    scores = heads(parts["CB"][:, c]) * mask * parts["dt_active"][:, :, c, None]
    got = np.einsum("bhls,bshp->blhp", scores, inputs["x"][:, 4:8])
    late = np.einsum("bhpn,bhln->blhp", parts["states_in"][:, c], heads(
        np.moveaxis(inputs["C"][:, 4:8], 2, 1)))  # fmt: skip
    got += late * np.moveaxis(np.exp(cs), 1, 2)[..., None]
    np.testing.assert_allclose(got, y[:, 4:8], atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dt": (B, 5, 3)}, r"dt has shape \(2, 5, 3\), expected \(2, 5, 4\) \[B, T, H\]"),
        ({"D": (4, 2)}, r"D has shape \(4, 2\), expected \(4,\) \[H\] or \(4, 3\) \[H, P\]"),
        ({"B": (B, 5, 3, N), "C": (B, 5, 3, N)}, "4 heads are not a multiple of 3 groups"),
        ({"state": (B, H, N, P)}, r"state has shape .*\[B, H, P, N\]"),
        ({"x": (B, 5, H)}, r"x has shape \(2, 5, 4\), expected \[B, T, H, P\]"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"implementation": "magic"}, "does not exist on"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        change = {k: np.zeros(v) if isinstance(v, tuple) else v for k, v in change.items()}
        ssd(**{**some_inputs(length=5), **change})


def test_backward_keeps_no_scores():
    """What the gradient keeps is of the size of the inputs and the chunk states."""
    inputs = some_inputs(length=64, gate=False, resets=False)
    run = lambda m: ssd(**m, dt_softplus=True, chunk=32, implementation="xla")
    kept = jax.eval_shape(lambda m: jax.vjp(run, m)[1], inputs)
    largest = max(leaf.size for leaf in jax.tree.leaves(kept))
    assert largest <= max(B * 64 * H * P, B * 2 * H * P * N)


@pytest.mark.parametrize(
    "shards, reverse",
    [(2, True), (8, False)] + [slow(*v) for v in ((1, False), (4, True))],
)
def test_sharded_over_time(shards, reverse):
    """Time over 1 to 8 devices (rows over the others) equals one device, gradients included."""
    mesh = auto_mesh((2 if shards < 5 else 1, shards), ("data", "time"))
    inputs = some_inputs(length=16)
    inputs["resets"][1] = np.arange(16) == 9  # one row with shards that let the state through
    if reverse and shards == 2:
        del inputs["state"]
    options = {"dt_softplus": True, "chunk": 3, "reverse": reverse}
    place = {k: PartitionSpec("data", "time") for k in ("x", "dt", "B", "C", "z", "resets")}
    specs = {k: place.get(k, PartitionSpec("data" if k == "state" else None)) for k in inputs}

    def run(inputs):
        local = lambda a: ssd_sharded(**a, axis_name="time", **options)
        outputs = (PartitionSpec("data", "time"), PartitionSpec("data"))
        return jax.shard_map(
            local, mesh=mesh, in_specs=(specs,), out_specs=outputs, check_vma=True
        )(inputs)

    def value_and_grads(f):
        resets = inputs["resets"]

        def loss(moving):
            y, state = f({**moving, "resets": resets})
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)) + jnp.sum(
                state * jnp.sin(jnp.arange(state.size)).reshape(state.shape)
            ), (y, state)

        moving = {k: v for k, v in inputs.items() if k != "resets"}
        return to_numpy(jax.jit(jax.grad(loss, has_aux=True))(moving))

    want = value_and_grads(lambda a: ssd(**a, **options))
    assert_close(value_and_grads(run), want, 2e-5, f"{shards} shards: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 8, "groups": 2, "p": 64, "n": 128},  # 4 blocks of 2 heads, 2 to a group
        # 2 groups in a block; no tile fits: all heads
        slow({"heads": 4, "groups": 4, "p": 64, "n": 64, "resets": False}),
        slow({"heads": 3, "groups": 3, "skip": "", "gate": False}),
    ],
)
def test_tpu_blocks_of_heads(sizes, monkeypatch):
    """Heads in several blocks, groups shared by blocks or several to a block; 3 chunks."""
    monkeypatch.setattr(pallas_tpu, "HEADS", 2)
    inputs = some_inputs(length=17, **sizes)
    got = value_and_grads(inputs, dt_softplus=True, chunk=8, implementation="pallas_tpu")
    assert_close(got, truth(inputs, dt_softplus=True), 5e-5, "")


GPU_INTERPRETER = pytest.mark.skipif(
    not hasattr(mosaic_gpu, "InterpretGPUParams"), reason="this jax has no GPU interpreter"
)


def gpu_inputs(length, **sizes):
    """x, B, C, z in bfloat16."""
    inputs = some_inputs(length=length, **{"p": 64, "n": 64, **sizes})
    narrow = lambda k, v: jnp.asarray(v, jnp.bfloat16) if k in ("x", "B", "C", "z") else v
    return {k: narrow(k, v) for k, v in inputs.items()}


@GPU_INTERPRETER
@pytest.mark.parametrize(
    "split, length, sizes, options",
    [
        (1, 130, {"heads": 4, "groups": 2, "skip": "HP"}, {}),  # three chunks, a block per group
        (2, 250, {"heads": 1, "groups": 1, "n": 128}, {"lengths": [250, 131], "reverse": True}),
        (3, 3 * 64, {"heads": 2, "groups": 1, "skip": "", "gate": False, "resets": False}, {}),
        (1, 5, {"heads": 2, "groups": 2}, {}),  # a single chunk
        slow(1, 70, {"heads": 6, "groups": 1, "n": 128}, {}),  # more heads than stages
        slow(1, 70, {"heads": 2, "groups": 1, "p": 128}, {"dt_limit": (0.05, 0.5)}),
    ],
)
def test_gpu_kernel(split, length, sizes, options, monkeypatch):
    """The kernels in the interpreter (products in registers replaced), forward and gradient."""
    from lintime.kernels_pallas.ssd import gpu_backward, pallas_gpu

    monkeypatch.setattr(pallas_gpu, "segments", lambda *_: split)
    monkeypatch.setattr(gpu_backward, "PROCESSORS", 1)  # all heads of a group in one block
    inputs = gpu_inputs(length, **sizes)
    if split == 3:
        del inputs["state"]
    options = {"dt_softplus": True, "chunk": 64} | options
    if "lengths" in options:
        options["lengths"] = jnp.asarray(options["lengths"], jnp.int32)
    run = lambda a: ssd(**a, **options, implementation="pallas_gpu")
    got = jax.jit(run)(inputs)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    wide = {k: jnp.asarray(v, jnp.float32) if v.dtype != bool else v for k, v in inputs.items()}
    want = jax.jit(lambda a: ssd(**a, **options, implementation="reference"))(wide)
    assert_close(to_numpy(got), to_numpy(want), 1e-2, "")
    got = value_and_grads(inputs, **options, implementation="pallas_gpu")[1]
    want = value_and_grads(wide, **options, implementation="reference")[1]
    assert_close(got, want, 2e-2, "gradient of ")


@GPU_INTERPRETER
@pytest.mark.parametrize("wanted", ["y", "state"])
def test_gpu_gradient_of_one_output(wanted):
    """Only one of the two outputs is used."""
    inputs = gpu_inputs(70, heads=2, groups=1, gate=False)
    resets = inputs.pop("resets")
    wide = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}

    def grad(implementation, inputs):
        pick = 0 if wanted == "y" else 1
        run = lambda m: ssd(
            **m, resets=resets, dt_softplus=True, chunk=64, implementation=implementation
        )[pick]
        weigh = lambda v: jnp.sum(v * jnp.cos(jnp.arange(v.size)).reshape(v.shape))
        return to_numpy(jax.jit(jax.grad(lambda m: weigh(run(m))))(inputs))

    got, want = grad("pallas_gpu", inputs), grad("reference", wide)
    assert_close(got, want, 2e-2, f"only {wanted}: ")


@GPU_INTERPRETER
def test_gpu_gradient_of_weak_decay():
    """What cancels in the gradient of A and dt cancels: steps so small that nothing decays."""
    inputs = gpu_inputs(70, heads=2, groups=1, gate=False, resets=False)
    del inputs["dt_bias"]
    inputs["dt"] = (1e-4 * np.exp(0.3 * inputs["dt"])).astype(np.float32)
    wide = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
    got = value_and_grads(inputs, chunk=64, implementation="pallas_gpu")[1]
    assert_close(got, value_and_grads(wide, implementation="reference")[1], 1e-2, "")


def test_gpu_lowers():
    """Forward and gradient lower for CUDA, in one pass and in segments, with every option."""
    state = (jnp.float32, 2, 8, 64, 128)
    packed = operands(2, 500, 8, 64, 128, groups=2, state=state, resets=(bool, 2, 500))
    packed["z"] = packed["x"]
    for inputs, kernels in ((operands(8, 512, 64, 64, 128), 1), (operands(1, 4096, 2, 64, 64), 2)):
        text = lower_for_cuda(
            lambda a: ssd(**a, dt_softplus=True, implementation="pallas_gpu"), inputs
        )
        assert text.count("custom_call @mosaic_gpu") == kernels
    few = operands(1, 4096, 2, 64, 64)  # segments: a pass of its own before the walk, each way
    for inputs, kernels in ((packed, 3), (few, 5), (operands(2, 256, 6, 128, 64), 3)):
        text = lower_for_cuda(gradient("pallas_gpu", 128), inputs)
        assert text.count("custom_call @mosaic_gpu") == kernels
    text = lower_for_cuda(gradient("pallas_gpu", 128), operands(2, 64, 2, 64, 64))
    assert "mosaic_gpu" not in text  # a single chunk: XLA's gradient


def test_gpu_segments_fill_the_chip():
    """Time is split only where rows and heads alone leave the chip idle."""
    from lintime.kernels_pallas.ssd.pallas_gpu import segments

    assert segments(8, 64, 32) == 1 and segments(64, 48, 4) == 1
    assert (
        segments(1, 64, 1024) == 4
        and segments(2, 64, 256) == 2
        and segments(1, 1, 16) == 2
        and segments(1, 1, 1) == 1
    )


def test_gpu_blocks_of_heads():
    """Heads per program: as many as leave whole waves, all where there are chunks enough."""
    from lintime.kernels_pallas.ssd.gpu_backward import block_of_heads

    assert [block_of_heads(64, n) for n in (1, 256, 1024)] == [1, 64, 64]
    assert block_of_heads(48, 256) == 48 and block_of_heads(6, 132 * 4) == 6
    assert block_of_heads(64, 66) == 32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.float32}, "x of float32 "),
        ({"p": 32}, "head width P=32 with N=64 states"),
        ({"p": 128, "n": 128}, "P N <= 8192"),
    ],
)
def test_gpu_refuses(change, message):
    sizes = {k: v for k, v in change.items() if k != "x"}
    inputs = gpu_inputs(64, **sizes)
    inputs["x"] = inputs["x"].astype(change.get("x", jnp.bfloat16))
    with pytest.raises(ValueError, match=message):
        ssd(**inputs, implementation="pallas_gpu")


@pytest.mark.parametrize("n, reverse", [(33, True), (600, False)])
def test_pass_states_over_levels(n, reverse):
    """Two and three levels of groups, chunks that let nothing through, both directions."""
    rng = np.random.default_rng(n)
    log_total = -rng.exponential(0.2, (2, n, 1, 2)).astype(np.float32)
    closed = rng.integers(0, 20, (2, n)) == 0
    states, first = rng.standard_normal((2, n, 1, 2, 3, 4)), rng.standard_normal((2, 1, 2, 3, 4))
    want, carried = np.zeros_like(states), first.copy()
    for c in reversed(range(n)) if reverse else range(n):
        want[:, c] = carried
        decay = np.where(closed[:, c, None, None], 0, np.exp(log_total[:, c]))
        carried = decay[..., None, None] * carried + states[:, c]
    args = [jnp.asarray(v, jnp.float32) for v in (states, first)]
    got = jax.jit(functools.partial(pass_states, reverse=reverse))(log_total, closed, *args)
    assert_close(to_numpy(got), (want, carried), 1e-5, "")
