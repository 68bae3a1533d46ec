"""What `lintime bench` measures: errors against the reference, training steps, parts of the op."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...kernels_pallas import vq_attention as vq
from ...model.mixers.attention import dense_attention, flash_attention
from ...model.nets.transformer_vq import TransformerVQConfig, head_geometry, make_mixer
from .. import flops
from ..mesh import check_batch, make_mesh, put_batch, state_shardings
from ..metrics import forward_flops
from ..schema import Run
from ..step import init_state, jit_step, make_train_step
from ..tasks.base import DTYPES
from ..tasks.table import make_task
from .timing import is_out_of_memory, relative_error

CHECK_BLOCKS = 4  # enough for the reductions to differ in their order of merging
# Largest relative L2 errors (value, gradient) a variant may show before it is timed.
OP_TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (2e-2, 4e-2)}
MODEL_TOLERANCE = (1e-4, 1e-3)
MODEL_SEEDS = (5, 6, 7)


# ---------------------------------------------------------------- correctness


def check(run: Run) -> dict[str, Any]:
    """Relative L2 errors of a variant against the reference path.

    The attention op at the run's head sizes (CHECK_BLOCKS blocks, one row, random inputs), output
    and all gradients, in float32 and in the compute dtype, against the definition in float32 on
    the same inputs. Then a float32 model of two layers, loss and gradients, against another path
    of the same function: another reduction for "vq", dense attention without position bias for
    "flash". A key at the border of two codes may fall to either for rounding alone, so a model
    that differs is tried with other parameters: a real fault shows with all of them.

    Returns:
        {"ok", "errors": {name: [error of the value, worst error of a gradient, where]}}.
    """
    length = CHECK_BLOCKS * max(run.net.block_len, run.net.mem_len)
    within = lambda error, limits: error[0] <= limits[0] and error[1] <= limits[1]
    errors, ok = {}, True
    for name in dict.fromkeys(("float32", run.precision.compute)):
        error = errors[f"op {name}"] = _op_error(run.net, length, name)
        ok &= within(error, OP_TOLERANCE[name])
    if ok and run.net.attention != "dense":  # an op that is wrong needs no further proof
        for seed in MODEL_SEEDS:
            error = errors["model float32"] = _model_error(run, length, seed)
            if within(error, MODEL_TOLERANCE):
                break
        ok &= within(error, MODEL_TOLERANCE)
    return {"ok": bool(ok), "errors": errors}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def attention_inputs(config: TransformerVQConfig, rows: int, length: int, dtype: str):
    """Random inputs of the attention op as the model would make them, never zeros.

    Returns:
        the arrays that get gradients (q, k, v, content_bias, position_bias, rel), and the others
        (codes, codebook). k is quantised for attention="vq"; "flash" knows no position bias, so
        position_bias and rel are zeros among the others.
    """
    sizes = head_geometry(config)
    heads, kv_heads, d_k = sizes["num_heads"], sizes["num_kv_heads"], config.d_k
    names = ("q", "k", "v", "codebook", "content_bias", "position_bias", "rel")
    keys = dict(zip(names, jax.random.split(jax.random.key(17), len(names))))
    dtype = DTYPES[dtype]

    def unit(name, *shape):
        x = jax.random.normal(keys[name], (*shape, d_k))
        return x * d_k**-0.25 / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))

    q, k = unit("q", rows, heads, length), unit("k", rows, kv_heads, length)
    codebook = unit("codebook", kv_heads, config.n_code)
    v = jax.nn.silu(jax.random.normal(keys["v"], (rows, kv_heads, length, sizes["value_dim"])))
    codes = jnp.zeros((rows, kv_heads, length), jnp.int32)
    if config.attention == "vq":
        codes, k, _ = vq.quantize(k, codebook)
    else:
        k = k.astype(dtype)
    learned = {
        "q": q.astype(dtype), "k": k, "v": v.astype(dtype),
        "content_bias": unit("content_bias", heads), "position_bias": unit("position_bias", heads),
        "rel": unit("rel", kv_heads, config.mem_len + 1 if config.attention == "vq" else length),
    }  # fmt: skip
    fixed = {"codes": codes, "codebook": codebook}
    if config.attention == "flash":
        fixed |= {n: jnp.zeros_like(learned.pop(n)) for n in ("position_bias", "rel")}
    return learned, fixed


def attend(config: TransformerVQConfig, reference: bool = False) -> Callable:
    """The attention op of a config as f(learned, fixed) -> [B, H, T, V] over `attention_inputs`.

    Args:
        reference: the definition instead, in float32; for the dense kinds the uncompressed window
            then spans the whole sequence, so nothing is ever compressed.
    """
    names = ("content_bias", "position_bias", "rel")
    biases = lambda a, fixed: {name: (a | fixed)[name] for name in names}

    def by_vq(a, fixed):
        settings = {"block_len": a["q"].shape[2]}
        if config.attention == "vq":
            settings = dict(
                block_len=config.block_len, use_cache=config.cache, reduction=config.reduction,
                grad_through_cache=config.grad_through_cache,
            )  # fmt: skip
        return vq.vq_attention(
            a["q"], a["k"], fixed["codes"], a["v"], fixed["codebook"], **biases(a, fixed),
            state=fixed.get("state"), implementation="reference" if reference else None, **settings,
        )[0]  # fmt: skip

    def by_dense(a, fixed):
        return dense_attention(a["q"], a["k"], a["v"], **biases(a, fixed))[0]

    def by_flash(a, fixed):
        q = a["q"] + a["content_bias"][None, :, None].astype(a["q"].dtype)
        return flash_attention(q, a["k"], a["v"])

    if reference:
        return by_vq
    return {"vq": by_vq, "dense": by_dense, "flash": by_flash}[config.attention]


def _op_error(config, length, dtype) -> tuple[float, float, str]:
    precision = "highest" if dtype == "float32" else "default"
    out, gradients = _op_value(config, length, dtype, False, precision)
    # The order of the recurrence is nothing to the reference: one run serves all reductions.
    same = dataclasses.replace(config, reduction="serial")
    exact, exact_gradients = _op_value(same, length, dtype, True, "highest")
    return relative_error(out, exact), *_worst(gradients, exact_gradients)


@functools.lru_cache(maxsize=8)
def _op_value(config, length, dtype, reference, precision):
    """Output and gradients of the op, or of its reference, on the same inputs."""
    learned, fixed = attention_inputs(config, 1, length, dtype)
    fn = attend(config, reference)
    if reference:  # as an argument, or XLA spends seconds on evaluating what follows from zeros
        kv_heads, n_code, d_k = fixed["codebook"].shape
        mem = learned.get("rel", fixed.get("rel")).shape[1] - 1
        v = learned["v"]
        fixed["state"] = vq.init_state(1, kv_heads, mem, n_code, d_k, v.shape[-1], v.dtype)

    def run(learned, fixed):
        out, pull = jax.vjp(lambda a: fn(a, fixed), learned)
        return out, pull(jax.random.normal(jax.random.key(23), out.shape).astype(out.dtype))[0]

    with jax.default_matmul_precision(precision):
        return _untuned(run)(learned, fixed)


def _model_error(run: Run, length: int, seed: int) -> tuple[float, float, str]:
    net = dataclasses.replace(
        run.net, n_layer=2, dropout_emb=0.0, dropout_sin=0.0, dropout_res=0.0, dropout_layer=0.0
    )
    small = dataclasses.replace(
        run, net=net, batch_size=1, precision=dataclasses.replace(run.precision, compute="float32"),
        data=dataclasses.replace(run.data, sequence_len=length, update_len=0),
        optim=dataclasses.replace(run.optim, accumulate=1),
    )  # fmt: skip
    other = {"reduction": "serial" if net.reduction != "serial" else "matmul"}
    if net.attention == "flash":
        other = {"attention": "dense"}
    loss, gradients = _model_value(small, seed)
    other_run = dataclasses.replace(small, net=dataclasses.replace(net, **other))
    exact, exact_gradients = _model_value(other_run, seed)
    if net.attention == "flash":  # its position table is not used, so its projection learns nothing
        gradients, exact_gradients = (_drop(g, "r_proj") for g in (gradients, exact_gradients))
    return relative_error(loss, exact), *_worst(gradients, exact_gradients)


@functools.lru_cache(maxsize=4)
def _model_value(run: Run, seed: int):
    """Loss and gradients of a model at parameters stirred so that no bias is zero."""
    params, stats, batch = _model_inputs(
        dataclasses.replace(run, net=dataclasses.replace(run.net, reduction="serial")), seed
    )
    task = make_task(run)

    def objective(params, stats, batch):
        loss, weight, *_ = task.loss(params, stats, {}, batch, jax.random.key(0))
        return loss / weight

    with jax.default_matmul_precision("highest"):
        return _untuned(jax.value_and_grad(objective))(params, stats, batch)


@functools.lru_cache(maxsize=2)
def _model_inputs(run: Run, seed: int):
    def make():
        variables = make_task(run).init(jax.random.key(seed))
        leaves, tree = jax.tree_util.tree_flatten_with_path(variables["params"])
        noise = jax.random.split(jax.random.key(seed + 100), len(leaves))

        def stir(path, leaf, key):
            if run.net.attention != "vq" and "r_proj" in jax.tree_util.keystr(path):
                return jnp.zeros_like(leaf)  # no position bias, which "flash" has not
            return leaf + 0.02 * jax.random.normal(key, leaf.shape)

        params = [stir(path, leaf, key) for (path, leaf), key in zip(leaves, noise)]
        return jax.tree.unflatten(tree, params), variables["stats"]

    return *_untuned(make)(), make_batch(run, seed) | {"step": np.int32(0)}


def _untuned(fn: Callable, **options) -> Callable:
    """Jitted for a single call: without optimisation or tuning that takes longer than it saves."""
    settings = {"cpu": {"xla_backend_optimization_level": 0}, "gpu": {"xla_gpu_autotune_level": 0}}
    return jax.jit(fn, compiler_options=settings.get(jax.default_backend()), **options)


def _worst(gradients, exact) -> tuple[float, str]:
    """Largest relative error of a leaf; one that should vanish is measured by the largest leaf."""
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
    largest = max(norm(b) for b in jax.tree.leaves(exact))
    worst, where = 0.0, ""
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(exact)
    ):
        vanishes = norm(b) < 1e-9 * largest
        error = norm(a) / largest if vanishes else relative_error(a, b)
        if not error <= worst:
            worst, where = error, jax.tree_util.keystr(path, simple=True, separator="/")
    return worst, where


def _drop(tree, name):
    return {k: _drop(v, name) if isinstance(v, dict) else v for k, v in tree.items() if k != name}


# ---------------------------------------------------------------- the training step


def make_batch(run: Run, step: int) -> dict[str, np.ndarray]:
    """Random tokens 3..vocab-1 in whole documents, another draw for every step."""
    shape = (run.batch_size, run.data.sequence_len)
    draw = np.random.default_rng((run.seed, step))
    tokens = draw.integers(3, run.net.vocab_size, (shape[0], shape[1] + 1), np.int32)
    ones = np.ones(shape, np.int32)
    return {
        "inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": ones, "segment_ids": ones,
        "start": np.ones((run.batch_size,), bool),
    }  # fmt: skip


def time_steps(run: Run, steps: int, warmup: int, devices: int, alone: bool) -> dict[str, Any]:
    """Compile the whole training step (jitted, state donated), then time `steps` updates singly.

    Every update gets a fresh batch, which is on the device before its clock starts; the clock
    stops when the new state and the metrics are there.

    Args:
        alone: this process measures nothing else, so the device's peak memory is this run's.

    Returns:
        {"status": "ok", "tokens", "seconds": [per update], "median_ms", "tokens_per_s",
        "model_flops" (3 x forward) and "mfu" (None if the device's peak is unknown), "compile_s",
        "peak_bytes" (measured; None if not `alone` or unknown), "compiled_bytes" (arguments,
        outputs and temporaries of the compiled step), "temp_bytes", "loss"},
        or {"status": "oom" or "error", "message"}.
    """
    try:
        return _time_steps(run, steps, warmup, devices, alone)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = str(error)
        status = "oom" if is_out_of_memory(text) else "error"
        return {"status": status, "message": " ".join(text.split())[:300]}


@functools.lru_cache(maxsize=4)
def _initialiser(run: Run, mesh: jax.sharding.Mesh):
    """Jitted key -> TrainState, and its shardings; runs that differ in length only share it."""
    make = lambda key: init_state(make_task(run), run, key)
    shardings = state_shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
    return _untuned(make, out_shardings=shardings), shardings


def _time_steps(run, steps, warmup, devices, alone):
    chosen = jax.devices()[:devices]
    mesh = make_mesh(run.mesh, chosen)
    check_batch(run, mesh)
    any_length = dataclasses.replace(
        run, batch_size=1, data=dataclasses.replace(run.data, sequence_len=run.net.block_len),
        net=dataclasses.replace(run.net, reduction="serial"),
    )  # fmt: skip
    task = make_task(run)
    put = lambda n: put_batch(make_batch(run, n), n, mesh, run.batch_size)
    seconds = []
    with jax.set_mesh(mesh):
        init, shardings = _initialiser(any_length, mesh)
        state = init(jax.random.key(run.seed))
        update = jit_step(make_train_step(task, run), shardings, run.precision.unroll)
        began = time.perf_counter()
        compiled = update.lower(state, put(0)).compile()
        compile_s = time.perf_counter() - began
        for number in range(warmup + steps):
            batch = jax.block_until_ready(put(number))
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, batch))
            seconds.append(time.perf_counter() - began)
            if not bool(metrics["ok"]):
                raise ValueError(f"the loss or a gradient of update {number} is not finite")
        model_flops = None
        if flops.peak_flops(chosen[0]) is not None:
            model_flops = 3 * forward_flops(task, run)
    memory = compiled.memory_analysis()
    whole = None
    if memory is not None:
        whole = memory.argument_size_in_bytes + memory.output_size_in_bytes
        whole += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in chosen]
    median = statistics.median(seconds[warmup:])
    tokens = run.batch_size * run.data.sequence_len
    return {
        "status": "ok",
        "tokens": tokens,
        "seconds": seconds[warmup:],
        "median_ms": 1e3 * median,
        "tokens_per_s": tokens / median,
        "model_flops": model_flops,
        "mfu": flops.mfu(model_flops, median, chosen) if model_flops else None,
        "compile_s": compile_s,
        "peak_bytes": max(peaks) if alone and None not in peaks else None,
        "compiled_bytes": whole,
        "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
        "loss": float(metrics["loss"]),
    }


# ---------------------------------------------------------------- parts of the op


def time_parts(run: Run, steps: int, warmup: int) -> dict[str, Any]:
    """Milliseconds of one attention sublayer's parts on one device, forward and with gradients.

    Parts of "vq": `quantize`, `codebook_statistics`, `block_summaries` (counts and sums per
    block), `cache_prefix` (the recurrence), `attention` (the op, summaries and prefix included),
    `sublayer` (projections, gate, quantiser and statistics included). Others: the last two.

    Returns:
        {"status": "ok", "tokens", "parts": {name: {"forward": ms, "both": ms}}}; ms is None
        where memory did not suffice, "both" is absent where there is no gradient.
    """
    parts: dict[str, dict] = {}
    for name, make in _parts(run).items():
        try:
            parts[name] = _time_function(*make(), steps, warmup)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(str(error)):
                raise
            parts[name] = {"forward": None, "both": None}
    return {"status": "ok", "tokens": run.batch_size * run.data.sequence_len, "parts": parts}


def _parts(run: Run) -> dict[str, Callable]:
    """name -> maker of (function of (learned, fixed), learned, fixed)."""
    config, rows, length = run.net, run.batch_size, run.data.sequence_len
    n_code, block = config.n_code, min(config.block_len, length)
    inputs = lambda: attention_inputs(config, rows, length, run.precision.compute)
    n_block = length // block

    def by_block(a):  # [B, h, T, *] -> [B, h, R, L, *]
        a = a[:, :, : n_block * block]
        return a.reshape(*a.shape[:2], n_block, block, *a.shape[3:])

    def quantize():
        a, fixed = inputs()
        return lambda a, f: vq.quantize(a["k"], f["codebook"])[1:], {"k": a["k"]}, fixed

    def codebook_statistics():
        a, fixed = inputs()
        fn = lambda a, f: vq.codebook_statistics(f["k"], f["codes"], None, n_code)
        return fn, {}, {"k": a["k"], "codes": fixed["codes"]}

    summarise = lambda v, codes: vq.block_summaries(by_block(codes), by_block(v), n_code)

    def block_summaries():
        a, fixed = inputs()
        return lambda a, f: summarise(a["v"], f["codes"]), {"v": a["v"]}, fixed

    def cache_prefix():
        a, fixed = inputs()
        counts, sums = jax.jit(summarise)(a["v"], fixed["codes"])

        def fn(a, f):
            empty = jnp.zeros_like(f["counts"][:, :, 0]), jnp.zeros_like(a["sums"][:, :, 0])
            segments = jnp.zeros((rows, n_block), jnp.int32)
            return vq.cache_prefix(
                *empty, segments[:, 0], f["counts"], a["sums"], segments,
                reduction=config.reduction, mask_segments=False,
            )[1]  # fmt: skip

        return fn, {"sums": sums}, {"counts": counts}

    def attention():
        return attend(config), *inputs()

    def sublayer():
        mixer = make_mixer(config, DTYPES[run.precision.compute])

        def make():
            x = jax.random.normal(jax.random.key(3), (rows, length, config.d_model), mixer.dtype)
            return x, mixer.init({"params": jax.random.key(4)}, x[:1, :8])

        x, variables = jax.jit(make)()
        learned = {"x": x, "params": variables["params"]}

        def fn(a, f):
            y, aux = mixer.apply({"params": a["params"], "stats": f}, a["x"])
            return y, {k: aux[k] for k in ("commit", "stats_delta") if k in aux}

        return fn, learned, variables.get("stats", {})

    every = {"attention": attention, "sublayer": sublayer}
    if config.attention != "vq":
        return every
    return {
        "quantize": quantize, "codebook_statistics": codebook_statistics,
        "block_summaries": block_summaries, "cache_prefix": cache_prefix, **every,
    }  # fmt: skip


def _time_function(fn, learned, fixed, steps, warmup) -> dict[str, float]:
    """Medians over `steps` bursts of calls; a burst hides the host's time to launch a call."""
    burst = 3

    def clock(call, *arguments):
        call = jax.jit(call)
        seconds = []
        for _ in range(warmup + steps):
            began = time.perf_counter()
            jax.block_until_ready([call(*arguments) for _ in range(burst)])
            seconds.append((time.perf_counter() - began) / burst)
        return 1e3 * statistics.median(seconds[warmup:])

    def both(learned, fixed, cotangent):
        out, pull = jax.vjp(lambda a: fn(a, fixed), learned)
        return out, pull(cotangent)

    times = {"forward": clock(fn, learned, fixed)}
    if not learned:
        return times
    shapes = jax.eval_shape(fn, learned, fixed)

    draw = lambda s: jax.random.normal(jax.random.key(31), s.shape, s.dtype)
    cotangents = jax.jit(lambda: jax.tree.map(draw, shapes))
    return times | {"both": clock(both, learned, fixed, cotangents())}
