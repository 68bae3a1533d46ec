"""Checking the values of a config before anything is built."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..model.layers.image_coder import check_channels
from ..model.nets import aim, dih, dit, mamba_lm
from ..model.nets.aim import AiMConfig
from ..model.nets.dih import DiHConfig
from ..model.nets.dit import DiTConfig
from ..model.nets.flexidit import FlexiDiTConfig
from ..model.nets.jit import JiTConfig
from ..model.nets.mamba_lm import MambaConfig
from ..model.nets.text_video_dih import TextVideoDiHConfig
from ..model.nets.transformer_vq import TransformerVQConfig
from ..model.nets.vq_tokenizer import VQTokenizerConfig
from ..model.processes.adversarial import AdversarialReconstruction
from ..model.processes.autoregressive import Autoregressive
from ..model.processes.flexible import (
    FEATURES,
    KERNELS,
    FlexibleDiffusion,
    FlexibleFlow,
)
from ..model.processes.flow import FlowMatching
from ..model.processes.gaussian import GaussianDiffusion
from ..model.processes.noise_levels import SCHEDULES, NoiseLevels
from ..model.sampling.level_solvers import PUBLISHED
from .config_files import KINDS, unknown_kind
from .errors import UserError, check_divides
from .override import leaves, matches, nearest, type_name
from .prepare.encoding import FOLDERS
from .schema import (
    EMA,
    CodeData,
    Data,
    DiffusionSample,
    FlexibleSample,
    ImageData,
    ImageSample,
    LatentData,
    LevelSample,
    Run,
    Sample,
    VideoData,
)
from .tasks.distill import check_distill
from .tasks.tokenizer import check_perceptual
from .validate_diffusion import check_diffusion

_TEXT = {"data": Data, "process": Autoregressive, "sample": Sample}
_IMAGES = {"sample": ImageSample}
_DIFFUSION = {
    "data": (ImageData, LatentData, VideoData),
    "process": (GaussianDiffusion, FlowMatching),
    "sample": DiffusionSample,
}
_LEVELS = {"process": NoiseLevels, "sample": LevelSample}
GOES_WITH = {
    DiTConfig: _DIFFUSION,
    FlexiDiTConfig: _DIFFUSION
    | {"process": (FlexibleDiffusion, FlexibleFlow), "sample": FlexibleSample},
    JiTConfig: _DIFFUSION | {"data": (ImageData, LatentData), "process": FlowMatching},
    DiHConfig: _LEVELS | {"data": (ImageData, LatentData)},
    TextVideoDiHConfig: _LEVELS | {"data": VideoData},
    TransformerVQConfig: _TEXT,
    MambaConfig: _TEXT,
    AiMConfig: _IMAGES | {"data": CodeData, "process": Autoregressive},
    VQTokenizerConfig: _IMAGES | {"data": ImageData, "process": AdversarialReconstruction},
}

_CHOICES = {
    "data.format": ("auto", "text", "enwik8", "pg19", "images"),
    "optim.name": ("adamw", "lion", "adafactor"),
    "optim.schedule": ("cosine", "linear", "sqrt", "constant"),
    "precision.compute": ("float32", "bfloat16"),
    "precision.remat": ("none", "full", "dots"),
    "process.normalise": ("positions", "tokens"),
    "net.head_type": ("shga", "mqa", "mha"),
    "net.attention": ("vq", "dense", "flash"),
    "net.reduction": ("serial", "associative", "matmul"),
    "net.scale_on": ("logits", "features"),
    "net.mixer": ("mamba2", "mamba1", "attention", "pom", "hom"),
    "net.positions": dih.POSITIONS,
    "net.rope": dit.ROPES,
    "net.mixing": dit.MIXINGS,
    "net.context": dit.CONTEXTS,
    "net.null_context": dit.NULLS,
    "net.conditioning": ("adaln", "adaln_single", "adaln_group"),
    "process.match_kernel": KERNELS,
    "process.match_features": FEATURES,
    "process.reconstruction_loss": ("l2", "l1"),
    "process.disc_loss": ("hinge", "vanilla"),
    "process.gen_loss": ("hinge", "non_saturating"),
    "data.views": ("center", "flip", "ten"),
    "data.crop": ("random", "center"),
    "sample.guide": ("cfg", "weak_uncond", "weak_cond"),
    "sample.method": ("ddpm", "ddim", "dpm++2m", "euler", "heun", "sde", "dpm"),
    "sample.published": ("", *PUBLISHED),
    "sample.noise_schedule": tuple(SCHEDULES),
    "data.filter": ("lanczos", "bicubic", "nearest"),
    "data.images.filter": ("lanczos", "bicubic", "nearest"),
    "sample.schedule": ("constant", "linear", "cosine"),
}

# (what is allowed, its test, the fields)
_RANGES = (
    (
        ">= 1",
        lambda v: v >= 1,
        "steps batch_size data.sequence_len optim.accumulate checkpoint.keep log.every "
        "sample.length sample.rows net.vocab_size net.d_model net.n_layer net.n_head net.d_k "
        "net.n_code net.block_len net.d_conv net.expand net.headdim net.ngroups net.chunk "
        "net.num_tokens net.num_groups net.ch net.num_res_blocks net.z_channels "
        "net.codebook_size net.codebook_dim net.input_size net.patch_size net.in_channels "
        "net.n_head sample.steps process.timesteps data.size data.images.size "
        "net.patch_frames data.frames data.stride net.degree net.bottleneck net.groups "
        "ema.interval process.disc_features process.disc_layers net.rank process.match_steps",
    ),
    (
        ">= 0",
        lambda v: v >= 0,
        "seed data.update_len data.train_vocab data.workers optim.learning_rate optim.warmup "
        "optim.decay_steps optim.weight_decay optim.eps optim.clip checkpoint.every "
        "checkpoint.keep_best eval.every eval.batches sample.temperature sample.top_k net.d_v "
        "net.mem_len net.commit_weight net.revive_below net.d_state net.dt_rank net.d_ssm "
        "net.d_intermediate net.norm_epsilon net.position_offset process.reconstruction_weight "
        "process.perceptual_weight process.disc_weight process.disc_start process.codebook_weight "
        "process.commitment_weight process.entropy_weight sample.count sample.columns "
        "eval.samples sample.eta sample.guidance_channels net.base_patch data.resize_max "
        "data.images.workers sample.weak sample.weak_guidance process.denoise process.distill "
        "net.num_classes net.context_dim net.context_length net.context_tokens "
        "net.context_start "
        "process.distill_variance process.match net.base_size net.underlying net.frames "
        "net.base_patch_frames net.registers net.clamp net.input_width sample.frames ema.start "
        "ema.power distill.block_weight distill.output_weight distill.denoise_weight",
    ),
    (
        "in [0, 1)",
        lambda v: 0 <= v < 1,
        "ema.decay optim.b1 optim.b2 data.validation_fraction net.codebook_decay "
        "net.dropout_emb net.dropout_sin net.dropout_res net.dropout_layer net.dropout "
        "net.class_dropout net.token_drop net.mixer_drop net.mlp_drop "
        "data.images.validation_fraction",
    ),
    ("in (0, 1]", lambda v: 0 < v <= 1, "sample.top_p"),
    ("in [0, 1]", lambda v: 0 <= v <= 1, "optim.final process.powerful_share"),
    ("> 0", lambda v: v > 0, "data.scaling_factor net.mlp_ratio net.rope_base sample.clip_to"),
    (">= 1", lambda v: v >= 1, "data.resize data.images.resize"),
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
    for named, choices in _CHOICES.items():
        for path in _places(named):
            value = values.get(path, choices[0])
            if value not in choices:
                raise UserError(
                    f"{path}={value}: choose one of {', '.join(choices)}{nearest(value, choices)}"
                )
    for allowed, test, paths in _RANGES:
        for path in itertools.chain.from_iterable(map(_places, paths.split())):
            value = values.get(path, ())
            if not all(map(test, value if isinstance(value, tuple) else (value,))):
                raise UserError(f"{path}={values[path]} is out of range; it must be {allowed}")
    for part, kinds in KINDS.items():
        if type(getattr(run, part)) not in kinds.values():
            raise unknown_kind(part, type(getattr(run, part)).__name__, kinds)
    _check_relations(run)
    for number, stage in enumerate(run.stages):
        try:
            validate(stage)
        except UserError as error:
            raise UserError(f"stages.{number}: {error}") from None


def _places(path: str) -> tuple[str, ...]:
    """Where a field can be: a net may hold that of which it is made."""
    return path, path.replace("net.", "net.base.", 1)


def _check_relations(run: Run) -> None:
    net, mesh = run.net, run.mesh
    _check_kinds(run)
    check_divides("batch_size", run.batch_size, "optim.accumulate", run.optim.accumulate)
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
            check_divides("net.d_model", net.d_model, "net.d_k", net.d_k)
        elif not net.d_v:
            check_divides("2 * net.d_model", 2 * net.d_model, "net.n_head", net.n_head)
    if isinstance(net, MambaConfig | AiMConfig):
        if net.dt_limit and (len(net.dt_limit) != 2 or net.dt_limit[0] > net.dt_limit[1]):
            raise UserError(f"net.dt_limit={net.dt_limit}: give (lowest, highest) or ()")
        try:
            mixer = (aim if isinstance(net, AiMConfig) else mamba_lm).make_mixer(net, parent=None)
            if net.mixer == "mamba2":
                mixer.sizes()
        except ValueError as error:
            raise UserError(f"net: {error}") from error
    if isinstance(net, AiMConfig) and net.num_classes < 1:
        raise UserError(f"net.num_classes={net.num_classes} is out of range; it must be >= 1")
    if isinstance(run.sample, DiffusionSample):
        check_diffusion(run)
    check_distill(run)
    _check_classes(run)
    if isinstance(net, VQTokenizerConfig):
        try:
            check_channels(net)
        except ValueError as error:
            raise UserError(f"net: {error}") from error
        check_perceptual(run)
        if run.precision.unroll:
            raise UserError(
                "precision.unroll=true: a tokenizer has no stacked layers; leave it out"
            )
    if isinstance(run.data, CodeData):
        _check_codes(run)
    _check_used(run)


def _check_classes(run: Run) -> None:
    """Refuses samples of classes that the net does not have, before it is trained."""
    count = getattr(getattr(run.net, "base", run.net), "num_classes", 0)
    wrong = [c for c in getattr(run.sample, "classes", ()) if not 0 <= c < count]
    if wrong and count:
        raise UserError(
            f"sample.classes: class {wrong[0]} is out of range; this model has classes "
            f"0..{count - 1}"
        )


def _check_kinds(run: Run) -> None:
    """Each kind of net goes with one kind of data, process and samples."""
    expected = GOES_WITH[type(run.net)]
    for part, kind in expected.items():
        have = type(getattr(run, part))
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if have not in kinds:
            names = " or ".join(f"{k.__name__}(...)" for k in kinds)
            raise UserError(
                f"a run of {type(run.net).__name__} needs {part}={names}, it has "
                f"{have.__name__}; change the config file"
            )


def _check_used(run: Run) -> None:
    """Refuses settings that this kind of run would ignore."""
    diffusion = isinstance(run.sample, DiffusionSample)
    for at, images in (("data", run.data), ("data.images", getattr(run.data, "images", None))):
        if isinstance(images, ImageData) and (at != "data" or not diffusion):
            for name in ("text", "text_encoder"):
                if value := getattr(images, name):
                    instead = f"set data.{name}" if diffusion else "leave it out"
                    raise UserError(f"{at}.{name}={value} would be ignored; {instead}")
    if run.eval.clip and not diffusion:
        raise UserError(f"eval.clip={run.eval.clip} is about models that read a text; leave it out")
    if not run.ema.decay and run.ema != EMA():
        raise UserError(
            f"ema={run.ema} would be ignored: without ema.decay there is no average; set it, or "
            "leave the others out"
        )
    text, tokenizer = isinstance(run.data, Data), isinstance(run.net, VQTokenizerConfig)
    if (text or tokenizer) and run.eval.samples:
        raise UserError(
            f"eval.samples={run.eval.samples}: only models of images by class draw some "
            "to judge; leave it out"
        )
    if text:
        for name in ("inception", "reference"):
            if getattr(run.eval, name):
                raise UserError(
                    f"eval.{name}={getattr(run.eval, name)} judges images, this is a model of "
                    "text; leave it out"
                )
    if tokenizer:
        if run.eval.reference:
            raise UserError(
                f"eval.reference={run.eval.reference}: a tokenizer's reconstructions are compared "
                "with the images themselves; leave it out"
            )
        for name, value in vars(ImageSample()).items():
            mine = getattr(run.sample, name)
            if name not in ("count", "columns") and mine != value:
                raise UserError(
                    f"sample.{name}={mine} would be ignored: a tokenizer shows reconstructions of "
                    "data, it draws nothing; sample.count and sample.columns are read"
                )


def _check_codes(run: Run) -> None:
    data = run.data
    if not data.resizes or min(data.resizes) < 1 or len(set(data.resizes)) < len(data.resizes):
        raise UserError(
            f"data.resizes={data.resizes}: give different factors of at least 1, such as 1.1,1.05"
        )
    if not data.path and not data.tokenizer:
        raise UserError(
            "neither data.path (a folder of `lintime prepare codes`) nor data.tokenizer is set; "
            "nothing says what to train on"
        )


def _check_text(run: Run) -> None:
    data = run.data
    check_divides(
        "data.sequence_len", data.sequence_len,
        "data.update_len", data.update_len or data.sequence_len,
    )  # fmt: skip
    if data.vocab == "bytes" and run.net.vocab_size < 259:
        raise UserError(
            f"net.vocab_size={run.net.vocab_size} is too small for data.vocab=bytes; "
            "set net.vocab_size=259 (256 bytes and 3 special ids)"
        )


def check_overrides(run: Run, overrides: Sequence[str]) -> None:
    """Refuses overrides of `train` that say how codes or latents are made where none will be.

    A config may say it, so that naming a folder of them is enough to use that instead.

    Args:
        run: with the overrides applied. overrides: "field=value".

    Raises:
        UserError: the first of them.
    """
    if not isinstance(run.data, CodeData | LatentData) or not run.data.path:
        return
    kind = FOLDERS[type(run.data)]
    from .stages import stages_of

    # a stage that trains the tokenizer takes its images from here
    lent = any(
        isinstance(run.stages[number].data, ImageData) and not run.stages[number].data.path
        for number in stages_of(run)
    )
    read = "data.images.path" if lent else ""
    for override in overrides:
        field = override.partition("=")[0].strip()
        if field.startswith(("data.images.", "data.views", "data.resizes")) and field != read:
            raise UserError(
                f"{field} says how {kind} are made, but data.path={run.data.path} holds {kind} "
                "already; leave one of the two out"
            )
