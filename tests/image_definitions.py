"""Figures of merit of images written out as their definitions say, for comparison."""

import numpy as np


def rng(seed=0):
    """Random numbers of a fixed seed."""
    return np.random.default_rng(seed)


def direct_score(logits, split):
    """Inception score of [N, classes] logits over splits of `split` rows."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        kl = np.sum(part * (np.log(part) - np.log(part.mean(0))), 1)
        scores.append(np.exp(kl.mean()))
    return np.mean(scores)


def direct_precision_recall(reference, samples, k):
    """Improved precision and recall from all distances at once."""

    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    def share(points, centres):
        radius = np.sort(distances(centres, centres), 1)[:, k]  # the 0th is the point itself
        return np.mean((distances(points, centres) <= radius).any(1))

    return share(samples, reference), share(reference, samples)


def direct_ssim(a, b, data_range):
    """One channel, window by window."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            top = (2 * mx * my + c1) * (2 * cov + c2)
            values.append(top / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)
