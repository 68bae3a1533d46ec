"""One update and many: accumulation, carried state, dropout streams, guards, what a run writes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lintime.train import flops, loop, metrics
from lintime.train.checkpoint import Checkpoints
from lintime.train.data import open_data
from lintime.train.errors import UserError
from lintime.train.mesh import make_mesh
from lintime.train.schema import Mesh
from lintime.train.step import init_state, make_train_step
from lintime.train.tasks.table import make_task
from lintime.train.track import plot_curves
from tests.tiny import (
    abstract_state,
    assert_close,
    assert_same,
    quick,
    read_lines,
    saved_state,
    tiny_run,
    train_lines,
    values,
    write_text,
)

ONE = {"devices": jax.devices()[:1]}


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@functools.cache
def stepper(run):
    """The jitted update, the first state, and batch(n) of a run."""
    task = make_task(run)
    data = open_data(run.data, split="train", seed=run.seed, batch_size=run.batch_size)
    batch = lambda n: data.batch(n, np.arange(run.batch_size)) | {"step": np.int32(n)}
    step = jax.jit(make_train_step(task, run))
    return step, init_state(task, run, jax.random.key(run.seed)), batch


def updates(run, count, state=None):
    step, first, batch = stepper(run)
    state, reports = first if state is None else state, []
    for n in range(count):
        state, report = step(state, batch(n))
        reports.append(jax.device_get(report))
    return state, reports


# ---------------------------------------------------------------- accumulation


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_add_up_to_the_whole_batch(parts, text):
    state, reports = updates(tiny_run(text), 3)
    other, other_reports = updates(tiny_run(text, f"optim.accumulate={parts}"), 3)
    assert_close(other.params, state.params, rtol=1e-3, atol=1e-4)
    assert_close(other.carry, state.carry, rtol=1e-3, atol=1e-4)
    assert_close(other_reports, reports, rtol=1e-3, atol=1e-3)
    # Codes are discrete, so equal counts are equal up to the rounding of one multiplication.
    count = lambda s: s.stats["layers"]["attn1"]["c_count"]
    np.testing.assert_allclose(count(other), count(state), rtol=1e-6)
    assert_close(other.stats, state.stats, rtol=1e-4, atol=1e-4)


def test_codebooks_are_the_moving_average_of_sums_over_the_update(text):
    run = tiny_run(text, "optim.accumulate=2")
    before = stepper(run)[1]
    state, _ = updates(run, 1)
    old, new = (s.stats["layers"]["attn1"]["c_count"] for s in (before, state))
    seen = (new - 0.99 * old) / 0.01  # tokens of each code
    assert_close(jnp.sum(seen, axis=-1), np.full((1, 1), 8 * 16.0), rtol=1e-3)
    assert_close(seen, np.round(seen), rtol=0, atol=1e-2)


# ---------------------------------------------------------------- carried state


def test_updates_with_carried_state_are_one_long_sequence(text):
    short = tiny_run(text, "optim.learning_rate=0", "data.update_len=8", "net.codebook_decay=1")
    state, reports = updates(short, 8)
    assert_same(state.params, stepper(short)[1].params)  # rate 0, frozen codebook: fixed weights
    assert_same(state.stats, stepper(short)[1].stats)
    long = dataclasses.replace(short, data=dataclasses.replace(short.data, update_len=32))
    _, expected = updates(long, 2)
    pieces = np.array([r["bits_per_byte"] for r in reports]).reshape(2, 4).mean(1)
    np.testing.assert_allclose(pieces, [r["bits_per_byte"] for r in expected], rtol=1e-5)
    assert abs(expected[0]["bits_per_byte"] - expected[1]["bits_per_byte"]) > 1e-3


def test_start_resets_the_carried_state_row_by_row(text):
    run = tiny_run(text, "optim.learning_rate=0", "net.codebook_decay=1")
    step, first, batch = stepper(run)
    carried, _ = updates(run, 1)
    rows = np.arange(8) % 2 == 0
    both, _ = step(carried, batch(1) | {"start": rows})
    fresh, _ = step(carried, batch(1) | {"start": np.ones(8, bool)})
    never, _ = step(carried, batch(1) | {"start": np.zeros(8, bool)})
    pick = lambda a, b: np.where(rows.reshape(1, 8, *[1] * (a.ndim - 2)), a, b)
    assert_close(both.carry, jax.tree.map(pick, fresh.carry, never.carry))
    assert set(np.unique(fresh.carry["attn1"].offset)) == {16}
    assert set(np.unique(never.carry["attn1"].offset)) == {32}


def test_layer_dropout_is_drawn_once_per_sequence(text):
    """With only whole-sublayer dropout, loss of the same rows repeats within a sequence."""
    run = tiny_run(text, "net.dropout_layer=0.5", "net.n_layer=2", "optim.learning_rate=0",
                   "net.codebook_decay=1", "data.sequence_len=64",
                   "data.update_len=16")  # fmt: skip
    task = make_task(run)
    _, first, batch = stepper(run)
    rows = batch(0)
    carry = task.init_carry(8)

    @jax.jit
    def nll(number):
        out = task.loss(first.params, first.stats, carry, rows | {"step": number},
                        jax.random.key(0))  # fmt: skip
        return out[0]

    losses = [float(nll(np.int32(n))) for n in range(12)]
    by_sequence = np.reshape(losses, (3, 4))
    assert (by_sequence == by_sequence[:, :1]).all()
    assert len(set(by_sequence[:, 0])) == 3


def test_residual_dropout_is_drawn_for_every_update(text):
    run = tiny_run(text, "net.dropout_res=0.5", "optim.learning_rate=0", "net.codebook_decay=1")
    task, (_, first, batch) = make_task(run), stepper(run)
    nll = jax.jit(
        lambda n: task.loss(
            first.params, first.stats, task.init_carry(8), batch(0) | {"step": n}, jax.random.key(0)
        )[0]
    )
    assert len({float(nll(np.int32(n))) for n in range(4)}) == 4


# ---------------------------------------------------------------- guards


def test_an_update_that_is_not_finite_changes_nothing(text):
    run = tiny_run(text, "ema.decay=0.9")
    step, first, batch = stepper(run)
    good, report = step(first, batch(0))
    assert report["ok"] and int(good.step) == 1
    same, report = step(good, batch(2))  # not the batch this state waits for
    assert not report["ok"]
    assert_same(same, good)
    broken = good.replace(params=good.params | {"embedding": good.params["embedding"] * np.inf})
    same, report = step(broken, batch(1))
    assert not report["ok"]
    assert_same(same, broken)


def test_a_run_that_diverges_stops_with_the_state_and_the_batch_saved(text, tmp_path):
    run = tiny_run(text, "optim.learning_rate=1e30", "optim.warmup=0", "optim.clip=0", "steps=9")
    with pytest.raises(UserError, match=r"update \d gave a loss.*failed/step-\d; lower") as caught:
        loop.train(run, tmp_path, **ONE)
    assert "\n" not in str(caught.value)
    (folder,) = (tmp_path / "failed").iterdir()
    number = int(folder.name.removeprefix("step-"))
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest_step() == number
    state = checkpoints.restore(abstract_state(run), number)
    assert np.isfinite(np.asarray(state.stats["layers"]["attn1"]["c_sum"])).all()
    step, _, batch = stepper(run)
    with np.load(folder / "batch.npz") as saved:
        assert_same(dict(saved) | {"step": np.int32(number)}, batch(number))
        _, report = step(state, dict(saved) | {"step": np.int32(number)})
    assert not report["ok"]


def test_the_first_update_may_fail_and_the_reason_is_told(text, tmp_path, monkeypatch):
    """Nothing was logged yet, so there is no curve to draw; that must not hide the error."""
    original = loop.put_batch

    def put_batch(batch, step, mesh, size):
        return original(batch, step + 1, mesh, size)  # the guard refuses

    monkeypatch.setattr(loop, "put_batch", put_batch)
    monkeypatch.setattr(loop, "plot_curves", plot_curves)
    with pytest.raises(UserError, match="update 0 gave a loss"):
        loop.train(tiny_run(text, "log.every=50"), tmp_path, **ONE)


# ---------------------------------------------------------------- precision, memory, compilation


def gradients(run):
    task, (_, first, batch) = make_task(run), stepper(run)
    loss = lambda p: task.loss(p, first.stats, first.carry, batch(0), jax.random.key(0))[0]
    return jax.jit(jax.value_and_grad(loss))(first.params)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_gives_the_same_gradients(remat, text):
    rate = "net.dropout_res=0.2"
    expected = gradients(tiny_run(text, rate))
    assert_close(gradients(tiny_run(text, rate, f"precision.remat={remat}")), expected)


def test_bfloat16_trains_close_to_float32(text):
    state, reports = updates(tiny_run(text, "precision.compute=bfloat16"), 3)
    _, expected = updates(tiny_run(text), 3)
    for report, by in zip(reports, expected):
        assert report["loss"] == pytest.approx(by["loss"], rel=0.02)
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.float32.dtype}
    assert state.carry["attn1"].keys.dtype == jnp.bfloat16


def test_one_compilation_serves_all_updates(text, tmp_path, monkeypatch):
    made = []
    original = jax.jit

    def jit(fn, *args, **kwargs):
        made.append(original(fn, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(loop.jax, "jit", jit)
    loop.train(tiny_run(text, "steps=5", "eval.every=2", "checkpoint.every=2"), tmp_path)
    update = made[0]
    assert update._cache_size() == 1


# ---------------------------------------------------------------- what a run writes


def test_a_run_learns_and_writes_its_figures(text, tmp_path):
    run = tiny_run(text, "steps=60", "log.every=20", "eval.every=30", "ema.decay=0.5",
                   "optim.learning_rate=3e-2")  # fmt: skip
    result = loop.train(run, tmp_path, **ONE)
    lines = read_lines(tmp_path)
    train, val = ([x for x in lines if k in x] for k in ("loss", "val_loss"))
    assert [x["step"] for x in train] == [20, 40, 60]
    assert [x["step"] for x in val] == [30, 60]
    assert train[-1]["bits_per_byte"] < 4.0 < 7 < np.log2(259)  # words repeat
    assert {"lr", "grad_norm", "commit", "tokens", "c_perplexity"} <= train[0].keys()
    assert train[0]["tokens"] == 20 * 8 * 16
    raw = (tmp_path / "metrics.jsonl").read_text()
    assert '"tokens_per_s"' in raw and '"step_time"' in raw and "mfu" not in raw
    assert result.metrics["bits_per_byte"] == val[-1]["val_bits_per_byte"]
    assert val[-1]["val_loss"] / np.log(2) == pytest.approx(val[-1]["val_bits_per_byte"])
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "wandb").exists()


def test_the_loss_and_rate_of_every_line_are_those_of_its_update(text, tmp_path):
    run = tiny_run(text, "steps=4")
    lines = train_lines(run, tmp_path, **ONE)
    _, reports = updates(run, 4)
    assert values(lines, "loss") == pytest.approx([float(r["loss"]) for r in reports], rel=1e-5)
    assert values(lines, "lr") == pytest.approx([float(r["lr"]) for r in reports])
    assert values(lines, "lr")[:3] == pytest.approx([0, 0.005, 0.01])


def test_validation_uses_the_averaged_weights(text, tmp_path):
    run = tiny_run(text, "ema.decay=0.9", "optim.learning_rate=3e-2")
    lines = train_lines(run, tmp_path, **ONE)
    state = saved_state(run, tmp_path)
    task = make_task(run)
    data = open_data(run.data, split="validation", seed=0, batch_size=8)
    batch = data.batch(0, np.arange(8))

    def loss(params):
        sums = jax.jit(task.evaluate)(params, state.stats, batch)
        return float(sums["nll"] / sums["tokens"])

    assert values(lines, "val_loss") == pytest.approx([loss(state.ema)], rel=1e-5)
    assert abs(loss(state.params) - loss(state.ema)) > 1e-3


def test_model_flops_and_utilisation(text, monkeypatch):
    """Matmuls dominate: about two FLOPs per parameter and token, plus attention's own products."""
    run = tiny_run(text, "net.d_model=64", "net.d_v=128")
    task, mesh = make_task(run), make_mesh(Mesh(), jax.devices()[:2])
    shapes = jax.eval_shape(task.init, jax.random.key(0))["params"]
    count = sum(a.size for a in jax.tree.leaves(shapes)) - shapes["embedding"].size
    assert 1 < metrics.forward_flops(task, run) / (2 * count * 8 * 16) < 1.6
    monkeypatch.setattr(flops, "peak_flops", lambda device: 1e9)
    clock = metrics.Clock(task, run, mesh)
    times = iter([0.0, 0.5, 1.5])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    assert clock.tick() == {}  # the first update compiles
    clock.tick()
    figures = clock.tick()
    assert figures["step_time"] == 0.75
    assert figures["tokens_per_s"] == pytest.approx(8 * 16 / 0.75)
    expected = 3 * metrics.forward_flops(task, run) / (0.75 * 2e9)
    assert figures["mfu"] == pytest.approx(expected)
