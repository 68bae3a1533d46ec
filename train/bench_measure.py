"""What `lintime bench` measures: errors against the reference, whole training steps, parts of the op."""

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

from ..kernels_pallas import vq_attention as vq
from ..model.mixers.attention import dense_attention, flash_attention
from ..model.nets.transformer_vq import TransformerVQConfig, head_geometry, make_mixer
from . import flops
from .mesh import check_batch, make_mesh, put_batch, state_shardings
from .metrics import forward_flops
from .schema import Run
from .step import init_state, make_train_step
from .tasks import DTYPES, make_task

CHECK_BLOCKS = 4  # blocks of the checked sequence: the last two read the compressive cache
# Largest relative L2 errors (output or loss, gradient) that a variant may show before it is timed.
OP_TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (2e-2, 4e-2)}
MODEL_TOLERANCE = (1e-4, 1e-2)  # a key near the border of two codes may fall to either


def describe_device() -> dict[str, Any]:
    """Platform, kind, number and memory (bytes, None if unknown) of JAX's devices, and versions."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    return {
        "platform": platform, "kind": device.device_kind, "count": len(jax.devices()),
        "memory": limit, "jax": jax.__version__,
    }  # fmt: skip


# ---------------------------------------------------------------- correctness


def check(run: Run) -> dict[str, Any]:
    """Relative L2 errors of a variant against the reference path.

    The attention op at the run's head sizes (CHECK_BLOCKS blocks, one row, random inputs), output and all
    gradients, in float32 and in the compute dtype, against the dense reference in float32 on the same
    inputs. Then a float32 model of two layers, loss and gradients, against another path of the same
    function: another reduction for "vq", dense attention without position bias for "flash".

    Returns:
        {"ok", "errors": {name: [error of the value, worst error of a gradient, where]}}.
    """
    length = CHECK_BLOCKS * max(run.net.block_len, run.net.mem_len)
    errors, ok = {}, True
    for name in dict.fromkeys(("float32", run.precision.compute)):
        with jax.default_matmul_precision("highest" if name == "float32" else "default"):
            value, gradient, where = _op_error(run.net, length, DTYPES[name])
        errors[f"op {name}"] = [value, gradient, where]
        ok &= value <= OP_TOLERANCE[name][0] and gradient <= OP_TOLERANCE[name][1]
    if run.net.attention != "dense":
        value, gradient, where = _model_error(run, length)
        errors["model float32"] = [value, gradient, where]
        ok &= value <= MODEL_TOLERANCE[0] and gradient <= MODEL_TOLERANCE[1]
    return {"ok": bool(ok), "errors": errors}


def attention_inputs(config: TransformerVQConfig, rows: int, length: int, dtype) -> tuple[dict, dict]:
    """Random inputs of the attention op as the model would make them, never zeros.

    Returns:
        the arrays that get gradients (q, k, v, content_bias, position_bias, rel), and the others
        (codes, codebook). k is quantised for attention="vq".
    """
    sizes = head_geometry(config)
    heads, kv_heads, d_k = sizes["num_heads"], sizes["num_kv_heads"], config.d_k
    names = ("q", "k", "v", "codebook", "content_bias", "position_bias", "rel")
    keys = dict(zip(names, jax.random.split(jax.random.key(17), len(names))))
    scale = d_k**-0.25

    def unit(name, *shape):
        x = jax.random.normal(keys[name], (*shape, d_k))
        return x * scale / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))

    q, k = unit("q", rows, heads, length), unit("k", rows, kv_heads, length)
    codebook = unit("codebook", kv_heads, config.n_code)
    v = jax.nn.silu(jax.random.normal(keys["v"], (rows, kv_heads, length, sizes["value_dim"])))
    codes = jnp.zeros((rows, kv_heads, length), jnp.int32)
    if config.attention == "vq":
        codes, k, _ = vq.quantize(k, codebook)
    else:
        k = k.astype(dtype)
    span = config.mem_len + 1 if config.attention == "vq" else length
    learned = {
        "q": q.astype(dtype), "k": k, "v": v.astype(dtype),
        "content_bias": unit("content_bias", heads), "position_bias": unit("position_bias", heads),
        "rel": unit("rel", kv_heads, span),
    }  # fmt: skip
    return learned, {"codes": codes, "codebook": codebook}


def attend(config: TransformerVQConfig) -> Callable:
    """The attention op of a config as f(learned, fixed) -> [B, H, T, V] over `attention_inputs`."""

    def run_vq(a, fixed):
        return _vq(config, a, fixed, None)

    def run_dense(a, fixed):
        biases = {name: a[name] for name in ("content_bias", "position_bias", "rel")}
        return dense_attention(a["q"], a["k"], a["v"], **biases)[0]

    def run_flash(a, fixed):
        q = a["q"] + a["content_bias"][None, :, None].astype(a["q"].dtype)
        return flash_attention(q, a["k"], a["v"])

    return {"vq": run_vq, "dense": run_dense, "flash": run_flash}[config.attention]


def _vq(config, a, fixed, implementation, **changes):
    biases = {name: a[name] for name in ("content_bias", "position_bias", "rel")}
    settings = dict(
        block_len=config.block_len, use_cache=config.cache, reduction=config.reduction,
        grad_through_cache=config.grad_through_cache,
    )  # fmt: skip
    return vq.vq_attention(
        a["q"], a["k"], fixed["codes"], a["v"], fixed["codebook"], **biases,
        implementation=implementation, **settings | changes,
    )[0]  # fmt: skip


def _reference(config: TransformerVQConfig) -> Callable:
    """The definition, in full: for dense attention the window spans the sequence and nothing is cached."""

    def run(a, fixed):
        if config.attention == "vq":
            return _vq(config, a, fixed, "reference")
        a = dict(a)
        if config.attention == "flash":
            a["rel"] = jnp.zeros_like(a["rel"])
        length = a["q"].shape[2]
        return _vq(config, a, fixed, "reference", block_len=length, use_cache=False)

    return run


def _op_error(config, length, dtype) -> tuple[float, float, str]:
    precision = jax.config.jax_default_matmul_precision or "default"
    out, gradients = _op_value(config, length, dtype, False, precision)
    # The order of the recurrence is nothing to the reference: one run serves all reductions.
    same = dataclasses.replace(config, reduction="serial")
    exact, exact_gradients = _op_value(same, length, dtype, True, "highest")
    return relative_error(out, exact), *_worst(gradients, exact_gradients)


@functools.lru_cache(maxsize=8)
def _op_value(config, length, dtype, reference, precision):
    """Output and gradients of the op, or of its reference, on the same inputs."""
    learned, fixed = attention_inputs(config, 1, length, dtype)
    fn = _reference(config) if reference else attend(config)

    def run(learned, fixed, cotangent):
        out, pull = jax.vjp(lambda a: fn(a, fixed), learned)
        return out, pull(cotangent.astype(out.dtype))[0]

    shape = (*learned["q"].shape[:3], learned["v"].shape[-1])
    cotangent = jax.random.normal(jax.random.key(23), shape)
    with jax.default_matmul_precision(precision):
        return jax.jit(run)(learned, fixed, cotangent)


def _model_error(run: Run, length: int) -> tuple[float, float, str]:
    net = dataclasses.replace(
        run.net, n_layer=2, dropout_emb=0.0, dropout_sin=0.0, dropout_res=0.0, dropout_layer=0.0
    )
    small = dataclasses.replace(
        run, net=net, batch_size=1, precision=dataclasses.replace(run.precision, compute="float32"),
        data=dataclasses.replace(run.data, sequence_len=length, update_len=0),
        optim=dataclasses.replace(run.optim, accumulate=1),
    )  # fmt: skip
    other = dict(reduction="serial" if net.reduction != "serial" else "matmul")
    if net.attention == "flash":
        other = dict(attention="dense")
    loss, gradients = _model_value(small)
    exact, exact_gradients = _model_value(
        dataclasses.replace(small, net=dataclasses.replace(net, **other))
    )
    if net.attention == "flash":  # its position table is not used, so its projection learns nothing
        gradients, exact_gradients = (_drop(g, "r_proj") for g in (gradients, exact_gradients))
    return relative_error(loss, exact), *_worst(gradients, exact_gradients)


@functools.lru_cache(maxsize=4)
def _model_value(run: Run):
    """Loss and gradients of a model at parameters stirred so that no bias is zero."""
    task = make_task(run)
    variables = jax.jit(task.init)(jax.random.key(5))
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables["params"])
    noise = jax.random.split(jax.random.key(6), len(leaves))

    def stir(path, leaf, key):
        if run.net.attention != "vq" and "r_proj" in jax.tree_util.keystr(path):
            return jnp.zeros_like(leaf)  # dense attention without position bias: what "flash" computes
        return leaf + 0.02 * jax.random.normal(key, leaf.shape)

    params = jax.tree.unflatten(tree, [stir(p, a, k) for (p, a), k in zip(leaves, noise)])
    batch = make_batch(run, 0) | {"step": np.int32(0)}

    def objective(params, stats, batch):
        loss, weight, *_ = task.loss(params, stats, {}, batch, jax.random.key(0))
        return loss / weight

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(objective))(params, variables["stats"], batch)


def relative_error(a, b) -> float:
    """|a - b| / |b| in the L2 norm (float64 on the host); inf where anything is not finite."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)
    return float(error) if np.isfinite(error) else float("inf")


def _worst(gradients, exact) -> tuple[float, str]:
    """Largest relative error of a leaf; where the exact gradient vanishes, the other must be tiny too."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda a, b: (a, b), gradients, exact),
                                                    is_leaf=lambda x: isinstance(x, tuple))  # fmt: skip
    size = max(float(np.linalg.norm(np.asarray(b, np.float64))) for _, (_, b) in pairs)
    worst, where = 0.0, ""
    for path, (a, b) in pairs:
        tiny = float(np.linalg.norm(np.asarray(b, np.float64))) < 1e-9 * size
        error = relative_error(a, b)
        if tiny:
            error = float(np.linalg.norm(np.asarray(a, np.float64)) / size)
        if error > worst:
            worst, where = error, jax.tree_util.keystr(path)
    return worst, where


def _drop(tree, name):
    return {
        k: _drop(v, name) if isinstance(v, dict) else v for k, v in tree.items() if k != name
    }


# ---------------------------------------------------------------- the training step


def make_batch(run: Run, step: int) -> dict[str, np.ndarray]:
    """Random tokens 3..vocab-1 in whole documents, another draw for every step."""
    shape = (run.batch_size, run.data.sequence_len + 1)
    tokens = np.random.default_rng((run.seed, step)).integers(3, run.net.vocab_size, shape, np.int32)
    ones = np.ones((run.batch_size, run.data.sequence_len), np.int32)
    return {
        "inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": ones, "segment_ids": ones,
        "start": np.ones((run.batch_size,), bool),
    }  # fmt: skip


def time_steps(run: Run, steps: int, warmup: int, devices: int, alone: bool) -> dict[str, Any]:
    """Compile the whole training step (jitted, state donated), then time `steps` updates one by one.

    Every update gets a fresh batch, which is on the device before its clock starts; the clock stops when
    the new state and the metrics are there.

    Args:
        alone: this process measures nothing else, so that the device's peak memory belongs to this run.

    Returns:
        {"status": "ok", "tokens", "seconds": [per update], "median_ms", "tokens_per_s", "mfu",
        "compile_s", "peak_bytes" (measured; None if not `alone` or unknown), "compiled_bytes" (arguments,
        outputs and temporaries of the compiled step), "temp_bytes", "loss"}, or {"status": "oom" or
        "error", "message"}.
    """
    try:
        return _time_steps(run, steps, warmup, devices, alone)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = str(error)
        status = "oom" if is_out_of_memory(text) else "error"
        return {"status": status, "message": " ".join(text.split())[:300]}


def is_out_of_memory(text: str) -> bool:
    """Whether an error message of XLA says that the device's memory did not suffice."""
    return any(t in text for t in ("RESOURCE_EXHAUSTED", "ut of memory", "CUDA_ERROR_OUT_OF_MEMORY"))


def _time_steps(run, steps, warmup, devices, alone):
    chosen = jax.devices()[:devices]
    mesh = make_mesh(run.mesh, chosen)
    check_batch(run, mesh)
    task = make_task(run)
    with jax.set_mesh(mesh):
        make = lambda key: init_state(task, run, key)
        shardings = state_shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
        state = jax.jit(make, out_shardings=shardings)(jax.random.key(run.seed))
        update = jax.jit(
            make_train_step(task, run), donate_argnums=0, out_shardings=(shardings, None)
        )
        batch = put_batch(make_batch(run, 0), 0, mesh, run.batch_size)
        began = time.perf_counter()
        compiled = update.lower(state, batch).compile()
        compile_s = time.perf_counter() - began
        seconds = []
        for number in range(warmup + steps):
            batch = jax.block_until_ready(
                put_batch(make_batch(run, number), number, mesh, run.batch_size)
            )
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, batch))
            seconds.append(time.perf_counter() - began)
            if not bool(metrics["ok"]):
                raise ValueError(f"the loss or a gradient of update {number} is not finite")
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
        "mfu": flops.mfu(model_flops, median, chosen),
        "compile_s": compile_s,
        "peak_bytes": max(peaks) if alone and None not in peaks else None,
        "compiled_bytes": whole,
        "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
        "loss": float(metrics["loss"]),
    }


# ---------------------------------------------------------------- parts of the op


def time_parts(run: Run, steps: int, warmup: int) -> dict[str, Any]:
    """Milliseconds of one attention sublayer's parts on one device, forward and forward+backward.

    Parts of "vq": `quantize`, `codebook_statistics`, `block_summaries` (counts and sums per block),
    `cache_prefix` (the recurrence), `attention` (the whole op, cache included), `sublayer` (projections
    and gate included). Others: `attention` and `sublayer`.

    Returns:
        {"status": "ok", "parts": {name: {"forward": ms, "both": ms}}}, or as `time_steps` on failure.
    """
    config, dtype = run.net, DTYPES[run.precision.compute]
    rows, length = run.batch_size, run.data.sequence_len
    parts: dict[str, dict] = {}
    for name, make in _parts(config, rows, length, dtype).items():
        try:
            fn, learned, fixed = make()
            parts[name] = _time_function(fn, learned, fixed, steps, warmup)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(str(error)):
                raise
            parts[name] = {"forward": None, "both": None}
    return {"status": "ok", "tokens": rows * length, "parts": parts}


def _parts(config, rows, length, dtype) -> dict[str, Callable]:
    """name -> maker of (function of (learned, fixed), learned, fixed)."""
    inputs = lambda: attention_inputs(config, rows, length, dtype)

    def quantize():
        a, fixed = inputs()
        return lambda a, f: vq.quantize(a["k"], f["codebook"])[1:], {"k": a["k"]}, fixed

    def codebook_statistics():
        a, fixed = inputs()
        statistic = lambda a, f: vq.codebook_statistics(f["k"], f["codes"], None, config.n_code)
        return statistic, {}, {"k": a["k"], "codes": fixed["codes"]}

    block = min(config.block_len, length)
    whole = length // block * block

    def by_block(a):
        a = a[:, :, :whole]
        return a.reshape(*a.shape[:2], whole // block, block, *a.shape[3:])

    def block_summaries():
        a, fixed = inputs()
        summaries = lambda a, f: vq.block_summaries(by_block(f["codes"]), by_block(a["v"]), config.n_code)
        return summaries, {"v": a["v"]}, {"codes": fixed["codes"]}

    def cache_prefix():
        a, fixed = inputs()
        summarise = jax.jit(lambda z, v: vq.block_summaries(by_block(z), by_block(v), config.n_code))
        counts, sums = summarise(fixed["codes"], a["v"])
        empty = dict(count=jnp.zeros_like(counts[:, :, 0]), segment=jnp.zeros((rows,), jnp.int32))

        def prefix(a, f):
            segments = jnp.zeros((rows, whole // block), jnp.int32)
            return vq.cache_prefix(
                f["count"], jnp.zeros_like(a["sums"][:, :, 0]), f["segment"], f["counts"], a["sums"],
                segments, reduction=config.reduction, mask_segments=False,
            )[1]  # fmt: skip

        return prefix, {"sums": sums}, {"counts": counts, **empty}

    def attention():
        return attend(config), *inputs()

    def sublayer():
        net = dataclasses.replace(config, dropout_sin=0.0, dropout_res=0.0)
        mixer = make_mixer(net, dtype)
        x = jax.random.normal(jax.random.key(3), (rows, length, config.d_model)).astype(dtype)
        variables = dict(jax.jit(mixer.init)({"params": jax.random.key(4)}, x[:1, :8]))
        learned = {"x": x, "params": variables["params"]}
        stats = {"stats": variables.get("stats", {})}
        return lambda a, f: mixer.apply({"params": a["params"], **f}, a["x"])[0], learned, stats

    last = {"attention": attention, "sublayer": sublayer}
    if config.attention != "vq":
        return last
    return {
        "quantize": quantize, "codebook_statistics": codebook_statistics,
        "block_summaries": block_summaries, "cache_prefix": cache_prefix, **last,
    }  # fmt: skip


def _time_function(fn, learned, fixed, steps, warmup) -> dict[str, float | None]:
    out = jax.eval_shape(fn, learned, fixed)
    keys = jax.random.key(31)
    cotangent = jax.tree.map(lambda s: jax.random.normal(keys, s.shape).astype(s.dtype), out)

    def both(learned, fixed, cotangent):
        out, pull = jax.vjp(lambda a: fn(a, fixed), learned)
        return out, pull(cotangent)

    def clock(call):
        for _ in range(warmup):
            jax.block_until_ready(call())
        samples = []
        for _ in range(steps):  # calls in bursts, so that the host's time to launch them is hidden
            began = time.perf_counter()
            jax.block_until_ready([call() for _ in range(3)])
            samples.append((time.perf_counter() - began) / 3)
        return 1e3 * statistics.median(samples)

    forward, gradient = jax.jit(fn), jax.jit(both)
    return {
        "forward": clock(lambda: forward(learned, fixed)),
        "both": clock(lambda: gradient(learned, fixed, cotangent)) if learned else None,
    }
