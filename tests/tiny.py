"""A run small enough to train in seconds, for the tests of the training core."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lintime.model.nets.transformer_vq import TransformerVQConfig
from lintime.train import loop
from lintime.train.checkpoint import Checkpoints
from lintime.train.config_files import save_config
from lintime.train.errors import UserError
from lintime.train.override import apply_overrides
from lintime.train.schema import Checkpoint, Data, Eval, Log, Optim, Run, Sample
from lintime.train.step import init_state
from lintime.train.tasks.table import make_task

NET = TransformerVQConfig(
    d_model=16, n_layer=1, d_k=8, d_v=16, n_code=8, block_len=4, mem_len=4, commit_weight=0.1
)
CLOCKS = (
    "tokens_per_s",
    "images_per_s",
    "videos_per_s",
    "step_time",
    "mfu",
)  # differ from run to run


@contextlib.contextmanager
def quick():
    """Compile fast rather than well, the same program once; draw no curves."""
    options = {
        "jax_disable_most_optimizations": True,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        options |= {"jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir or folder}
        before = {name: getattr(jax.config, name, False) for name in options}
        patch.setattr(loop, "plot_curves", lambda run_dir: None)
        compilation_cache.reset_cache()
        try:
            for name, value in options.items():
                jax.config.update(name, value)
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def write_text(path: pathlib.Path, repeats: int = 60) -> pathlib.Path:
    """A text file with some regularity and several lengths of words."""
    words = "the quick brown fox jumps over the lazy dog while linear time goes by. ".split(" ")
    lines = (" ".join(words[i % 5 :] + words[: i % 3]) for i in range(repeats))
    path.write_text("\n".join(lines))
    return path


def tiny_run(text: pathlib.Path, *overrides: str) -> Run:
    """8 rows of 16 tokens, two updates to a sequence, a metric line for every update."""
    run = Run(
        net=NET,
        data=Data(path=str(text), sequence_len=32, update_len=16),
        optim=Optim(learning_rate=1e-2, warmup=2, clip=1.0),
        checkpoint=Checkpoint(every=0),
        eval=Eval(every=0, batches=1),
        sample=Sample(length=4),
        log=Log(every=1),
        batch_size=8,
        steps=4,
    )
    return apply_overrides(run, overrides)


def train_lines(run: Run, folder, **kwargs) -> list[dict]:
    """Train, and return the lines of metrics.jsonl without wall-clock figures."""
    loop.train(run, folder, **kwargs)
    return read_lines(folder)


def read_lines(folder) -> list[dict]:
    lines = pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in CLOCKS} for x in lines]


def values(lines: list[dict], key: str) -> list[float]:
    return [line[key] for line in lines if key in line]


def abstract_state(run: Run, device=None):
    """ShapeDtypeStructs of the state on one device, as checkpoints hold it."""
    task, place = make_task(run), jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
    shapes = jax.eval_shape(lambda k: init_state(task, run, k), jax.random.key(0))
    fixed = task.fixed_stats()
    shapes = shapes.replace(stats={k: v for k, v in shapes.stats.items() if k not in fixed})
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes)


def saved_state(run: Run, folder, step: int | None = None):
    """The newest saved state (or that of `step`) as NumPy arrays."""
    checkpoints = Checkpoints(folder)
    step = checkpoints.latest_step() if step is None else step
    state = checkpoints.restore(abstract_state(run), step)
    checkpoints.close()
    return jax.tree.map(np.asarray, state)


def assert_close(actual, expected, rtol=2e-4, atol=2e-5):
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, rtol, atol, err_msg=str(path)),
        actual, expected,
    )  # fmt: skip


def assert_same(actual, expected):
    """Bit for bit."""
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_array_equal(a, b, err_msg=str(path), strict=True),
        actual, expected,
    )  # fmt: skip


def write_config(run: Run, folder: pathlib.Path) -> pathlib.Path:
    """A config file of the user's that holds exactly `run`."""
    save_config(run, folder / "run.json")
    path = folder / "tiny.py"
    path.write_text(
        "from pathlib import Path\n"
        "from lintime.train.config_files import read_config\n"
        "config = read_config(Path(__file__).with_name('run.json'))\n"
    )
    return path


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of this process with another number of CPU devices, for a child process."""
    option = "--xla_force_host_platform_device_count="
    rest = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(option)]
    return " ".join([*rest, f"{option}{devices}"])


def command(*arguments, devices: int = 1, cache=None, **kwargs) -> subprocess.Popen:
    """`lintime ...` in a process of its own on the CPU; its output is piped as text.

    Commands that are given the same folder `cache` compile the same program once.
    """
    environment = os.environ.copy()
    environment.pop("JAX_NUM_PROCESSES", None)
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster
        "PYTHONUNBUFFERED": "1",
    }
    if cache:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    return subprocess.Popen(
        [sys.executable, "-m", "lintime.train.cli", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs,
    )  # fmt: skip


def refused(words, function, *arguments, **options) -> str:
    """The message of the UserError that a call raises, which is one line and has these words."""
    with pytest.raises(UserError, match=words) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
