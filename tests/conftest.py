"""Test environment: 8 host devices on the CPU, TPU compilation without a TPU, golden vectors.

Everything is set by default only: JAX_PLATFORMS=tpu or cuda runs the suite on real devices.
"""

import atexit
import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile

# Commands, notebooks and workers import jax anew: 5 s without bytecode, 1.5 s with it.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None) and "PYTHONPYCACHEPREFIX" not in os.environ:
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = tempfile.mkdtemp(prefix="bytecode")
    sys.dont_write_bytecode = False
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += " --xla_force_host_platform_device_count=8"
    # The older loop emitters compile a training step in half the time. jaxlib 0.12 has no such
    # choice, and XLA stops at flags that it does not know.
    if importlib.metadata.version("jaxlib").startswith("0.10.") and "fusion_emitters" not in flags:
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags.strip()
    # Most tests compile more than they compute. Child processes inherit this.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # jax 0.10.2 sizes a thread pool by this; the TPU interpreter deadlocks if it is not above 8.
    os.environ.setdefault("NPROC", "16")
    # libtpu as a compiler only: quiet, no metadata server, several processes at once, no log files.
    # Never set on a machine with TPUs.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
os.environ.setdefault("MPLBACKEND", "agg")
# The processes of one run (of pytest -n 2, the commands they start) compile the same program once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled = tempfile.mkdtemp(prefix="compiled")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pathlib

import jax
import pytest
from absl import flags as absl_flags

pytest.register_assert_rewrite("tests.kernel_base", "tests.aot")

gc.set_threshold(50_000, 20, 100)  # tracing makes many objects and little garbage

if not absl_flags.FLAGS.is_parsed():
    absl_flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for parsed flags


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Compiled programs of all files add up to many gigabytes: past three they are dropped."""
    yield
    pages = pathlib.Path("/proc/self/statm")
    if pages.exists() and int(pages.read_text().split()[1]) * 4096 > 3 * 2**30:
        jax.clear_caches()


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Folder of golden test vectors (one folder per system), named by LINTIME_GOLDEN."""
    name = os.environ.get("LINTIME_GOLDEN")
    if not name:
        pytest.skip("LINTIME_GOLDEN is not set: it names the folder of golden test vectors")
    path = pathlib.Path(name).resolve()
    assert path.is_dir(), f"LINTIME_GOLDEN={name} is not a folder"
    return path


@pytest.fixture
def cli(capfd):
    """cli(*words) -> stdout; cli.refused(*words) -> the one line."""

    def call(*words, status=0):
        capfd.readouterr()
        from lintime.train.cli import main

        try:
            code = main([str(w) for w in words])
        except SystemExit as leave:  # argparse
            code = leave.code
        out, err = capfd.readouterr()
        assert code == status, err
        return out if status == 0 else err

    def refused(*words):
        err = call(*words, status=2)
        assert err.startswith("lintime: ") and err.count("\n") == 1, err
        return err

    call.refused = refused
    return call
