"""Decoding by the dual form: every implementation against the recurrence, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lintime.kernels_pallas.compat import enable_x64
from lintime.kernels_pallas.ssd import ssd
from lintime.kernels_pallas.ssd_decode import (
    DualCache,
    append,
    implementation_for,
    init_cache,
    pallas_gpu,
    resize,
    ssd_decode,
    ssd_decode_step,
)

from .aot import cuda_device, lower_for_cuda

# On a GPU the kernel runs as it is; on a CPU in an interpreter that older jax does not have.
needs_gpu_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams") and jax.config.jax_platforms == "cpu",
    reason="this jax has no interpreter for Mosaic GPU kernels",
)
KERNEL = pytest.param("pallas_gpu", marks=needs_gpu_interpreter)
SMALL = dict(rows=2, heads=6, groups=3, width=4, states=5)
WIDE = dict(rows=2, heads=8, groups=1, width=64, states=64)  # the kernel takes it
EXACT = {"xla": 1e-2, "reference": 1e-5, "pallas_gpu": 1e-5}  # of bfloat16 operands


@pytest.fixture(autouse=True)
def clear_kernels():
    """A kernel is compiled once for a plan, which does not know of what a test patches."""
    yield
    pallas_gpu._kernel.clear_cache()


def tokens(rng, length, rows, heads, groups, width, states, dtype=np.float32, skip="H"):
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return {
        "xBC": draw(length, rows, heads * width + 2 * groups * states),
        "dt": draw(length, rows, heads),
        "A": -np.geomspace(0.1, 8, heads).astype(np.float32),
        "D": rng.standard_normal((heads, width)[: len(skip)]).astype(np.float32),
        "dt_bias": np.linspace(-3, 0, heads).astype(np.float32),
    }


def recurrence(given, rows, heads, groups, width, states, **options):
    """[T, R, H, P] in float64."""
    with enable_x64():
        wide = {name: jnp.asarray(v, jnp.float64) for name, v in given.items()}
        sizes = np.cumsum([heads * width, groups * states])
        cut = jnp.split(jnp.moveaxis(wide.pop("xBC"), 0, 1), sizes, axis=2)
        x, B, C = (
            v.reshape(*v.shape[:2], -1, n)
            for v, n in zip(cut, (width, states, states), strict=True)
        )
        dt = jnp.moveaxis(wide.pop("dt"), 0, 1)
        options = {"dt_softplus": True, "implementation": "reference"} | options
        y, _ = ssd(x, dt, wide.pop("A"), B, C, wide.pop("D"), **wide, **options)
        return np.moveaxis(np.asarray(y), 1, 0)


def junk(cache, implementation):
    """All of a cache but its sums, which count from zero: NaN, if the implementation takes it."""
    bad = jax.tree.map(lambda v: jnp.full(v.shape, jnp.nan, v.dtype), cache)
    return bad._replace(cs=cache.cs, x=cache.x if implementation == "xla" else bad.x)


def run(given, sizes, slots, implementation, dtype, **options):
    """Every token's output, [T, R, H, P], from a cache full of junk."""
    options = {"dt_softplus": True} | options
    weights = {name: given[name] for name in ("A", "D", "dt_bias")}

    def advance(cache, now):
        index, xBC, dt = now
        y, cache = ssd_decode_step(
            cache, xBC, dt, **weights, index=index, implementation=implementation, **options
        )
        return cache, y

    cache = junk(init_cache(slots=slots, dtype=dtype, **sizes), implementation)
    each = jnp.arange(len(given["dt"])), given["xBC"], given["dt"]
    cache, y = jax.jit(lambda c, each: jax.lax.scan(advance, c, each))(cache, each)
    return np.asarray(y), cache


def off(got, truth):
    """Largest error of any token, relative to the largest output."""
    return np.max(np.abs(np.asarray(got, np.float64) - truth)) / np.max(np.abs(truth))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("skip", ["H", "HP"])
@pytest.mark.parametrize("limit", [(0.0, np.inf), (0.1, 0.5)])
def test_steps_are_the_recurrence(implementation, skip, limit):
    given = tokens(np.random.default_rng(0), 9, **SMALL, skip=skip)
    truth = recurrence(given, **SMALL, dt_limit=limit)
    got, _ = run(given, SMALL, 11, implementation, np.float32, dt_limit=limit)
    assert got.dtype == np.float32 and off(got, truth) < 1e-5


def test_steps_in_float64():
    given = tokens(np.random.default_rng(1), 9, **SMALL, dtype=np.float64)
    truth = recurrence(given, **SMALL)
    with enable_x64():
        got, _ = run(given, SMALL, 11, "xla", np.float64)
    assert off(got, truth) < 1e-6  # the cache's sums are float32


@pytest.mark.parametrize("implementation", ["xla", KERNEL])
def test_steps_in_bfloat16(implementation):
    given = tokens(np.random.default_rng(2), 18, **WIDE, dtype=jnp.bfloat16, skip="HP")
    truth = recurrence(given, **WIDE)
    got, cache = run(given, WIDE, 32, implementation, jnp.bfloat16)
    assert got.dtype == np.float32 and off(got, truth) < EXACT[implementation]
    plain, expected = run(given, WIDE, 32, "reference", jnp.bfloat16)
    assert off(plain, truth) < EXACT["reference"]
    used = (jax.tree.map(lambda v: v.astype(np.float32), resize(c, 18)) for c in (cache, expected))
    jax.tree.map(lambda mine, other: np.testing.assert_allclose(mine, other, 1e-5, 1e-5), *used)


def random_cache(rng, slots, dtype=jnp.bfloat16, **sizes):
    cache = init_cache(slots=slots, dtype=dtype, **sizes)
    draw = lambda v: rng.standard_normal(v.shape).astype(v.dtype)
    return DualCache(draw(cache.x), draw(cache.B), -abs(draw(cache.scale)), -abs(draw(cache.cs)))


def spoil(cache, index, implementation):
    """NaN after the index, in x only if the implementation takes it."""
    after = lambda v, axis: np.where(
        np.expand_dims(np.arange(v.shape[axis]) > index, tuple(range(1, v.ndim - axis))), np.nan, v
    ).astype(v.dtype)
    x = cache.x if implementation == "xla" else after(cache.x, 2)
    return cache._replace(x=x, B=after(cache.B, 1), scale=after(cache.scale, 2))


# tile, warpgroups, stages; heads, groups, width, states: blocks of 8 and of 4 heads, all widths of
# a thread's channels, several blocks and groups, several programs a row.
KINDS = [
    ((16, 3, 2), (24, 1, 64, 128)),
    ((8, 2, 3), (16, 1, 32, 64)),
    ((16, 1, 2), (8, 2, 64, 64)),
    ((8, 1, 2), (4, 1, 128, 128)),
    ((32, 2, 2), (16, 1, 128, 64)),
]


@needs_gpu_interpreter
@pytest.mark.parametrize(("kind", "sizes"), KINDS)
def test_kernel_reads_up_to_the_index(kind, sizes, monkeypatch):
    for name, value in zip(("TILE", "WARPGROUPS", "STAGES"), kind, strict=True):
        monkeypatch.setattr(pallas_gpu, name, value)
    monkeypatch.setattr(pallas_gpu, "PROGRAMS", 1)
    sizes = dict(zip(("heads", "groups", "width", "states"), sizes, strict=True))
    rng = np.random.default_rng(3)
    cache = random_cache(rng, 64, rows=1, **sizes)
    C = rng.standard_normal((1, sizes["groups"], sizes["states"])).astype(jnp.bfloat16)
    read = jax.jit(ssd_decode, static_argnames="implementation")
    for index in (0, 15, 40, 63):
        truth = np.asarray(ssd_decode(cache, C, index, implementation="reference"), np.float64)
        got = read(spoil(cache, index, "pallas_gpu"), C, index, implementation="pallas_gpu")
        assert off(got, truth) < 1e-5, index


@needs_gpu_interpreter
def test_kernel_has_no_races(monkeypatch):
    if jax.config.jax_platforms == "cpu":
        watch = plgpu.InterpretGPUParams(detect_races=True)
        monkeypatch.setattr(pallas_gpu, "interpret_mode", lambda _: watch)
    monkeypatch.setattr(pallas_gpu, "TILE", 8)
    sizes = WIDE | {"rows": 1}
    given = tokens(np.random.default_rng(4), 18, **sizes, dtype=jnp.bfloat16)
    got, _ = run(given, sizes, 24, "pallas_gpu", jnp.bfloat16)
    assert off(got, recurrence(given, **sizes)) < 1e-5


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_read_does_not_see_what_comes_after_the_index(implementation):
    rng = np.random.default_rng(5)
    cache = random_cache(rng, 12, np.float32, **SMALL)
    C = rng.standard_normal((2, 3, 5)).astype(np.float32)
    for index in (0, 7, 11):
        truth = ssd_decode(resize(cache, index + 1), C, index, implementation="reference")
        got = ssd_decode(spoil(cache, index, implementation), C, index,
                         implementation=implementation)  # fmt: skip
        assert off(got, np.asarray(truth)) < 1e-6, index


def test_growing_a_cache_changes_nothing():
    rng = np.random.default_rng(6)
    cache = random_cache(rng, 4, np.float32, **SMALL)
    C = rng.standard_normal((2, 3, 5)).astype(np.float32)
    before = ssd_decode(cache, C, 3)
    grown = resize(cache, 10)
    assert grown.x.shape[2] == grown.B.shape[1] == grown.scale.shape[2] == 10
    np.testing.assert_allclose(ssd_decode(grown, C, 3), before, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, resize(grown, 4), jax.tree.map(np.asarray, cache))


def test_a_token_with_no_step_size_changes_nothing():
    rng = np.random.default_rng(7)
    cache = random_cache(rng, 5, np.float32, **SMALL)
    C = rng.standard_normal((2, 3, 5)).astype(np.float32)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    zero = np.zeros((2, 6), np.float32)
    more = append(cache, draw(2, 6, 4), zero, zero, draw(2, 3, 5), 4)
    np.testing.assert_allclose(ssd_decode(more, C, 4), ssd_decode(cache, C, 3), 1e-5, 1e-6)


def described(sizes, slots=256, dtype=jnp.bfloat16):
    """Cache and token of a step, shapes only."""
    struct = jax.ShapeDtypeStruct
    cache = jax.eval_shape(lambda: init_cache(slots=slots, dtype=dtype, **sizes))
    rows, heads = sizes["rows"], sizes["heads"]
    lane = heads * sizes["width"] + 2 * sizes["groups"] * sizes["states"]
    f32 = lambda *shape: struct(shape, jnp.float32)
    token = struct((rows, lane), dtype), struct((rows, heads), dtype), f32(heads), f32(heads)
    return cache, token, struct((), jnp.int32)


def steps(cache, token, index, layers=1, implementation=None):
    """Layers in turn, each with a cache of its own."""
    x, dt, A, D = token
    out = []
    for _ in range(layers):
        y, new = ssd_decode_step(cache, x, dt, A, D, index=index, dt_bias=D, dt_softplus=True,
                                 implementation=implementation)  # fmt: skip
        side = y.reshape(x.shape[0], -1).astype(x.dtype)
        x = x.at[:, : side.shape[1]].set(side)
        out.append(new)
    return x, out


AIM = [dict(rows=128, heads=h, groups=1, width=64, states=128) for h in (24, 32, 48)]
MORE = [
    dict(rows=2, heads=16, groups=4, width=64, states=64),
    dict(rows=512, heads=8, groups=1, width=128, states=128),
]


@pytest.mark.parametrize(
    ("sizes", "slots", "dtype"),
    [*((sizes, 256, jnp.bfloat16) for sizes in AIM), (MORE[0], 1024, jnp.float16),
     (MORE[1], 16, jnp.bfloat16)],
)  # fmt: skip
def test_kernel_lowers_for_cuda(sizes, slots, dtype, monkeypatch):
    monkeypatch.setattr("lintime.kernels_pallas.compat.GPU_KERNELS_TRIED", True)
    cache, token, index = described(sizes, slots, dtype)
    text = lower_for_cuda(steps, cache, token, index)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert text.count("output_operand_alias<") == 4  # the cache changes in place
    C = jax.ShapeDtypeStruct(cache.B.shape[:1] + cache.B.shape[2:], dtype)
    assert "custom_call @mosaic_gpu" in lower_for_cuda(ssd_decode, cache, C, index)


def test_layers_share_one_kernel(monkeypatch):
    monkeypatch.setattr("lintime.kernels_pallas.compat.GPU_KERNELS_TRIED", True)
    text = lower_for_cuda(lambda *args: steps(*args, layers=6), *described(AIM[0]))
    assert text.count("custom_call @mosaic_gpu") <= 2  # 0.10 has another one for the first layer


@pytest.mark.parametrize(
    ("change", "slots", "dtype", "reason"),
    [
        ({}, 256, jnp.float32, "float32"),
        ({}, 250, jnp.bfloat16, "250 slots"),
        ({"heads": 2}, 256, jnp.bfloat16, "blocks of 2 heads of P=64"),
        ({"width": 16}, 256, jnp.bfloat16, "blocks of 8 heads of P=16"),
        ({"states": 16}, 256, jnp.bfloat16, "N=16 states"),
    ],
)
def test_kernel_leaves_the_rest_to_xla(change, slots, dtype, reason, monkeypatch):
    monkeypatch.setattr("lintime.kernels_pallas.compat.GPU_KERNELS_TRIED", True)
    cache = described(WIDE | change, slots, dtype)[0]
    with cuda_device():
        assert implementation_for(described(WIDE)[0]) == "pallas_gpu"
        assert implementation_for(cache) == "xla"
        with pytest.raises(ValueError, match=f"pallas_gpu does not take .*{reason}"):
            implementation_for(cache, "pallas")
    with cuda_device("NVIDIA A100-SXM4-80GB"):
        assert implementation_for(described(WIDE)[0]) == "xla"


def test_programs_fill_the_chip():
    """Several blocks of heads share the reading of B, unless too few programs were left."""
    sizes = lambda rows, heads: (
        jax.eval_shape(lambda: init_cache(rows, 256, heads, 64, 1, 128, jnp.bfloat16)).sizes
    )
    with cuda_device():
        wgs = lambda *args: pallas_gpu._plan(sizes(*args)).wgs
        assert [wgs(128, h) for h in (48, 32, 24)] == [3, 2, 3]
        assert [wgs(rows, 48) for rows in (2, 48, 64)] == [1, 2, 3]


def test_shapes_that_do_not_fit_are_refused():
    cache = init_cache(slots=4, dtype=np.float32, **SMALL)
    zeros = lambda *shape: np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"C has shape \(2, 3, 6\), expected \(2, 3, 5\)"):
        ssd_decode(cache, zeros(2, 3, 6), 0)
    with pytest.raises(ValueError, match=r"xBC has shape \(2, 50\), expected \(2, 54\)"):
        ssd_decode_step(cache, zeros(2, 50), zeros(2, 6), zeros(6), index=0)
    with pytest.raises(ValueError, match=r"D has shape \(5,\), expected \(6,\) or \(6, 4\)"):
        ssd_decode_step(cache, zeros(2, 54), zeros(2, 6), zeros(6), zeros(5), index=0)
    with pytest.raises(ValueError, match="not a cache"):
        ssd_decode(cache._replace(B=zeros(2, 4, 15)), zeros(2, 3, 5), 0)
    with pytest.raises(ValueError, match="6 heads are not a multiple of 4 groups"):
        init_cache(slots=4, dtype=np.float32, **(SMALL | {"groups": 4}))
