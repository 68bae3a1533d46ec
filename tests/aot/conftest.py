"""What is compiled for TPUs alone cannot be read back by a process without one: it is not kept."""

import jax
import pytest


@pytest.fixture(autouse=True)
def programs_are_not_kept():
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    yield
    jax.config.update(name, before)
