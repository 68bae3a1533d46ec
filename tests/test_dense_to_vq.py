"""A trained dense model becomes a VQ model: codebooks from its own keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lintime.model.convert.dense_to_vq import dense_to_vq, kmeans
from lintime.model.convert.names import flatten
from lintime.model.nets.transformer_vq import TransformerVQ, TransformerVQConfig, absorb
from lintime.train.checkpoint import save_inference
from lintime.train.config_files import save_config
from lintime.train.convert import command as command
from lintime.train.errors import UserError
from lintime.train.schema import Data, Run
from tests.conversion import abstract_variables, assert_same, cli, restored


def test_kmeans_finds_every_distinct_point_and_ignores_masked_ones():
    rng = np.random.default_rng(0)
    distinct = rng.normal(size=(7, 4)).astype(np.float32)
    points = distinct[rng.integers(0, 6, 60)]  # the seventh does not occur ..
    points = np.concatenate([points, np.repeat(distinct[6:], 40, 0)])  # .. but where masked
    weights = np.concatenate([np.ones(60), np.zeros(40)]).astype(np.float32)
    centres, count = kmeans(points, weights, n_code=9, key=jax.random.key(0), iterations=3)
    gap = np.abs(np.asarray(centres)[:, None] - distinct[None]).max(-1)
    assert (gap.min(0)[:6] < 1e-6).all() and gap.min(0)[6] > 0.1
    assert float(count.sum()) == 60 and int((count > 0).sum()) == 6


def test_kmeans_reaches_the_means_of_separate_groups():
    rng = np.random.default_rng(1)
    middles = 10 * rng.normal(size=(5, 3))
    points = (middles[:, None] + 0.1 * rng.normal(size=(5, 30, 3))).reshape(-1, 3)
    centres, count = kmeans(
        points.astype(np.float32), np.ones(150), n_code=5, key=jax.random.key(3), iterations=4
    )
    order = np.argmin(np.abs(middles[:, None] - np.asarray(centres)[None]).max(-1), axis=1)
    expected = points.reshape(5, 30, 3).mean(1)
    np.testing.assert_allclose(np.asarray(centres)[order], expected, atol=1e-4)
    np.testing.assert_array_equal(count, 30)


TOY = TransformerVQConfig(
    vocab_size=12, d_model=16, n_layer=2, head_type="mqa", d_k=8, n_code=16, block_len=4, mem_len=4,
    attention="dense", reduction="serial",
)  # fmt: skip


def toy_batch(seed, rows=8, length=20):
    """Rows that repeat a random word of random length."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(3, 12, n) for n in rng.integers(3, 8, rows)]
    rows = np.stack([np.tile(w, length)[: length + 1] for w in words]).astype(np.int32)
    return {"inputs": rows[:, :-1], "targets": rows[:, 1:]}


@functools.partial(jax.jit, static_argnums=0)
def toy_loss(config, variables, batch):
    logits, _ = TransformerVQ(config).apply(variables, batch["inputs"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def random_dense(config, seed=0):
    """Parameters of ordinary sizes, none of them zero."""
    rng = np.random.default_rng(seed)
    fan_in = lambda a: a.shape[-2] if len(a.shape) > 2 else 4
    draw = lambda a: (rng.normal(size=a.shape) / np.sqrt(fan_in(a))).astype(np.float32)
    return {"params": jax.tree.map(draw, abstract_variables(config)["params"])}


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, variables, tokens):
    """Logits, and what the codebooks report (not their metrics, which take long to compile)."""
    logits, aux = TransformerVQ(config).apply(variables, tokens)
    return logits, {name: a for name, a in aux.items() if name != "metrics"}


@pytest.mark.parametrize(
    "kind, head, mem_len, length",
    [("dense", "shga", 11, 12), ("dense", "mha", 15, 12), ("flash", "mqa", 3, 20)],
)
def test_vq_equals_dense_where_every_key_is_a_centre(kind, head, mem_len, length):
    config = dataclasses.replace(
        TOY, attention=kind, head_type=head, mem_len=mem_len, n_code=2 * length
    )
    dense = random_dense(config)
    batch = toy_batch(0, rows=2, length=length)
    converted = dense_to_vq(dense, config, [batch], key=jax.random.key(0), iterations=2)
    vq = dataclasses.replace(config, attention="vq")
    want, _ = logits_of(config, dense, batch["inputs"])
    got, aux = logits_of(vq, converted, batch["inputs"])
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert max(float(c.max()) for c in aux["commit"].values()) < 1e-9
    # One key fewer in the window and the bias is lost somewhere: the equality is not an accident.
    if kind == "dense" and mem_len == length - 1:
        short = dataclasses.replace(vq, mem_len=mem_len - 4)
        other, _ = logits_of(short, converted, batch["inputs"])
        assert np.abs(other - want).max() > 1e-2


@pytest.mark.slow
def test_converted_codebooks_are_a_fixed_point_and_near_the_dense_loss():
    # Without position bias, so that only the codebooks can cost anything.
    flash = dataclasses.replace(TOY, attention="flash", n_code=64)
    optimizer = optax.adam(1e-2)

    tokens = jnp.zeros((1, 4), jnp.int32)

    @jax.jit
    def train(batches):
        params = TransformerVQ(flash).init({"params": jax.random.key(0)}, tokens)["params"]

        def step(carry, batch):
            params, opt = carry
            loss = lambda p: toy_loss(flash, {"params": p}, batch)
            updates, opt = optimizer.update(jax.grad(loss)(params), opt)
            return (optax.apply_updates(params, updates), opt), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    batches = [toy_batch(i) for i in range(200)]
    params = train(jax.tree.map(lambda *xs: np.stack(xs), *batches))
    data = [toy_batch(1000 + i) for i in range(6)]
    vq = dataclasses.replace(flash, attention="vq")
    converted = dense_to_vq({"params": params}, flash, data, key=jax.random.key(1))
    before = flatten(params)  # flash attention never trained r_proj, so it starts at zero
    before["layers/attn/r_proj/kernel"] = np.zeros_like(before["layers/attn/r_proj/kernel"])
    assert_same(flatten(converted["params"]), before)
    test = toy_batch(2000, rows=32)
    dense_loss = toy_loss(flash, {"params": params}, test)
    vq_loss = toy_loss(vq, converted, test)
    fresh = jax.jit(TransformerVQ(vq).init)({"params": jax.random.key(2)}, tokens)["stats"]
    random_loss = toy_loss(vq, {"params": params, "stats": fresh}, test)
    assert random_loss - dense_loss > 0.05
    assert abs(vq_loss - dense_loss) < 0.3 * (random_loss - dense_loss)

    # An EMA update with one ordinary batch moves neither the counts' sum nor the codewords much.
    _, aux = logits_of(vq, converted, test["inputs"][:8])
    stats, delta = converted["stats"]["layers"]["attn"], aux["stats_delta"]
    per_update = float(delta["layers"]["attn"]["c_count"].sum(-1).mean())
    unused = 64 - 9  # the first layer sees 9 tokens without context; unused codes count as 1
    want = [[per_update + unused], [per_update]]
    np.testing.assert_allclose(stats["c_count"].sum(-1), want, rtol=0.05)
    new = absorb(vq, converted["stats"], delta)["layers"]["attn"]
    code = lambda s: s["c_sum"] / s["c_count"][..., None]
    assert np.abs(code(new) - code(stats)).max() < 0.05


def test_dense_to_vq_refuses_vq_models_and_no_data():
    vq = dataclasses.replace(TOY, attention="vq")
    with pytest.raises(ValueError, match="vq already"):
        dense_to_vq({"params": {}}, vq, [], key=jax.random.key(0))
    with pytest.raises(ValueError, match="no batches"):
        dense_to_vq(random_dense(TOY), TOY, [], key=jax.random.key(0))


def test_dense_run_becomes_a_vq_run(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(
        b"".join(b"%d times %d is %d.\n" % (i, j, i * j) for i in range(60) for j in range(20))
    )
    net = dataclasses.replace(TOY, vocab_size=259)
    run = Run(
        net=net, data=Data(path=str(text), sequence_len=32, update_len=16), batch_size=4, steps=2
    )
    dense = random_dense(net)
    save_inference(tmp_path / "dense", dense)
    save_config(run, tmp_path / "dense/config.json")
    cli("--run", tmp_path / "dense", "--to", "vq", "--out", tmp_path / "vq", "net.n_code=32")
    assert "nats per token before fine-tuning" in capsys.readouterr().out
    vq, variables = restored(tmp_path / "vq")
    assert vq.net == dataclasses.replace(net, attention="vq", n_code=32)
    assert_same(flatten(variables["params"]), flatten(dense["params"]))
    count = variables["stats"]["layers"]["attn"]["c_count"]
    assert count.shape == (2, 1, 32)
    np.testing.assert_allclose(count.sum(-1), 4 * 16, rtol=0.3)  # one update; rare codes are lifted
    with pytest.raises(UserError, match="has VQ attention already"):
        command.dense_run_to_vq(tmp_path / "vq", tmp_path / "x")
    with pytest.raises(UserError, match="does not fit the config"):
        command.dense_run_to_vq(tmp_path / "dense", tmp_path / "x", overrides=["net.d_model=32"])
