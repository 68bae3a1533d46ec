"""A trained run, loaded for use: `lintime.load("runs/mine").generate("Once upon a time")`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from ..model.sampling import EOS, TextStream, cast_weights, make_sampler, make_stream
from .checkpoint import Checkpoints, restore_inference
from .config_files import read_config
from .data import load_vocab
from .errors import UserError
from .sample import continue_text
from .schema import Run, Sample
from .tasks import make_task


class LoadedRun:
    """The weights of a run and what is needed to use them.

    Attributes:
        config: the `Run` it was trained with. net: the Flax module.
        params, stats: weights (the moving average where the run keeps one) and codebooks.
        step: update of the checkpoint. path: run directory, or None.
    """

    def __init__(
        self,
        config: Run,
        params: Any,
        stats: Any,
        *,
        step: int = 0,
        path: Path | None = None,
        vocab: str | None = None,
        vocab_fingerprint: dict | None = None,
    ):
        self.config, self.params, self.stats = config, params, stats
        self.step, self.path = step, path
        self.net = make_task(config).net
        self._vocab_spec = vocab or config.data.vocab
        self._vocab_fingerprint = vocab_fingerprint
        self._jitted: dict = {}

    def __repr__(self) -> str:
        n = sum(a.size for a in jax.tree.leaves(self.params))
        return f"LoadedRun({str(self.path)!r}, step={self.step}, {n / 1e6:.2f}M parameters)"

    @property
    def variables(self) -> dict[str, Any]:
        """{"params", "stats"}, as `net.apply` and the samplers take them."""
        return {"params": self.params, "stats": self.stats}

    @functools.cached_property
    def decoding_variables(self) -> dict[str, Any]:
        """`variables` with matrices in the net's dtype: same outputs, less to read per token."""
        return jax.jit(functools.partial(cast_weights, self.net))(self.variables)

    @functools.cached_property
    def vocab(self):
        """The vocabulary: size, encode(text) -> ids, decode(ids) -> bytes.

        Raises:
            UserError: its file is missing, or it is not the one that the run was trained with.
        """
        vocab = load_vocab(os.path.expanduser(self._vocab_spec))
        saved = self._vocab_fingerprint
        if saved is not None and saved != vocab.fingerprint:
            raise UserError(
                f"the vocabulary {self._vocab_spec} ({vocab.size} ids) is not the one that "
                f"{self.path} was trained with ({saved.get('size')} ids); restore that file"
            )
        if vocab.size > self.config.net.vocab_size:
            raise UserError(
                f"the vocabulary {self._vocab_spec} has {vocab.size} ids, but the net of "
                f"{self.path} has only net.vocab_size={self.config.net.vocab_size}; name the "
                "vocabulary it was trained with"
            )
        return vocab

    def sampler(self, *, length: int, stop_ids: Sequence[int] = (EOS,), **options) -> Callable:
        """A jitted sampler(variables, key, prompts, lengths=None, *, temperature, top_k, top_p).

        See `lintime.model.sampling.make_sampler`; ids outside the vocabulary are never drawn.
        """
        options = self._with_vocab(options)
        return self._cached(make_sampler, length=length, stop_ids=tuple(stop_ids), **options)

    def stream(self, **options) -> TextStream:
        """Streaming generation over explicit state; see `lintime.model.sampling.make_stream`."""
        return self._cached(make_stream, **self._with_vocab(options))

    def generate(
        self,
        prompt: str | bytes | Sequence[str | bytes] = "",
        length: int | None = None,
        *,
        seed: int = 0,
        **settings,
    ) -> str | list[str]:
        """Continue a prompt, or several at once.

        Args:
            prompt: text, or a list of texts.
            length: most tokens to draw.
            seed: the same seed gives the same text.
            settings: temperature, top_k, top_p, stop; the run's `sample` settings unless given.

        Returns:
            The continuation without the prompt (a list for a list).
        """
        fields = {"temperature", "top_k", "top_p", "stop"}
        if unknown := settings.keys() - fields:
            raise TypeError(f"generate() takes {', '.join(sorted(fields))}, not {unknown.pop()}")
        usual = self.config.sample
        chosen = {name: getattr(usual, name) for name in fields} | settings
        sample = Sample(length=usual.length if length is None else length, **chosen)
        one = isinstance(prompt, str | bytes)
        texts = continue_text(self, [prompt] if one else list(prompt), sample, seed=seed)
        return texts[0] if one else texts

    def _with_vocab(self, options: dict) -> dict:
        """`vocab_size` from the vocabulary, unless it is given (a run may have none)."""
        return options if "vocab_size" in options else {"vocab_size": self.vocab.size} | options

    def _cached(self, make: Callable, **options):
        """Each sampler is made, and so compiled, once."""
        name = (make, *sorted(options.items()))
        if name not in self._jitted:
            self._jitted[name] = make(self.net, **options)
        return self._jitted[name]


def load(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    ema: bool = True,
    vocab: str | None = None,
) -> LoadedRun:
    """Load a run directory, or a directory written by `lintime convert`, for inference.

    Args:
        path: the directory.
        step: checkpoint to load; the newest unless given.
        ema: prefer the moving average of the weights where the run keeps one.
        vocab: where the vocabulary is now, if not where `config.data.vocab` says.

    Raises:
        UserError: no such directory, not a run, no checkpoint, or one that is damaged or of
            another model.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{path} is not a directory; name one that `lintime train` or `convert` wrote"
        )
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is not a run directory: it has no config.json; name one that "
            "`lintime train` or `lintime convert` wrote"
        )
    config = read_config(path / "config.json")
    with _errors_only("absl"):  # orbax warns that a checkpoint opened for reading is read-only
        restored, step, fingerprint = _restore(config, path, step, ema)
    return LoadedRun(
        config, restored["params"], restored["stats"], step=step, path=path, vocab=vocab,
        vocab_fingerprint=fingerprint.get("vocab"),
    )  # fmt: skip


def _restore(config: Run, path: Path, step: int | None, ema: bool) -> tuple[dict, int, dict]:
    """{"params", "stats"} on one device, their step, and the fingerprint of the training data."""
    checkpoints = Checkpoints(path)
    latest = checkpoints.latest_step()
    if latest is None:
        raise UserError(f"{path} holds no complete checkpoint; train there first")
    step = latest if step is None else step
    if not checkpoints.has(step, "params"):
        have = sorted(int(p.name) for p in checkpoints.folder.iterdir() if p.name.isdigit())
        raise UserError(
            f"{path} has no checkpoint of step {step}; it has {', '.join(map(str, have))}"
        )
    fingerprint = (checkpoints.meta(step).get("fingerprint") or {}).get("train") or {}
    checkpoints.close()
    task = make_task(config)
    device = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
        jax.eval_shape(task.init, jax.random.key(0)),
    )
    return restore_inference(path, abstract, ema=ema, step=step), step, fingerprint


@contextlib.contextmanager
def _errors_only(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
