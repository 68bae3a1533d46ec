"""The same training on any mesh of 8 devices, and checkpoints that move between meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lintime.model.partition import constrain, parameter_spec, unsharded
from lintime.train import loop
from lintime.train.errors import UserError
from lintime.train.mesh import (
    check_batch,
    local_rows,
    make_mesh,
    put_batch,
    state_shardings,
)
from lintime.train.schema import Mesh
from lintime.train.step import init_state, make_train_step
from lintime.train.tasks.table import make_task
from tests.tiny import assert_close, quick, saved_state, tiny_run, train_lines, values, write_text

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

# Widths at which fsdp and tensor both cut kernels (4096 elements and more).
WIDE = (
    "net.d_model=32", "net.d_v=32", "net.n_head=2", "net.n_layer=2", "net.dropout_res=0.1",
    "net.dropout_layer=0.2", "net.dropout_sin=0.1", "ema.decay=0.9", "steps=3",
)  # fmt: skip
MESHES = {
    "data": ("mesh.data=8",),
    "fsdp": ("mesh.data=1", "mesh.fsdp=8"),
    "tensor": ("mesh.data=4", "mesh.tensor=2"),
    "mixed": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    "sequence": ("mesh.data=4", "mesh.sequence=2"),
}


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """Three updates on one device: run, folder, metric lines."""
    run = tiny_run(text, *WIDE, "mesh.data=1")
    folder = tmp_path_factory.mktemp("one")
    return run, folder, train_lines(run, folder, devices=jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data", "fsdp", "tensor", "mixed", "sequence"])
def test_a_mesh_trains_like_one_device(name, one, text, tmp_path):
    run = tiny_run(text, *WIDE, *MESHES[name])
    lines = train_lines(run, tmp_path)
    assert values(lines, "loss") == pytest.approx(values(one[2], "loss"), rel=2e-5)
    assert values(lines, "grad_norm") == pytest.approx(values(one[2], "grad_norm"), rel=1e-3)
    assert values(lines, "val_loss") == pytest.approx(values(one[2], "val_loss"), rel=2e-4)
    state, expected = saved_state(run, tmp_path), saved_state(one[0], one[1])
    # The first update has rate 0 and Adam divides by tiny second moments, hence not tighter.
    for part in ("params", "ema", "stats", "carry"):
        assert_close(getattr(state, part), getattr(expected, part), rtol=2e-3, atol=2e-4)


@pytest.fixture(scope="module")
def moved(text, one, tmp_path_factory):
    """Five updates on one device without a break."""
    run = dataclasses.replace(one[0], steps=5)
    folder = tmp_path_factory.mktemp("moved")
    return train_lines(run, folder, devices=jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [("data", None), (None, "mixed"), ("fsdp", "tensor")])
def test_a_checkpoint_moves_to_another_mesh(first, second, moved, text, tmp_path):
    base = (*WIDE, "optim.decay_steps=5")
    place = lambda name: (
        {"devices": jax.devices()[:1]} if name is None else {},
        MESHES[name] if name else ("mesh.data=1",),
    )
    for name, steps in ((first, 3), (second, 5)):
        kwargs, overrides = place(name)
        lines = train_lines(tiny_run(text, *base, *overrides, f"steps={steps}"), tmp_path, **kwargs)
    assert values(lines, "step")[-1] == 5
    expected = {line["step"]: line["loss"] for line in moved if "loss" in line}
    got = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert got == pytest.approx(expected, rel=2e-4)


def test_parameters_activations_and_batches_are_cut(text):
    run = tiny_run(text, *WIDE, *MESHES["mixed"])
    mesh, task = make_mesh(run.mesh), make_task(run)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 259, (8, 16)).astype(np.int32)
    batch = dict(inputs=tokens, targets=tokens, mask=np.ones_like(tokens),
                 segment_ids=np.ones_like(tokens), start=np.ones(8, bool))  # fmt: skip
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda k: init_state(task, run, k), jax.random.key(0))
        shardings = state_shardings(shapes, mesh)
        state = jax.jit(lambda k: init_state(task, run, k), out_shardings=shardings)(
            jax.random.key(0)
        )
        step = jax.jit(make_train_step(task, run), out_shardings=(shardings, None))
        batch = put_batch(batch, 0, mesh, 8)
        compiled = step.lower(state, batch).compile()
        state, _ = compiled(state, batch)
        q_of = lambda s, t: task.net.apply(
            {"params": s.params, "stats": s.stats}, t, mutable=["intermediates"]
        )[1]["intermediates"]["layers"]["attn1"]["q"][0]
        q = jax.jit(q_of)(state, batch["inputs"])
    kernel = state.params["layers"]["attn1"]["v_proj"]["kernel"]  # [layer, D, heads * V]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert {s.data.shape for s in kernel.addressable_shards} == {(2, 16, 32)}
    moments = [
        a for path, a in jax.tree_util.tree_leaves_with_path(state.opt)
        if "attn1" in str(path) and "v_proj" in str(path)
    ]  # fmt: skip
    assert len(moments) == 2 and all(m.sharding == kernel.sharding for m in moments)
    assert batch["inputs"].addressable_shards[0].data.shape == (2, 16)
    assert {s.data.shape[1:3] for s in q.addressable_shards} == {(2, 1)}  # rows, heads
    text = compiled.as_text()
    assert "all-reduce" in text and "all-gather" in text
    assert unsharded(shapes.params, mesh) == ["embedding"]  # 259 rows do not divide


def test_activation_constraints():
    mesh = make_mesh(Mesh(data=2, tensor=2, sequence=2))
    x = jnp.zeros((4, 6, 8))
    place = jax.jit(lambda x: constrain(x, "batch", "seq", "features"))
    assert place(x).sharding.is_fully_replicated  # no mesh is set
    with jax.set_mesh(mesh):
        assert place(x).addressable_shards[0].data.shape == (2, 3, 4)
        assert place(x[:1]).addressable_shards[0].data.shape == (1, 3, 4)  # one row stays whole
    with pytest.raises(ValueError, match="unknown activation axis 'rows'"):
        constrain(x, "rows", None, None)
    with pytest.raises(ValueError, match="2 axis names"):
        constrain(x, "batch", "seq")


@pytest.mark.parametrize(
    "path, shape, sizes, spec",
    [
        ("layers/attn1/q_proj/kernel", (2, 64, 32), dict(tensor=2), P(None, None, "tensor")),
        ("layers/attn1/res_proj/kernel", (2, 64, 32), dict(tensor=2), P(None, "tensor", None)),
        ("layers/mlp/up/kernel", (2, 64, 96), dict(tensor=2), P(None, None, "tensor")),
        ("layers/mlp/down/kernel", (2, 96, 64), dict(tensor=2), P(None, "tensor", None)),
        ("embedding", (259, 64), dict(tensor=2, fsdp=2), P(None, "tensor")),
        ("layers/attn1/q_proj/kernel", (2, 64, 32), dict(tensor=3), P(None, None, None)),
        ("layers/attn1/r_proj/kernel", (2, 64, 32), dict(fsdp=4), P(None, "fsdp", None)),
        ("0/mu/layers/attn1/k_proj/kernel", (2, 64, 32), dict(fsdp=4, tensor=4),
         P(None, "fsdp", "tensor")),
        ("layers/attn1/r_proj/kernel", (2, 8, 32), dict(fsdp=4), P(None, None, None)),  # small
        ("layers/attn1/input_ln/g", (2, 64), dict(fsdp=4, tensor=4), P(None, None)),
        ("count", (), dict(fsdp=4, tensor=4), P()),
    ],
)  # fmt: skip
def test_parameter_rules(path, shape, sizes, spec):
    assert parameter_spec(path, shape, sizes) == spec


@pytest.mark.parametrize(
    "mesh, message",
    [
        (Mesh(data=3), "needs 3 devices, there are 8"),
        (Mesh(fsdp=3), "does not divide the 8 devices"),
        (Mesh(fsdp=-1), "at most one of them -1"),
        (Mesh(data=0), "sizes are positive"),
        (Mesh(data=-2), "sizes are positive"),
    ],
)
def test_wrong_meshes_are_refused_in_one_line(mesh, message):
    with pytest.raises(UserError, match=message) as caught:
        make_mesh(mesh)
    assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_divide_is_refused(text, tmp_path):
    with pytest.raises(UserError, match=r"batch_size=12 .* by 8 .*set batch_size=(8|16)"):
        loop.train(tiny_run(text, "batch_size=12"), tmp_path)
    run = tiny_run(text, "mesh.data=4", "mesh.tensor=2", "optim.accumulate=4")
    with pytest.raises(UserError, match="set batch_size=16"):
        check_batch(run, make_mesh(run.mesh))
    assert not (tmp_path / "config.json").exists()


def test_rows_of_a_process_and_the_batch_on_the_mesh():
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(local_rows(mesh, 8), np.arange(8))
    rows = np.arange(16, dtype=np.int32).reshape(8, 2)
    placed = put_batch({"inputs": rows}, 5, mesh, 8)
    np.testing.assert_array_equal(placed["inputs"], rows)
    assert placed["step"] == 5 and placed["step"].dtype == jnp.int32
