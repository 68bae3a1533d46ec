"""What a FlexiDiT loses at lower budgets, beside what fewer steps of its full patch size lose.

    python benchmarks/flexidit_quality.py RUN IMAGES.npz HELD_OUT.npz --out DIR

RUN is a run of `lintime train flexidit/cifar10`; the .npz files hold images uint8 [N, H, W, 3] and
labels [N]. A small classifier is trained on the images. Every schedule draws the same seeds and
classes; its figures are

- the Frechet distance between features (before the classifier's last layer) of its images and of
  the training images: comparable within this table only, it is not the FID;
- how often the classifier sees the class that was asked for.

Held-out images go through the same figures: what a perfect sampler would reach. Writes
quality.json, quality.md, quality.png (distance over operations) and grids.png to DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lintime
from lintime.train.bench.report import table
from lintime.train.evaluate.statistics import Moments, frechet_distance
from lintime.train.loaded.flexible import flexible_flops, flexible_segments
from lintime.train.samples.pictures import image_grid

SHOWN = 20  # images of a schedule in grids.png
WEAK, FEWER = "weak steps first", "fewer steps of the full patch size"
COLUMNS = ("schedule", "GFLOPs", "share", "distance", "class seen", "s per 1000")


class Classifier(nn.Module):
    """Three stages of two convolutions, group-normed; features [B, 256] and logits."""

    classes: int

    @nn.compact
    def __call__(self, images):
        x = images.astype(jnp.float32) / 127.5 - 1
        for width in (64, 128, 256):
            for _ in range(2):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.GroupNorm(num_groups=16)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        features = x.mean((1, 2))
        return features, nn.Dense(self.classes)(features)


def train_classifier(images, labels, epochs: int, batch: int = 250):
    """Parameters and the net, trained with flips, shifts by up to 4 pixels and label smoothing."""
    net, steps = Classifier(int(labels.max()) + 1), epochs * (len(images) // batch)
    optimiser = optax.adamw(optax.cosine_onecycle_schedule(max(steps, 2), 2e-3), weight_decay=0.05)

    @jax.jit
    def update(params, state, images, labels, key):
        flips, shifts = jax.random.split(key)
        flip = jax.random.bernoulli(flips, shape=(len(images), 1, 1, 1))
        images = jnp.where(flip, images[:, :, ::-1], images)
        images = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
        size = images.shape[1] - 8
        cut = lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (size, size, 3))
        images = jax.vmap(cut)(images, jax.random.randint(shifts, (len(images), 2), 0, 9))

        def loss(params):
            smooth = optax.smooth_labels(jax.nn.one_hot(labels, net.classes), 0.1)
            return optax.softmax_cross_entropy(net.apply(params, images)[1], smooth).mean()

        grads = jax.grad(loss)(params)
        changes, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    params = jax.jit(net.init)(jax.random.key(0), images[:1])
    state, random = optimiser.init(params), np.random.default_rng(0)
    for epoch in range(epochs):
        for rows in random.permutation(len(images))[: len(images) // batch * batch].reshape(
            -1, batch
        ):
            key = jax.random.fold_in(jax.random.key(1 + epoch), int(rows[0]))
            params, state = update(params, state, images[rows], labels[rows], key)
    return net, params


def judge(net, params, images, labels, batch: int = 500):
    """(moments of the features, share of images whose class is seen)."""
    apply, moments, right = jax.jit(net.apply), Moments(256), 0
    for at in range(0, len(images), batch):
        features, logits = jax.device_get(apply(params, images[at : at + batch]))
        moments.add(features)
        right += int((logits.argmax(-1) == labels[at : at + batch]).sum())
    return moments, right / len(images)


def gaussian(moments: Moments):
    """Mean and covariance."""
    return moments.mean, moments.covariance


def schedules(run, budgets):
    """{name: (kind, settings)}: by budget, and the full patch size with as many operations."""
    out, sample = {}, run.sample
    for budget in budgets:
        settings = dataclasses.replace(sample, budgets=(budget,))
        parts = flexible_segments(run.net, settings, budget)
        name = "+".join(f"{part.steps} x p{part.mode}" for part in parts)
        out[name] = ("full" if budget == 1 else WEAK, settings)
    for budget in budgets:
        steps = max(round(budget * sample.steps), 2)
        settings = dataclasses.replace(sample, steps=steps, budgets=(1.0,))
        out.setdefault(f"{steps} x p{run.net.powerful}", (FEWER, settings))
    return out


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("images")
    parser.add_argument("held_out")
    parser.add_argument("--out", default="runs/quality", type=Path)
    parser.add_argument("--count", default=5000, type=int, help="images of a schedule")
    parser.add_argument("--rows", default=500, type=int, help="drawn at a time")
    parser.add_argument("--epochs", default=30, type=int, help="of the classifier")
    parser.add_argument("--budgets", default="1,0.8,0.6,0.5,0.4,0.3")
    a = parser.parse_args()
    images, labels = (np.load(a.images)[name] for name in ("images", "labels"))
    held = [np.load(a.held_out)[name] for name in ("images", "labels")]
    net, params = train_classifier(images, labels, a.epochs)
    reference = gaussian(judge(net, params, images, labels)[0])
    moments, seen = judge(net, params, *held)
    results = [
        {"schedule": "held-out images", "images": len(held[0]), "seen": seen,
         "distance": frechet_distance(*gaussian(moments), *reference)}
    ]  # fmt: skip
    print(results[0], flush=True)

    loaded = lintime.load(a.run)
    classes, grids = np.arange(a.count) % loaded.num_classes, {}
    full = flexible_flops(loaded.config.net, loaded.config.sample, 1.0)
    budgets = [float(budget) for budget in a.budgets.split(",")]
    for name, (kind, sample) in schedules(loaded.config, budgets).items():
        settings = loaded.settings(dataclasses.replace(sample, rows=a.rows))
        next(loaded.stream(classes[: a.rows], seed=1, **settings))  # compile
        began = time.perf_counter()
        drawn = np.concatenate(list(loaded.stream(classes, seed=1, **settings)))
        seconds = time.perf_counter() - began
        moments, seen = judge(net, params, drawn, classes)
        macs = flexible_flops(loaded.config.net, sample, sample.budgets[0])
        results.append({
            "schedule": name, "kind": kind, "images": len(drawn), "seen": seen, "flops": 2 * macs,
            "share": macs / full, "distance": frechet_distance(*gaussian(moments), *reference),
            "seconds": seconds,
        })  # fmt: skip
        grids[name] = image_grid(drawn[:SHOWN], SHOWN // 2)
        print(results[-1], flush=True)
        write(results, grids, a.out, jax.devices()[0].device_kind)


def write(results, grids, out: Path, device: str) -> None:
    """The files of what is measured so far."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    report = {"device": device, "jax": jax.__version__, "results": results}
    (out / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    rows = [
        (r["schedule"], f"{r['flops'] / 1e9:.0f}", f"{r['share']:.0%}", f"{r['distance']:.2f}",
         f"{r['seen']:.1%}", f"{1000 * r['seconds'] / r['images']:.2f}")
        if "flops" in r else
        (r["schedule"], "", "", f"{r['distance']:.2f}", f"{r['seen']:.1%}", "")
        for r in results
    ]  # fmt: skip
    (out / "quality.md").write_text(table(COLUMNS, rows) + "\n")

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label in (WEAK, FEWER):
        chosen = [r for r in results if r.get("kind") in ("full", label)]
        chosen = sorted(chosen, key=lambda r: r["share"])
        points = [[r[k] for r in chosen] for k in ("share", "distance")]
        axes.plot(*points, "o-", label=label)
    axes.axhline(results[0]["distance"], color="gray", ls=":", label=results[0]["schedule"])
    axes.set(xlabel="operations, share of the full schedule", ylabel="Frechet distance")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(out / "quality.png", dpi=120)

    figure = Figure(figsize=(6, 1.5 * len(grids)), layout="constrained")
    for axes, (name, grid) in zip(figure.subplots(len(grids), squeeze=False)[:, 0], grids.items()):
        axes.imshow(grid, interpolation="nearest")
        axes.set_title(name, fontsize=8)
        axes.set_axis_off()
    figure.savefig(out / "grids.png", dpi=120)


if __name__ == "__main__":
    main()
