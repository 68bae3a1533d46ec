"""lintime: linear-time and compute-flexible generative modelling in JAX/Flax."""

__version__ = "0.1.0"
