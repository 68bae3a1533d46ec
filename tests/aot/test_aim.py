"""AiM's training step and sampler, compiled for TPU: they lower, fit, and are sharded as asked."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lintime.model.nets.aim import AiM, AiMConfig
from lintime.model.sampling.classes import make_class_sampler
from lintime.train.mesh import ROWS, state_shardings
from lintime.train.schema import CodeData, ImageSample, Optim, Precision, Run
from lintime.train.step import init_state, make_train_step
from lintime.train.tasks.table import make_task
from tests.aot import MARKS, compile_for, memory_report, topology_mesh

pytestmark = MARKS
NET = AiMConfig(
    d_model=256, n_layer=2, d_state=64, num_tokens=64, vocab_size=512, num_classes=10,
    conditioning="adaln_group",
)  # fmt: skip


def test_a_sharded_training_step():
    run = Run(
        net=NET, data=CodeData(), sample=ImageSample(), optim=Optim(clip=1.0), batch_size=16,
        precision=Precision(compute="bfloat16", remat="dots"),
    )  # fmt: skip
    task = make_task(run)
    state = jax.eval_shape(lambda k: init_state(task, run, k), jax.random.key(0))
    mesh = topology_mesh("v5e:2x2", {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1})
    shardings = state_shardings(state, mesh)
    place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    state = jax.tree.map(place, state, shardings)
    rows = NamedSharding(mesh, ROWS)
    batch = {k: place(v, rows) for k, v in task.abstract_batch().items()}
    batch["step"] = place(jax.ShapeDtypeStruct((), "int32"), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        step = jax.jit(
            make_train_step(task, run), donate_argnums=0, out_shardings=(shardings, None)
        )
        compiled = step.trace(state, batch).lower().compile()
    report = memory_report(compiled)
    whole = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    assert report["alias"] < 0.4 * whole  # the state is cut in four, and donated
    assert report["peak"] < 2**27


def test_the_sampler():
    net = AiM(NET, jnp.bfloat16)
    codes, labels = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1,), jnp.int32)
    variables = jax.eval_shape(net.init, {"params": jax.random.key(0)}, codes, labels)
    keys = jax.ShapeDtypeStruct((4, 2), jnp.uint32)
    labels = jax.ShapeDtypeStruct((4,), jnp.int32)
    for cache in ("recurrent", "dual"):
        sampler = make_class_sampler(net, cache=cache)

        def draw(variables, keys, labels, sampler=sampler):
            return sampler(variables, jax.random.wrap_key_data(keys), labels, guidance=2.0, top_k=9)

        compiled = compile_for("v5e", draw, variables, keys, labels)
        assert memory_report(compiled)["outputs"] >= 4 * 64 * 4
