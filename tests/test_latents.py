"""Latents: loading an autoencoder, encoding images ahead of training, batches, and refusals."""

import dataclasses
import hashlib
import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lintime.model.convert.autoencoder_kl import autoencoder_shapes
from lintime.model.nets.autoencoder_kl import AutoencoderKLConfig
from lintime.train import cli
from lintime.train.arrays import encode_arrays
from lintime.train.data import LatentDataset, open_latent_data
from lintime.train.data.crops import to_unit, views_of
from lintime.train.data.image_sources import find_image_splits
from lintime.train.data.latents import LatentsInfo
from lintime.train.data.open import open_split
from lintime.train.encoders.autoencoder import (
    LoadedAutoencoder,
    check_autoencoder,
    load_autoencoder,
)
from lintime.train.prepare.command import prepare_latents
from lintime.train.schema import DATA, ImageData, LatentData, Run
from tests import autoencoder_vectors as vectors
from tests.tiny import quick, refused

SIZE = 8
TINY = AutoencoderKLConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, latent_channels=2)
NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def fast():
    with quick():
        yield


@pytest.fixture(scope="module")
def arrays():
    return {name: vectors.array(name, shape) for name, shape in autoencoder_shapes(TINY).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, arrays):
    """An autoencoder in the published layout."""
    out = tmp_path_factory.mktemp("vae")
    (out / NAME).write_bytes(encode_arrays(arrays, "safetensors"))
    settings = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "norm_num_groups": 32}
    (out / "config.json").write_text(json.dumps(settings))
    return out


@pytest.fixture(scope="module")
def autoencoder(folder):
    return load_autoencoder(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    out, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("train", 5), ("val", 3)):
        for i in range(count):
            path = out / name / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9 + i, 12, 3), np.uint8)).save(path)
    return ImageData(path=str(out), size=SIZE, filter="bicubic", flip=True)


def prepared(images, autoencoder, out, **options):
    lines = []
    options = {"batch_size": 8, "shard_size": 2} | options
    info = prepare_latents(images, autoencoder, out, say=lines.append, **options)
    return info, lines


@pytest.fixture(scope="module")
def latents(images, autoencoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents")
    prepared(images, autoencoder, out)
    return out


def opened(folder, split="train", seed=3, batch_size=4, **fields):
    config = LatentData(**fields)
    return open_latent_data(config, folder, split=split, seed=seed, batch_size=batch_size)


def contents(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def stored(folder, split, shard):
    return np.load(LatentsInfo.shard_files(folder, split, shard)[0])


# ---------------------------------------------------------------- the autoencoder


def test_every_published_form_is_the_same_autoencoder(folder, autoencoder, arrays, tmp_path):
    assert autoencoder.config == dataclasses.replace(TINY, scaling_factor=0.5)
    assert (autoencoder.downsample, autoencoder.latent_channels) == (2, 2)
    prints = {load_autoencoder(folder / NAME).fingerprint}
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    prints.add(load_autoencoder(tmp_path / "pipeline").fingerprint)
    assert prints == {autoencoder.fingerprint}
    (tmp_path / "bare.npz").write_bytes(encode_arrays(arrays, "npz"))
    bare = load_autoencoder(tmp_path / "bare.npz")
    assert bare.config == TINY and bare.scaling_factor == 0.18215  # as it says nothing else
    assert bare.fingerprint != autoencoder.fingerprint
    kernel = bare.params["quant_conv"]["kernel"]
    other = bare.params | {"quant_conv": bare.params["quant_conv"] | {"kernel": kernel + 1e-3}}
    assert LoadedAutoencoder(TINY, other).fingerprint != bare.fingerprint


def test_images_of_the_mean_keep_their_size(autoencoder):
    mean, logvar = autoencoder.encode(jnp.zeros((2, 6, 4, 3)))
    assert mean.shape == logvar.shape == (2, 3, 2, 2)
    assert autoencoder.decode(mean).shape == (2, 6, 4, 3)


def test_files_that_are_no_autoencoder(tmp_path, folder, arrays):
    accepted = f"a file of weights .*folder with one of {NAME}, .* and config.json"
    refused(f"vae does not exist; name {accepted}", load_autoencoder, tmp_path / "vae")
    refused(f"holds no weights of an autoencoder; name {accepted}", load_autoencoder, tmp_path)
    (tmp_path / NAME).write_bytes((folder / NAME).read_bytes()[:1000])
    refused("cannot read .*damaged", load_autoencoder, tmp_path)
    np.savez(tmp_path / "x.npz", **{"encoder.conv.weight": np.zeros(3)})
    refused(
        "x.npz holds no KL autoencoder in the layout of diffusers' .*: missing encoder.conv_in",
        load_autoencoder, tmp_path / "x.npz",
    )  # fmt: skip
    (tmp_path / NAME).write_bytes((folder / NAME).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"shift_factor": 0.1159}))
    refused("config.json has shift_factor=0.1159; only None", load_autoencoder, tmp_path)


# ---------------------------------------------------------------- preparing


def test_what_is_stored_are_the_moments_of_the_crops(images, autoencoder, latents):
    info = LatentsInfo.finished(latents)
    assert info.splits == {"train": 5, "validation": 3} and info.grid == (4, 4)
    assert (info.views, info.resizes, info.class_names) == ("flip", (1.0,), ("a", "b"))
    assert info.autoencoder == autoencoder.fingerprint and info.scaling_factor == 0.5
    assert sum(name.endswith("latents.npy") for name in contents(latents)) == 3 + 2
    for split, found in find_image_splits(images).items():
        kind = "flip" if split == "train" else "center"
        moments = np.concatenate([stored(latents, split, s) for s in info.shards(split)])
        assert moments.dtype == np.float16 and moments.shape[1:] == (1 + (kind == "flip"), 4, 4, 4)
        crops = [
            views_of(found.read(i)[0], resize=1.0, size=SIZE, filter="bicubic", views=kind)
            for i in range(len(found))
        ]
        wanted = autoencoder.encode(jnp.asarray(to_unit(np.concatenate(crops))))
        wanted = np.concatenate(wanted, -1).reshape(moments.shape)
        np.testing.assert_allclose(moments, wanted, rtol=2e-3, atol=1e-3)
        assert np.ptp(wanted) > 1


def test_an_interrupted_run_continues_and_a_finished_one_is_left(
    images, autoencoder, latents, tmp_path
):
    class Stopping(LoadedAutoencoder):
        left = 2

        def encode(self, images):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return super().encode(images)

    stopping = Stopping(autoencoder.config, autoencoder.params)
    with pytest.raises(KeyboardInterrupt):
        prepared(images, stopping, tmp_path)
    refused("latents in .* are not complete; run the same `lintime prepare lat", opened, tmp_path)
    _, lines = prepared(images, autoencoder, tmp_path)
    assert "continuing: 2 of 5 shards are there" in lines[0]
    assert contents(tmp_path) == contents(latents)
    _, lines = prepared(images, stopping, tmp_path)  # which would stop
    assert lines == [
        f"{tmp_path} already holds the latents of 8 images of 2 classes (5 train + 3 validation), "
        "2 crops of a training image"
    ]


def test_without_mirror_images(images, autoencoder, latents, tmp_path):
    info, lines = prepared(dataclasses.replace(images, flip=False), autoencoder, tmp_path)
    assert info.views == "center" and "1 crop of a training image" in lines[-1]
    np.testing.assert_allclose(
        stored(tmp_path, "train", 0), stored(latents, "train", 0)[:, :1], atol=2e-3
    )


def test_what_does_not_fit_is_refused(images, autoencoder, latents, tmp_path):
    before = contents(latents)
    other = LoadedAutoencoder(
        dataclasses.replace(autoencoder.config, scaling_factor=1.0), autoencoder.params, "other"
    )
    ours, theirs = other.fingerprint, autoencoder.fingerprint
    words = f"made with another autoencoder .fingerprint {theirs[:12]}, this one has {ours[:12]}"
    refused(words, prepared, images, other, latents)
    unflipped = dataclasses.replace(images, flip=False)
    refused(r"views=flip \(here center\)", prepared, unflipped, autoencoder, latents)
    odd = dataclasses.replace(images, size=9)
    refused("size=9 is not divisible by 2, .*; set size=8", prepared, odd, autoencoder, tmp_path)
    assert contents(latents) == before and not list(tmp_path.iterdir())
    check_autoencoder(theirs, autoencoder, "latents/ holds")
    refused(
        f"^other is not the autoencoder whose latents x/ holds .{ours} instead of {theirs}.",
        check_autoencoder, theirs, other, "x/ holds",
    )  # fmt: skip


def test_weights_that_give_no_numbers(images, autoencoder, tmp_path):
    params = jax.tree.map(lambda a: a * np.nan, autoencoder.params)
    broken = LoadedAutoencoder(autoencoder.config, params)
    refused("moments that are not finite", prepared, images, broken, tmp_path)
    broken.encode = lambda x: (jnp.zeros((len(x), 2, 2, 2)),) * 2
    with pytest.raises(ValueError, match=r"moments of shape \(2, 2, 4\), not \(4, 4, 4\)"):
        prepared(images, broken, tmp_path)


def test_command(images, folder, latents, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prepare", "latents", images.path, "--autoencoder", str(folder), "--out", str(out)]
    words += ["--size", str(SIZE), "--batch", "8"]
    assert cli.main(words) == 0
    assert f"data.path={out} data.autoencoder={folder}" in capsys.readouterr().out
    info = LatentsInfo.finished(out)
    assert (info.views, info.filter, info.splits) == (
        "flip",
        "bicubic",
        {"train": 5, "validation": 3},
    )
    np.testing.assert_array_equal(stored(out, "train", 0)[:2], stored(latents, "train", 0))
    words[4], words[words.index(str(SIZE))] = str(out), "9"
    assert cli.main(words) == 2
    assert "holds no weights of an autoencoder" in capsys.readouterr().err


# ---------------------------------------------------------------- batches


def test_a_dataset_of_latents(latents, autoencoder):
    data = opened(latents)
    assert isinstance(data, LatentDataset) and DATA["latents"] is LatentData
    assert (data.autoencoder, data.scaling_factor) == (autoencoder.fingerprint, 0.5)
    assert (data.shape, data.grid, data.num_images, data.num_classes) == ((4, 4, 2), (4, 4), 5, 2)
    assert data.description == "5 images of 2 classes, 2 views of 4x4 latents"
    run = Run(net=None, data=LatentData(), batch_size=4, seed=3)
    through = open_split(run, "train", ".", latents)
    assert through.fingerprint == data.fingerprint
    assert json.loads(json.dumps(data.fingerprint)) == data.fingerprint
    others = [
        opened(latents, seed=4), opened(latents, batch_size=2), opened(latents, shuffle=False),
        opened(latents, "validation"),
    ]  # fmt: skip
    assert all(other.fingerprint != data.fingerprint for other in others)


def test_training_draws_both_views_of_every_image(latents):
    data = opened(latents, batch_size=5)
    info, seen = data.info, set()
    moments = np.concatenate([stored(latents, "train", s) for s in info.shards("train")])
    for step in range(12):
        batch = data.batch(step, range(5))
        assert batch["mean"].dtype == batch["logvar"].dtype == np.float32
        both = np.concatenate([batch["mean"], batch["logvar"]], -1)
        same = (both[:, None, None] == moments[None]).all((3, 4, 5))  # [row, image, view]
        rows, found, views = np.nonzero(same)
        np.testing.assert_array_equal(rows, range(5))
        assert sorted(found) == list(range(5)) and batch["valid"].all()
        np.testing.assert_array_equal(batch["labels"], [[0, 0, 0, 1, 1][i] for i in found])
        seen |= set(zip(found.tolist(), views.tolist()))
    assert len(seen) == 10


def test_a_batch_is_a_pure_function(latents):
    data = opened(latents)
    whole = data.batch(5, range(4))
    again = opened(latents).batch(5, [3, 1])
    copy = pickle.loads(pickle.dumps(data.batches)).read(5, np.arange(4))
    for name in whole:
        np.testing.assert_array_equal(whole[name][[3, 1]], again[name])
        np.testing.assert_array_equal(whole[name], copy[name])


def test_evaluation_is_in_order_with_invalid_rows_at_the_end(latents):
    data = opened(latents, "test", batch_size=2)  # validation, as there is no test split
    first, last = data.iterate(0, range(2))
    np.testing.assert_array_equal(first["mean"], stored(latents, "validation", 0)[:, 0, ..., :2])
    assert last["valid"].tolist() == [True, False]
    assert not last["mean"][1].any() and not last["logvar"][1].any() and last["mean"][0].any()


def test_folders_that_do_not_fit(latents, tmp_path):
    refused("is not a folder of latents .*`lintime prepare latents IMAGES --auto", opened, tmp_path)
    copy = shutil.copytree(latents, tmp_path / "copy")
    file, _ = LatentsInfo.shard_files(copy, "train", 1)
    np.save(file, np.load(file)[:, :1])
    refused("train-00001.latents.npy or its labels are missing or damaged", opened, copy)
    info = LatentsInfo.finished(copy)
    (copy / "latents.json").write_text(dataclasses.replace(info, splits={"train": 1}).to_json())
    refused(r"holds no validation latents \(it has train\)", opened, copy, "validation")
