"""Evaluation of images end to end: ADM's file layout, figures, and what is left out and why."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lintime.model.nets import inception as network
from lintime.train.errors import UserError
from lintime.train.evaluate import images as evaluation, reference as files, statistics as stats
from tests import inception_vectors
from tests.image_definitions import direct_precision_recall, direct_score, rng

# ---------------------------------------------------------------- files


def pictures(count, size=6, seed=0):
    return rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def test_samples_are_written_as_the_evaluator_reads_them(tmp_path):
    images, path = pictures(7), tmp_path / "new" / "samples.npz"
    assert files.write_samples_npz(path, images, labels=np.arange(7)) == 7
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(file["arr_0"], images, strict=True)
        np.testing.assert_array_equal(file["arr_1"], np.arange(7))
    asked = []

    def batches():
        for start in range(0, 7, 3):
            asked.append(start)
            yield images[start : start + 3]

    assert files.write_samples_npz(path, batches(), count=5) == 5
    assert asked == [0, 3]
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], images[:5])
    got = list(files.read_images(path, 2))
    assert [len(g) for g in got] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(got), images[:5])
    assert [p.name for p in path.parent.iterdir()] == ["samples.npz"]


def test_bad_samples_leave_nothing_behind(tmp_path):
    path = tmp_path / "samples.npz"
    for images, keywords, message in [
        (pictures(3), {"labels": np.arange(2)}, r"3 images need as many labels, got shape \(2,\)"),
        (pictures(3) / 255, {}, "must be uint8"),
        (iter([pictures(3)]), {"count": 4}, "to hold 4 images, only 3 came"),
        (iter([pictures(3), pictures(3, 5)]), {"count": 6}, "of one size"),
        (iter([pictures(3)]), {}, "at least 1, got None"),
    ]:
        with pytest.raises(UserError, match=message):
            files.write_samples_npz(path, images, **keywords)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.write_samples_npz(tmp_path / "file" / "x.npz", pictures(1))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reference_of_images_and_statistics(tmp_path, save):
    path, images = tmp_path / "reference.npz", pictures(5)
    full = {
        "arr_0": images,
        "mu": np.ones(4),
        "sigma": np.eye(4),
        "mu_s": np.ones(3, np.float32),
        "sigma_s": np.eye(3, dtype=np.float32),
    }
    save(path, **full, other=np.arange(3))
    reference = files.read_reference(path)
    assert reference.image_shape == (5, 6, 6, 3)
    assert set(reference.statistics) == {"fid", "sfid"}
    np.testing.assert_array_equal(reference.statistics["sfid"].covariance, np.eye(3))
    assert reference.statistics["sfid"].mean.dtype == np.float64
    np.testing.assert_array_equal(np.concatenate(list(reference.images(3))), images)
    assert reference.sha256 == files.sha256_of(path) and len(reference.sha256) == 64
    save(path, arr_0=images)
    assert files.read_reference(path).statistics == {}
    save(path, mu=full["mu"], sigma=full["sigma"])
    reference = files.read_reference(path)
    assert reference.image_shape is None and set(reference.statistics) == {"fid"}


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "reference.npz"

    def refused(message, **arrays):
        if arrays:
            np.savez(path, **arrays)
        with pytest.raises(UserError, match=message) as caught:
            files.read_reference(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    refused("is not there")
    path.write_bytes(b"no archive")
    refused("damaged or no .npz file")
    refused(r"holds images, labels; a reference", images=pictures(2), labels=np.arange(2))
    refused(r"arr_0 is float64 \(2, 6, 6, 3\)", arr_0=pictures(2) / 255)
    refused(r"arr_0 is uint8 \(2, 3, 6, 6\)", arr_0=pictures(2).transpose(0, 3, 1, 2).copy())
    refused("in Fortran order", arr_0=np.asfortranarray(pictures(2)))
    refused("has mu but not both of mu, sigma", mu=np.ones(3))
    refused(r"mu has shape \(3,\) and sigma \(4, 4\)", mu=np.ones(3), sigma=np.eye(4))
    refused("sigma is not an array of finite", mu=np.ones(2), sigma=np.full((2, 2), np.nan))
    refused("damaged", mu=np.array([{}], object), sigma=np.eye(1))
    np.savez(path, mu=np.ones(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="holds no images arr_0"):
        next(files.read_images(path, 1))
    np.savez(path, arr_0=pictures(50))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("damaged")


# ---------------------------------------------------------------- whole evaluations

CLASSES, DIM, SPATIAL = 6, 5, (2, 2, 3)


def fake_features(images):
    """Features of made-up weights: cheap, and different for different images."""
    flat = images.reshape(len(images), -1) / 255.0
    sizes = (DIM, int(np.prod(SPATIAL)), CLASSES)
    pool, spatial, logits = (
        np.tanh(flat @ rng(i).normal(size=(flat.shape[1], n)) / 3) for i, n in enumerate(sizes)
    )
    return network.InceptionFeatures(
        pool.astype(np.float32), spatial.reshape(-1, *SPATIAL).astype(np.float32), logits, logits
    )


FAKE = evaluation.Inception(fake_features, "f" * 64)


def reference_of(tmp_path, **arrays):
    np.savez(tmp_path / "reference.npz", **arrays)
    return files.read_reference(tmp_path / "reference.npz")


def judge(images, reference, count=None, inception=FAKE, batch=7, **keywords):
    batches = (images[i : i + batch] for i in range(0, len(images), batch))
    return evaluation.evaluate_generation(
        batches,
        inception=inception,
        reference=reference,
        num_images=count or len(images),
        progress=False,
        **keywords,
    )


def test_generation_against_images(tmp_path):
    ref, images = pictures(40), pictures(30, seed=1) // 2
    reference = reference_of(tmp_path, arr_0=ref)
    result = judge(images, reference, batch_size=9)
    a, b = fake_features(images), fake_features(ref)
    for kind, part in (("fid", "pool"), ("sfid", "spatial")):
        x, y = (getattr(f, part).reshape(len(f.pool), -1).astype(np.float64) for f in (a, b))
        wanted = stats.frechet_distance(
            x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
        )
        assert result[kind] == pytest.approx(wanted) and wanted > 0.01
    assert result["inception_score"] == pytest.approx(direct_score(a.score_logits, 5000))
    wanted = direct_precision_recall(b.pool, a.pool, 3)
    assert (result["precision"], result["recall"]) == pytest.approx(wanted)
    assert result["num_images"] == 30
    assert len(result["notes"]) == 1 and "published figures use 50,000" in result["notes"][0]
    protocol = result["protocol"]
    assert protocol == evaluation.Protocol(
        num_images=30,
        image_size="6x6",
        resize="TensorFlow 1 bilinear to 299x299",
        inception="f" * 64,
        reference=reference.sha256,
        reference_images=40,
    )
    assert "30 images of 6x6" in str(protocol) and reference.sha256[:12] in str(protocol)
    json.dumps(dataclasses.asdict(protocol))
    itself = judge(ref, reference)
    assert itself["fid"] == pytest.approx(0, abs=1e-9) and itself["precision"] == 1


def test_generation_prefers_statistics_and_stops_in_time(tmp_path):
    statistics = {"mu": np.ones(DIM), "sigma": np.eye(DIM)}
    statistics |= {"mu_s": np.ones(12), "sigma_s": np.eye(12)}
    images = pictures(30)
    half = judge(images[:20], reference_of(tmp_path, **statistics))
    assert "precision" not in half and "recall" not in half
    assert any("left out precision, recall" in note for note in half["notes"])
    asked = []

    def batches():
        for start in range(0, 30, 5):
            asked.append(start)
            yield images[start : start + 5] / np.float32(127.5) - np.float32(1)

    both = evaluation.evaluate_generation(
        batches(),
        inception=FAKE,
        reference=reference_of(tmp_path, arr_0=pictures(9, 8), **statistics),
        num_images=20,
        progress=False,
    )
    assert asked == [0, 5, 10, 15]
    assert both["fid"] == pytest.approx(half["fid"]) and half["fid"] > 1
    assert both["sfid"] == pytest.approx(half["sfid"])
    assert 0 <= both["recall"] <= 1
    assert any("samples are 6x6, the reference's images 8x8" in note for note in both["notes"])


def test_generation_says_what_is_left_out(tmp_path):
    def never():
        raise AssertionError("no image may be drawn for nothing")
        yield

    result = evaluation.evaluate_generation(
        never(), inception=None, reference=None, num_images=10, progress=False
    )
    assert set(result) == {"num_images", "notes", "protocol"}
    (note,) = result["notes"]
    assert "no Inception weights" in note and network.PUBLISHED in note and "\n" not in note
    assert str(result["protocol"]) == "no images were judged"
    alone = judge(pictures(5), None)
    assert set(alone) == {"inception_score", "num_images", "notes", "protocol"}
    assert "no reference file" in alone["notes"][0]
    few = judge(pictures(3), reference_of(tmp_path, arr_0=pictures(9)))
    assert "precision" not in few and any("3 images are too few" in n for n in few["notes"])
    pool_only = judge(pictures(5), reference_of(tmp_path, mu=np.ones(DIM), sigma=np.eye(DIM)))
    assert "fid" in pool_only and any("left out sfid" in n for n in pool_only["notes"])


def test_generation_errors(tmp_path):
    with pytest.raises(UserError, match="8 images were asked for, only 5 came"):
        judge(pictures(5), None, count=8)
    with pytest.raises(UserError, match="at least 2"):
        judge(pictures(5), None, count=1)
    with pytest.raises(UserError, match="have 3 features, Inception gives 5"):
        judge(pictures(5), reference_of(tmp_path, mu=np.ones(3), sigma=np.eye(3)))
    with pytest.raises(UserError, match="images of 6x6 and 7x7"):
        evaluation.evaluate_generation(
            iter([pictures(3), pictures(3, 7)]),
            inception=FAKE,
            reference=None,
            num_images=6,
            progress=False,
        )
    with pytest.raises(ValueError, match="int64"):
        judge(pictures(5).astype(int), None)


def test_reconstruction():
    originals = pictures(12, 16)
    noise = rng(1).normal(0, 20, originals.shape)
    copies = np.clip(originals + noise, 0, 255).astype(np.uint8)

    def run(batch, floats=False, **keywords):
        to_model = lambda x: x / np.float32(127.5) - np.float32(1) if floats else x
        pairs = (
            (to_model(originals[i : i + batch]), to_model(copies[i : i + batch]))
            for i in range(0, 12, batch)
        )
        return evaluation.evaluate_reconstruction(pairs, progress=False, **keywords)

    result = run(5, inception=FAKE)
    assert result["psnr"] == pytest.approx(np.mean(stats.psnr(originals, copies, 255)))
    assert result["ssim"] == pytest.approx(np.mean(stats.ssim(originals, copies, 255)))
    error = (originals.astype(float) - copies) / 255
    assert result["mse"] == pytest.approx(np.mean(error**2))
    a, b = (fake_features(x).pool.astype(np.float64) for x in (originals, copies))
    wanted = stats.frechet_distance(
        a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
    )
    assert result["rfid"] == pytest.approx(wanted, rel=1e-6)
    again = run(4, floats=True)
    assert {n: again[n] for n in ("psnr", "ssim", "mse")} == pytest.approx(
        {n: result[n] for n in ("psnr", "ssim", "mse")}, rel=1e-5
    )
    assert "rfid" not in again and "no Inception weights" in again["notes"][0]
    assert run(4, num_images=6)["num_images"] == 6
    with pytest.raises(UserError, match="only 12 came"):
        run(4, num_images=13)
    small = evaluation.evaluate_reconstruction(iter([(pictures(2), pictures(2))]), progress=False)
    assert "ssim" not in small and "psnr" in small and any("ssim" in n for n in small["notes"])
    with pytest.raises(UserError, match="the data is empty"):
        evaluation.evaluate_reconstruction(iter([]), progress=False)
    with pytest.raises(UserError, match="originals have shape"):
        evaluation.evaluate_reconstruction(iter([(pictures(2), pictures(3))]), progress=False)


def test_floats_become_the_bytes_of_their_files():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        evaluation.to_uint8(levels / np.float32(127.5) - np.float32(1)), levels
    )
    np.testing.assert_array_equal(evaluation.to_uint8(np.array([-3.0, 3.0])), [0, 255])
    assert evaluation.to_uint8(levels) is levels


def test_load_inception_on_several_devices(tmp_path):
    path = tmp_path / "inception.npz"
    np.savez(path, **inception_vectors.published_arrays())
    devices = jax.local_devices()[:2]
    inception = evaluation.load_inception(path, batch_size=len(devices), devices=devices)
    assert inception.sha256 == files.sha256_of(path)
    images = pictures(3, 20)  # a whole batch and a padded one
    features = inception.features(images)
    assert [a.shape for a in features] == [(3, 2048), (3, 17, 17, 7), (3, 1008), (3, 1008)]
    assert all(isinstance(a, np.ndarray) for a in features)
    params = network.inception_from_reference(inception_vectors.published_arrays())
    alone = jax.jit(network.inception_features)(params, images[2:])
    for got, wanted in zip(features, alone):
        np.testing.assert_allclose(got[2:], wanted, rtol=1e-4, atol=1e-4)


def test_weights_of_another_network(tmp_path):
    path = tmp_path / "weights.npz"
    with pytest.raises(UserError, match="is not there"):
        evaluation.load_inception(path)
    np.savez(path, fc=np.zeros(3))
    with pytest.raises(UserError, match="472 missing .*; 1 unknown .fc.") as caught:
        evaluation.load_inception(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        evaluation.load_inception(path)
