"""Checking the values of a config before anything is built."""

from __future__ import annotations

import math

from ..model.nets.mamba_lm import MambaConfig, make_mixer
from ..model.nets.transformer_vq import TransformerVQConfig
from ..model.processes.autoregressive import Autoregressive
from .config_files import KINDS, unknown_kind
from .errors import UserError
from .override import leaves, matches, nearest, type_name
from .schema import Data, Run, Sample

_TEXT = {"data": Data, "process": Autoregressive, "sample": Sample}
GOES_WITH = {TransformerVQConfig: _TEXT, MambaConfig: _TEXT}

_CHOICES = {
    "data.format": ("auto", "text", "enwik8", "pg19", "images"),
    "optim.name": ("adamw", "lion", "adafactor"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "precision.compute": ("float32", "bfloat16"),
    "precision.remat": ("none", "full", "dots"),
    "process.normalise": ("positions", "tokens"),
    "net.head_type": ("shga", "mqa", "mha"),
    "net.attention": ("vq", "dense", "flash"),
    "net.reduction": ("serial", "associative", "matmul"),
    "net.scale_on": ("logits", "features"),
    "net.mixer": ("mamba2", "mamba1"),
}

# (what is allowed, its test, the fields)
_RANGES = (
    (
        ">= 1",
        lambda v: v >= 1,
        "steps batch_size data.sequence_len optim.accumulate checkpoint.keep log.every "
        "sample.length sample.rows net.vocab_size net.d_model net.n_layer net.n_head net.d_k "
        "net.n_code net.block_len net.d_conv net.expand net.headdim net.ngroups net.chunk",
    ),
    (
        ">= 0",
        lambda v: v >= 0,
        "seed data.update_len data.train_vocab data.workers optim.learning_rate optim.warmup "
        "optim.decay_steps optim.weight_decay optim.eps optim.clip checkpoint.every "
        "checkpoint.keep_best eval.every eval.batches sample.temperature sample.top_k net.d_v "
        "net.mem_len net.commit_weight net.revive_below net.d_state net.dt_rank net.d_ssm "
        "net.d_intermediate net.norm_epsilon",
    ),
    (
        "in [0, 1)",
        lambda v: 0 <= v < 1,
        "ema.decay optim.b1 optim.b2 data.validation_fraction net.codebook_decay "
        "net.dropout_emb net.dropout_sin net.dropout_res net.dropout_layer",
    ),
    ("in (0, 1]", lambda v: 0 < v <= 1, "sample.top_p"),
    ("> 1", lambda v: v > 1, "net.pe_lam"),
    (
        ">= 1, or -1 for all devices left",
        lambda v: v >= 1 or v == -1,
        "mesh.data mesh.fsdp mesh.tensor mesh.sequence",
    ),
)


def validate(run: Run) -> None:
    """Checks types, choices, ranges and divisibility of every field before anything is built.

    Raises:
        UserError: the first fault: field, value, and what to set instead.
    """
    values = {}
    for path, annotation, value in leaves(run):
        if not matches(value, annotation):
            raise UserError(f"{path}: expected {type_name(annotation)}, got {value!r}")
        values[path] = value
    for path, choices in _CHOICES.items():
        value = values.get(path, choices[0])
        if value not in choices:
            raise UserError(
                f"{path}={value}: choose one of {', '.join(choices)}{nearest(value, choices)}"
            )
    for allowed, test, paths in _RANGES:
        for path in paths.split():
            if path in values and not test(values[path]):
                raise UserError(f"{path}={values[path]} is out of range; it must be {allowed}")
    for part, kinds in KINDS.items():
        if type(getattr(run, part)) not in kinds.values():
            raise unknown_kind(part, type(getattr(run, part)).__name__, kinds)
    _check_relations(run)
    for stage in run.stages:
        validate(stage)


def _check_relations(run: Run) -> None:
    net, mesh = run.net, run.mesh
    _check_kinds(run)
    _divides("batch_size", run.batch_size, "optim.accumulate", run.optim.accumulate)
    open_axes = [f"mesh.{axis}" for axis, size in vars(mesh).items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(
            f"{' and '.join(open_axes)} are -1, but only one mesh axis can take the devices left; "
            f"set {open_axes[0]} to a size, for example {open_axes[0]}=1"
        )
    if isinstance(run.data, Data):
        _check_text(run)
    if isinstance(net, TransformerVQConfig):
        if net.d_model % 2:
            raise UserError(f"net.d_model={net.d_model} must be even (sines and cosines)")
        if net.head_type in ("mqa", "mha"):
            _divides("net.d_model", net.d_model, "net.d_k", net.d_k)
        elif not net.d_v:
            _divides("2 * net.d_model", 2 * net.d_model, "net.n_head", net.n_head)
    if isinstance(net, MambaConfig):
        if net.dt_limit and (len(net.dt_limit) != 2 or net.dt_limit[0] > net.dt_limit[1]):
            raise UserError(f"net.dt_limit={net.dt_limit}: give (lowest, highest) or ()")
        if net.mixer == "mamba2":
            try:
                make_mixer(net, parent=None).sizes()
            except ValueError as error:
                raise UserError(f"net: {error}") from error


def _check_kinds(run: Run) -> None:
    """Each kind of net goes with one kind of data, process and samples."""
    expected = GOES_WITH[type(run.net)]
    for part, kind in expected.items():
        have = type(getattr(run, part))
        if have is not kind:
            raise UserError(
                f"a run of {type(run.net).__name__} needs {part}={kind.__name__}(...), it has "
                f"{have.__name__}; change the config file"
            )


def _check_text(run: Run) -> None:
    data = run.data
    _divides(
        "data.sequence_len", data.sequence_len,
        "data.update_len", data.update_len or data.sequence_len,
    )  # fmt: skip
    if data.vocab == "bytes" and run.net.vocab_size < 259:
        raise UserError(
            f"net.vocab_size={run.net.vocab_size} is too small for data.vocab=bytes; "
            "set net.vocab_size=259 (256 bytes and 3 special ids)"
        )


def _divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    if whole % part:
        divisors = [d for d in range(1, whole + 1) if whole % d == 0]
        best = min(divisors, key=lambda d: (abs(math.log(d / part)), d))
        raise UserError(
            f"{whole_name}={whole} is not divisible by {part_name}={part}; set {part_name}={best}"
        )
