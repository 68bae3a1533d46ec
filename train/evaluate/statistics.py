"""Distances between sets of images: Fréchet distance, Inception score, precision and recall of
features; PSNR and SSIM of pairs. Plain functions of arrays; nothing here knows a network or a file.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

SCORE_SPLIT = 5000  # images per split of the Inception score, as in ADM's evaluator
NEIGHBOURS = 3
SSIM_WINDOW = 11
_PENDING = 1024  # rows gathered before they enter a covariance: large products are faster


# ---------------------------------------------------------------- Gaussians


class Moments:
    """Mean and covariance of rows that arrive in pieces; float64, any order and any cut.

    Keeps n, the mean m and the scatter S = sum (x - m)(x - m)^T. Pieces a and b join by
    m = m_a + (n_b / n) d,  S = S_a + S_b + (n_a n_b / n) d d^T,  d = m_b - m_a
    (Chan, Golub, LeVeque 1979), which does not cancel as sums of squares do.
    """

    def __init__(self, dim: int):
        self._count = 0
        self._mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))
        self._pending: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Take in [n, dim] rows of any float dtype.

        Raises:
            ValueError: another width, or a value that is not finite.
        """
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != len(self._mean):
            raise ValueError(f"expected rows of {len(self._mean)} values, got shape {rows.shape}")
        if not np.isfinite(rows).all():
            raise ValueError("features are not finite; the images or the weights are damaged")
        for start in range(0, len(rows), _PENDING):
            self._pending.append(rows[start : start + _PENDING])
            if sum(map(len, self._pending)) >= _PENDING:
                self._flush()

    def merge(self, other: Moments) -> None:
        """Take in all rows that `other` has seen; `other` stays as it is.

        Raises:
            ValueError: rows of another width.
        """
        if other._mean.shape != self._mean.shape:
            raise ValueError(f"cannot merge {len(other._mean)} values a row with {len(self._mean)}")
        other._flush()
        self._flush()
        self._join(other._count, other._mean, other._scatter)

    def _flush(self) -> None:
        if not self._pending:
            return
        rows = np.concatenate(self._pending).astype(np.float64)
        self._pending = []
        if len(rows):
            mean = rows.mean(0)
            rows -= mean
            self._join(len(rows), mean, rows.T @ rows)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not count:
            return
        total = self._count + count
        difference = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(difference, difference * (self._count * count / total))
        self._mean += difference * (count / total)
        self._count = total

    @property
    def count(self) -> int:
        """Rows seen."""
        return self._count + sum(map(len, self._pending))

    @property
    def mean(self) -> np.ndarray:
        """[dim] float64."""
        self._flush()
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """[dim, dim] float64, divided by n - 1.

        Raises:
            ValueError: fewer than two rows.
        """
        self._flush()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, there are {self._count}")
        return self._scatter / (self._count - 1)


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): squared 2-Wasserstein distance of two
    Gaussians; on Inception's pool the FID (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    With C = R^T R from eigendecompositions, tr (C_a C_b)^(1/2) is the sum of the singular values
    of R_a R_b^T. This needs no square root of a matrix that is not symmetric, so singular
    covariances (fewer rows than dimensions) need no offset on their diagonal and nothing becomes
    complex.

    Args:
        mean_a, mean_b: [D].
        covariance_a, covariance_b: [D, D], symmetric and positive semi-definite; eigenvalues
            below zero by rounding count as zero.

    Returns:
        A number that is not negative (rounding below zero is cut off).

    Raises:
        ValueError: shapes that differ, values that are not finite, or a matrix that is no
            covariance.
    """
    arrays = [np.asarray(a, np.float64) for a in (mean_a, covariance_a, mean_b, covariance_b)]
    mean_a, covariance_a, mean_b, covariance_b = arrays
    dim = len(mean_a)
    shapes = [a.shape for a in arrays]
    if shapes != [(dim,), (dim, dim)] * 2:
        raise ValueError(f"means and covariances do not fit together: shapes {shapes}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("means or covariances are not finite")
    overlap = np.linalg.svd(_root(covariance_a) @ _root(covariance_b).T, compute_uv=False).sum()
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(float(np.sum((mean_a - mean_b) ** 2) + spread), 0.0)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with R^T R = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -1e-4 * max(values[-1], 0) or not np.allclose(
        covariance, covariance.T, rtol=1e-4, atol=1e-6 * max(values[-1], 0)
    ):
        raise ValueError(
            f"not a covariance: eigenvalues from {values[0]:.3g} to {values[-1]:.3g}, or not "
            "symmetric"
        )
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


# ---------------------------------------------------------------- Inception score


class InceptionScore:
    """exp(mean_i KL(p(y | x_i) || p(y))), averaged over splits of the images in order.

    Salimans et al. 2016, arXiv 1606.03498, section 4; splits as in ADM's evaluator: 5,000 images
    each, the last one what remains. KL = E[sum p log p] - sum q log q with q = E[p], so logits
    can be taken in as they come and none are kept. Zero probabilities contribute zero.
    """

    def __init__(self, split_size: int = SCORE_SPLIT):
        self._size = split_size
        self._scores: list[float] = []
        self._start()

    def _start(self) -> None:
        self._count, self._sum, self._negative_entropy = 0, 0.0, 0.0

    def add(self, logits: np.ndarray) -> None:
        """Take in [n, classes] logits."""
        logits = np.asarray(logits, np.float64)
        while len(logits):
            part, logits = np.split(logits, [self._size - self._count])
            log_p = part - part.max(1, keepdims=True)
            log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
            p = np.exp(log_p)
            self._sum = self._sum + p.sum(0)
            self._negative_entropy += float((p * log_p).sum())
            self._count += len(part)
            if self._count == self._size:
                self._scores.append(self._score())
                self._start()

    def _score(self) -> float:
        q = self._sum / self._count
        marginal = float(np.sum(q * np.log(np.where(q > 0, q, 1))))
        return float(np.exp(self._negative_entropy / self._count - marginal))

    @property
    def value(self) -> float:
        """Mean over the splits: between 1 and the number of classes.

        Raises:
            ValueError: no images.
        """
        scores = self._scores + ([self._score()] if self._count else [])
        if not scores:
            raise ValueError("an Inception score needs at least one image")
        return float(np.mean(scores))


# ---------------------------------------------------------------- precision and recall


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, *, k: int = NEIGHBOURS, block: int = 8192
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1, 2).

    The manifold of a set is the union of balls around its points, each as large as the distance
    to the point's k-th nearest neighbour in the set (itself not counted). Precision is the share
    of samples within the manifold of the reference, recall the share of the reference within
    that of the samples. ADM's evaluator takes k = 3 and computes distances in float16 where they
    are finite; here they are float32, of features centred on the reference's mean.

    Args:
        reference: [N, D] features.
        samples: [M, D] features.
        block: rows and columns of the distances that exist at a time (8192 x 8192: 256 MiB).

    Returns:
        (precision, recall).

    Raises:
        ValueError: a set of k points or fewer, or features of different widths.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features do not fit together: {reference.shape}, {samples.shape}")
    few = min(len(reference), len(samples))
    if few <= k:
        raise ValueError(f"{k} nearest neighbours need more than {k} points a set, there are {few}")
    centre = reference.mean(0, dtype=np.float64)
    reference = (reference - centre).astype(np.float32)
    samples = (samples - centre).astype(np.float32)
    precision = _share_covered(samples, reference, squared_radii(reference, k, block), block)
    recall = _share_covered(reference, samples, squared_radii(samples, k, block), block)
    return precision, recall


def squared_radii(points: np.ndarray, k: int, block: int) -> np.ndarray:
    """[N] squared distance of every point of [N, D] to its k-th nearest other point."""
    out = []
    for rows, start in _blocks(points, block):
        nearest = np.full((len(rows), k), np.inf, np.float32)
        for columns, at in _blocks(points, block):
            nearest = _nearest(rows, columns, nearest, start - at)
        out.append(np.asarray(nearest)[:, -1])
    return np.concatenate(out)


def _share_covered(points, centres, radii, block) -> float:
    covered = 0
    for rows, _ in _blocks(points, block):
        inside = np.zeros(len(rows), bool)
        for columns, at in _blocks(centres, block):
            inside = inside | _inside(rows, columns, radii[at : at + len(columns)])
        covered += int(np.sum(inside))
    return covered / len(points)


def _blocks(array: np.ndarray, size: int):
    for start in range(0, len(array), size):
        yield array[start : start + size], start


def _squared_distances(a: Array, b: Array) -> Array:
    product = jnp.matmul(a, b.T, precision=lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(a * a, 1)[:, None] - 2 * product + jnp.sum(b * b, 1), 0)


@jax.jit
def _nearest(rows: Array, columns: Array, nearest: Array, offset) -> Array:
    """The k smallest of `nearest` [n, k] and the distances to `columns`, ascending. Row i is
    column i + offset, a distance that does not count."""
    distances = _squared_distances(rows, columns)
    itself = jnp.arange(len(rows))[:, None] + offset == jnp.arange(len(columns))
    distances = jnp.where(itself, jnp.inf, distances)
    candidates = jnp.concatenate([nearest, distances], 1)
    return -lax.top_k(-candidates, nearest.shape[1])[0]


@jax.jit
def _inside(rows: Array, centres: Array, radii: Array) -> Array:
    return jnp.any(_squared_distances(rows, centres) <= radii, 1)


# ---------------------------------------------------------------- pairs of images


def psnr(a: np.ndarray, b: np.ndarray, data_range: float) -> np.ndarray:
    """[B] float64: 10 log10(data_range^2 / mean squared difference) of each pair of images
    [B, H, W, C]; infinite for equal images.

    Raises:
        ValueError: shapes differ.
    """
    a, b = _pair(a, b)
    error = np.mean((a.astype(np.float64) - b) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(data_range**2 / error)


def ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> np.ndarray:
    """[B] float32: structural similarity of each pair of images [B, H, W, C], mean over channels.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image Quality Assessment: From Error Visibility to
    Structural Similarity", equation 13 with their settings: means, variances and covariance
    under a Gaussian window of 11 x 11 pixels with sigma 1.5 (weights sum to one), K1 = 0.01,
    K2 = 0.03, averaged over all windows that lie wholly within the image.

    Raises:
        ValueError: shapes differ, or images smaller than a window.
    """
    a, b = _pair(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, "
            f"got {a.shape[1]}x{a.shape[2]}"
        )
    return np.asarray(_ssim(a / np.float32(data_range), b / np.float32(data_range)))


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"expected two batches [B, H, W, C], got shapes {a.shape} and {b.shape}")
    return a.astype(np.float32), b.astype(np.float32)


@jax.jit
def _ssim(a: Array, b: Array) -> Array:
    """As `ssim`, for a data range of 1."""
    # Variances are differences of squares: small means keep them exact.
    ground = jnp.mean((a + b) / 2, (1, 2), keepdims=True)
    a, b = a - ground, b - ground
    at = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(at**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(x):
        for axis in (1, 2):
            size = x.shape[axis] - SSIM_WINDOW + 1
            x = sum(w * lax.slice_in_dim(x, i, i + size, axis=axis) for i, w in enumerate(window))
        return x

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + ground, mean_b + ground
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return jnp.mean(similarity, (1, 2, 3))
