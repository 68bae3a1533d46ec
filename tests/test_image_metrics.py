"""Figures of merit of images, each against its definition."""

import numpy as np
import pytest

from lintime.train.evaluate import statistics as stats
from tests.image_definitions import direct_precision_recall, direct_score, direct_ssim, rng


def covariance(seed, dim):
    root = rng(seed).normal(size=(dim, dim))
    return root @ root.T / dim


# ---------------------------------------------------------------- Gaussians


@pytest.mark.parametrize("cuts", [[], [1], [3, 3, 2000], list(range(1, 60))])
def test_streaming_moments_equal_the_whole(cuts):
    rows = (rng().normal(size=(2500, 7)) @ rng(1).normal(size=(7, 7)) + 1000).astype(np.float32)
    whole = stats.Moments(7)
    for piece in np.split(rows, cuts):
        whole.add(piece)
    assert whole.count == 2500
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(whole.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(exact, rowvar=False), rtol=1e-9)
    first, second = stats.Moments(7), stats.Moments(7)
    first.add(rows[:1100])
    second.add(rows[1100:])
    first.merge(second)
    assert first.count == 2500 and second.count == 1400
    np.testing.assert_allclose(first.covariance, whole.covariance, rtol=1e-9)
    first.merge(stats.Moments(7))
    np.testing.assert_allclose(first.mean, whole.mean, rtol=1e-12)


def test_moments_refuse_what_they_cannot_use():
    moments = stats.Moments(3)
    with pytest.raises(ValueError, match=r"rows of 3 values, got shape \(2, 4\)"):
        moments.add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        moments.add(np.full((2, 3), np.nan))
    moments.add(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 rows, there are 1"):
        _ = moments.covariance
    with pytest.raises(ValueError, match="cannot merge"):
        moments.merge(stats.Moments(4))


def test_frechet_distance_of_gaussians():
    dim = 9
    a, b, mean = covariance(1, dim), covariance(2, dim), rng(3).normal(size=dim)
    # Of itself: nothing. Of a shift: its squared length.
    assert stats.frechet_distance(mean, a, mean, a) == pytest.approx(0, abs=1e-12)
    assert stats.frechet_distance(mean, a, mean + 2, a) == pytest.approx(4 * dim)
    # Matrices that commute: the squared differences of standard deviations.
    rotation = np.linalg.qr(rng(4).normal(size=(dim, dim)))[0]
    s, t = rng(5).uniform(0, 2, (2, dim))
    c, d = ((rotation * x**2) @ rotation.T for x in (s, t))
    got = stats.frechet_distance(mean, c, -mean, d)
    assert got == pytest.approx(4 * mean @ mean + np.sum((s - t) ** 2))
    # Matrices that do not: the published formula with eigenvalues of the product.
    root_trace = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    wanted = np.trace(a) + np.trace(b) - 2 * root_trace
    assert stats.frechet_distance(mean, a, mean, b) == pytest.approx(wanted)
    assert stats.frechet_distance(mean, b, mean, a) == pytest.approx(wanted)
    assert wanted > 0.1


def test_frechet_distance_of_singular_covariances():
    # Fewer rows than dimensions: the sets differ by a shift only.
    rows = rng().normal(size=(5, 40))
    cov = np.cov(rows, rowvar=False)
    mean = rows.mean(0)
    assert stats.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-9)
    assert stats.frechet_distance(mean, cov, mean + 1, cov) == pytest.approx(40)
    # Two such sets: the sum of singular values of the products of their centred rows.
    others = rng(1).normal(size=(7, 40)) * 2
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (rows, others))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    wanted = np.sum(a**2) + np.sum(b**2) - 2 * overlap
    got = stats.frechet_distance(mean, cov, mean, np.cov(others, rowvar=False))
    assert got == pytest.approx(wanted, rel=1e-6)
    point = np.zeros((40, 40))
    got = stats.frechet_distance(np.zeros(40), point, np.zeros(40), cov)
    assert got == pytest.approx(np.trace(cov))
    assert stats.frechet_distance(np.ones(40), point, np.ones(40), point) == 0


def test_frechet_distance_refuses_what_is_no_gaussian():
    good = (np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="do not fit together"):
        stats.frechet_distance(*good, np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="not finite"):
        stats.frechet_distance(*good, np.zeros(2), np.full((2, 2), np.inf))
    with pytest.raises(ValueError, match="not a covariance: eigenvalues from -1"):
        stats.frechet_distance(*good, np.zeros(2), np.diag([1.0, -1.0]))
    with pytest.raises(ValueError, match="not symmetric"):
        stats.frechet_distance(*good, np.zeros(2), np.array([[1, 0.9], [0, 1]]))


# ---------------------------------------------------------------- Inception score


@pytest.mark.parametrize("cuts", [[], [1, 7, 8], [50], [20, 40, 41]])
def test_inception_score_is_its_definition(cuts):
    logits = rng().normal(size=(65, 11)) * 2
    score = stats.InceptionScore(split_size=20)  # three whole splits and a rest of five
    for piece in np.split(logits, cuts):
        score.add(piece)
    assert score.value == pytest.approx(direct_score(logits, 20))
    assert score.value != pytest.approx(direct_score(logits, 65), rel=1e-3)


def test_inception_score_bounds():
    same, sure = stats.InceptionScore(), stats.InceptionScore()
    same.add(np.tile(rng().normal(size=5), (8, 1)))
    assert same.value == pytest.approx(1)
    sure.add(1e4 * np.eye(5, dtype=np.float32)[np.arange(10) % 5])  # probabilities of exactly 0
    assert sure.value == pytest.approx(5)
    with pytest.raises(ValueError, match="at least one image"):
        _ = stats.InceptionScore().value


# ---------------------------------------------------------------- precision and recall


@pytest.mark.parametrize("block, k", [(16, 1), (16, 3), (1000, 3)])
def test_precision_recall_is_its_definition(block, k):
    reference = rng().normal(size=(50, 6)) + 30
    samples = rng(1).normal(size=(37, 6)) * 0.8 + 30.4
    got = stats.precision_recall(reference, samples, k=k, block=block)
    assert got == pytest.approx(direct_precision_recall(reference, samples, k))
    assert 0 < got[1] < got[0] < 1  # narrow samples: precise, but much is missed


def test_precision_recall_at_the_ends():
    points = rng().normal(size=(40, 4)).astype(np.float32)
    assert stats.precision_recall(points, points[::-1]) == (1, 1)
    assert stats.precision_recall(points, points + 100) == (0, 0)
    collapsed = np.tile(points[:1], (40, 1))
    precision, recall = stats.precision_recall(points, collapsed)
    assert precision == 1 and recall <= 1 / 40
    with pytest.raises(ValueError, match="more than 3 points a set, there are 3"):
        stats.precision_recall(points, points[:3])
    with pytest.raises(ValueError, match="do not fit"):
        stats.precision_recall(points, points[:, :2])


# ---------------------------------------------------------------- pairs


def test_psnr():
    a = np.zeros((3, 4, 5, 3))
    b = a + np.array([0, 1, 25.5])[:, None, None, None]
    got = stats.psnr(a, b, 255)
    np.testing.assert_allclose(got, [np.inf, 20 * np.log10(255), 20])
    np.testing.assert_allclose(stats.psnr(a / 255, b / 255, 1), got, rtol=1e-6)
    with pytest.raises(ValueError, match="shapes"):
        stats.psnr(a, b[:2], 255)


def test_ssim_is_its_definition():
    a = rng().integers(0, 256, (3, 14, 17, 2)).astype(np.uint8)
    a[0] = a[0] // 64 + 200  # little contrast on a bright ground: where rounding would show
    b = np.clip(a + rng(1).normal(0, [[[[2]]], [[[30]]], [[[90]]]], a.shape), 0, 255).astype("u1")
    wanted = [
        np.mean([direct_ssim(a[i, ..., c] * 1.0, b[i, ..., c] * 1.0, 255) for c in range(2)])
        for i in range(3)
    ]
    np.testing.assert_allclose(stats.ssim(a, b, 255), wanted, atol=3e-6)
    assert wanted[2] < wanted[1] < 0.99
    np.testing.assert_allclose(stats.ssim(a, a, 255), 1, atol=1e-6)
    half = stats.ssim(a / 255, b / 255, 1.0)
    np.testing.assert_allclose(half, wanted, atol=3e-6)
    with pytest.raises(ValueError, match="11x11 pixels, got 10x17"):
        stats.ssim(a[:, :10], b[:, :10], 255)
