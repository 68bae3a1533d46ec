"""lintime: linear-time and compute-flexible generative modelling in JAX/Flax."""

__version__ = "0.1.0"


def load(path, **options):
    """Load a run directory for inference: weights, net, vocabulary, samplers.

        run = lintime.load("runs/transformer_vq-quickstart")
        print(run.generate("The "))

    Options and errors are those of `lintime.train.load.load`, which imports JAX only when it is
    called.
    """
    from .train.loaded.load import load

    return load(path, **options)


__all__ = ["__version__", "load"]
