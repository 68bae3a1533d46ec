"""What all data sets share: the order of rows, random numbers per row, and the read-ahead iterator.

A *reader* has

    num_batches     batches of an evaluation split; None for training, which is endless
    batch_size      global rows of a batch
    read(step, rows) -> dict of arrays [R, ...], a pure function of (step, row)

and is pickled to the reader processes, so it holds paths and numbers rather than open files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

_ENDLESS = 2**62


class RowOrder:
    """Which element of a split stands in which row of which batch.

    Training elements form an endless order: every epoch is a new seeded permutation (or the split's
    own order). Element g*B + r of it is row r of batch g, so it does not depend on who reads it.

    Args:
        count: N, elements of the split.
        batch_size: B, global rows.
        seed: of the permutations; None = the split's own order.
        endless: training; otherwise every element comes once and the last batch may be partial.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int | None, endless: bool):
        self.count, self.batch_size = count, batch_size
        self.num_batches = None if endless else -(-count // batch_size)
        order = grain.MapDataset.range(count)
        if seed is not None:
            order = order.seed(seed % 2**32).shuffle()
        self.order = order.repeat() if endless else None

    def indices(self, batch: int, rows: np.ndarray) -> np.ndarray:
        """Elements in rows `rows` [R] of batch `batch`: [R] int64; N or more means there is none.

        Raises:
            IndexError: no such batch.
        """
        limit = self.num_batches
        if batch < 0 or (limit is not None and batch >= limit):
            raise IndexError(f"batch {batch} is outside the {limit} batches")
        indices = batch * self.batch_size + np.asarray(rows, np.int64)
        if self.order is not None:
            indices = np.array([self.order[int(i)] for i in indices], np.int64)
        return indices


def row_uniforms(seed: int, step: int, rows: np.ndarray, count: int) -> np.ndarray:
    """[R, count] float64 in [0, 1): each row a pure function of (seed, step, its number).

    Philox counts 256-bit blocks under a 128-bit key (Salmon et al. 2011, "Parallel random numbers:
    as easy as 1, 2, 3"): the seed is the key, the step stands in the counter's highest word and row
    r has words [r*count, (r+1)*count) of what follows. Its raw words are the same in every NumPy,
    which the methods of a Generator need not be.
    """
    rows = np.asarray(rows, np.int64)
    total = (int(rows.max()) + 1) * count if rows.size else 0
    bits = np.random.Philox(key=seed % 2**64, counter=[0, 0, 0, step]).random_raw(total)
    return (bits.reshape(-1, count)[rows] >> np.uint64(11)) * 2.0**-53


def pick(uniform: float, count: int) -> int:
    """0..count-1 with equal chances from a number in [0, 1)."""
    return min(int(uniform * count), count - 1)


def cpu_count() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Steps:
    """Random access to batches by step, as a Grain source."""

    def __init__(self, reader, rows: np.ndarray, length: int):
        self.reader, self.rows, self.length = reader, rows, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.reader.read(int(step), self.rows)

    def __repr__(self) -> str:
        return f"{type(self.reader).__name__}({self.length} steps, {len(self.rows)} rows)"


class StepDataset:
    """Batches of one split by step number.

    Attributes:
        batches: the reader.
        fingerprint: JSON-able dict; a restored run's must be equal.
        workers: reader processes; 0 = threads of this one.
        num_batches: batches of an evaluation split; None for training, which is endless.
    """

    read_ahead = 8  # batches

    def __init__(self, batches, *, fingerprint: dict, workers: int):
        self.batches, self.fingerprint, self.workers = batches, fingerprint, workers
        self.num_batches = batches.num_batches

    def batch(self, step: int, rows) -> dict[str, np.ndarray]:
        """The given global rows of batch `step`: a pure function of (data, seed, step, row).

        Args:
            step: update number (training), or number of the batch (evaluation).
            rows: [R] row numbers in 0..batch_size-1, in any order.

        Raises:
            IndexError, ValueError: no such batch, or no such row.
        """
        return self.batches.read(step, self._check_rows(rows))

    def iterate(self, start: int, rows, stop: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """batch(start, rows), batch(start + 1, rows), ... up to `stop`, read ahead by Grain.

        The same batches for any number of `workers`.
        """
        rows = self._check_rows(rows)
        end = _ENDLESS if self.num_batches is None else self.num_batches
        stop = end if stop is None else min(stop, end)
        if start >= stop:
            return
        steps = grain.MapDataset.source(_Steps(self.batches, rows, end))[start:stop]
        dataset = steps.to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=self.read_ahead)
        )
        if self.workers > 0:
            if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
            )
        iterator = iter(dataset)
        try:
            yield from iterator
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    def _check_rows(self, rows) -> np.ndarray:
        rows = np.asarray(rows, np.int64).reshape(-1)
        size = self.batches.batch_size
        if rows.size and not (0 <= rows.min() and rows.max() < size):
            raise ValueError(
                f"rows {rows.min()}..{rows.max()} are outside the batch of {size} rows "
                f"(batch_size={size}); take more of them from further steps, or open the data with "
                "a larger batch_size"
            )
        return rows
