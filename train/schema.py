"""The experiment schema: frozen dataclasses that a config file fills in and the command line
overrides.

A config file under configs/ (or a user's own .py file) defines ``config = Run(...)``. Every field
here is read somewhere; there are no reserved options. All classes are frozen and hashable, so they
can be static arguments of jitted functions.
"""

from __future__ import annotations

from typing import Any

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
from ..model.processes.flexible import FlexibleDiffusion, FlexibleFlow
from ..model.processes.flow import FlowMatching
from ..model.processes.gaussian import GaussianDiffusion
from ..model.processes.noise_levels import NoiseLevels
from .sample_schema import (
    DiffusionSample,
    FlexibleSample,
    ImageSample,
    LevelSample,
    Sample,
    dataclass,
)


@dataclass
class Data:
    """Where training sequences come from.

    Attributes:
        path: a file, a directory, a glob, or ``builtin:python-docs`` (English and code text that
            every Python installation carries).
        format: "auto", "text" (bytes of files), "enwik8" (100 MB file, 90/5/5 M split), "pg19"
            (train/ validation/ test/ folders of .txt), or "images" (uint8 arrays, .npy/.npz).
        vocab: "bytes" (259 ids: pad 0, EOS 1, unk 2, byte+3), the path of a SentencePiece model, or
            "" (a converted model whose tokenizer is not here: token ids only).
            A path that does not exist yet is trained with `vocab_size` pieces when `train_vocab` is
            set.
        train_vocab: number of SentencePiece pieces to train when the `vocab` file is absent; 0 =
            never.
        sequence_len: tokens T per sequence; recurrent state starts afresh at each sequence.
        update_len: tokens U per optimiser update (truncated BPTT); 0 means U = T. Must divide T.
        append_eos: append EOS (id 1) to every document.
        validation_fraction: share of documents (of bytes, for a single document) held out.
        pattern: file name pattern within a directory.
        shuffle: visit training sequences in a seeded random order.
        cache: folder for token files made with a SentencePiece model; "" = next to the run.
        workers: reader processes (0 = threads in this process).
    """

    path: str = "builtin:python-docs"
    format: str = "auto"
    vocab: str = "bytes"
    train_vocab: int = 0
    sequence_len: int = 1024
    update_len: int = 0
    append_eos: bool = True
    validation_fraction: float = 0.05
    pattern: str = "**/*.txt"
    shuffle: bool = True
    cache: str = ""
    workers: int = 0


@dataclass
class ImageData:
    """Labelled images, cut to squares of `size` pixels with values in [-1, 1].

    An image is resized so that its shorter side is `resize * size` pixels (training: uniform in
    [resize, resize_max] * size if `resize_max` is set), then cropped.

    Attributes:
        path: a folder of class folders (or with train/, val/ or validation/, test/ folders of
            such), .npz or .npy files (or a folder of them) of uint8 images [N, H, W, 3] or [N, H,
            W] (labels: `labels` in the .npz, or a file NAME.labels.npy beside the .npy; none: one
            class), ArrayRecord files (a glob or folder; see `write_array_records`), or
            ``builtin:digits``, ``builtin:photos`` (carried by scikit-learn). Of several files those
            named after a split (val, test) are that split.
        size: side of the square.
        crop: of training images: "random" or "center"; validation always takes the centre.
        resize, resize_max: see above; resize_max 0 means `resize`.
        filter: "lanczos", "bicubic" (ADM's: large images are first halved by a box filter) or
            "nearest".
        flip: mirror training images at random.
        text: folder of `lintime prepare text` of these images, for nets that read a text: batches
            have the features of their captions. "": none.
        text_encoder: the encoder of prompts to draw from; "": where it was when `text` was made.
        validation_fraction: share of images held out where the source has no split of its own.
        shuffle: visit training images in a seeded random order.
        workers: reader processes (0 = threads in this process).
    """

    path: str = "builtin:digits"
    size: int = 256
    crop: str = "random"
    resize: float = 1.125
    resize_max: float = 0.0
    filter: str = "lanczos"
    flip: bool = False
    text: str = ""
    text_encoder: str = ""
    validation_fraction: float = 0.05
    shuffle: bool = True
    workers: int = 0


@dataclass
class CodeData:
    """Token codes of labelled images, made once by a tokenizer.

    Attributes:
        path: a folder written by `lintime prepare codes`; "" encodes `images` with `tokenizer` into
            the run's codes/ folder before training starts.
        tokenizer: a tokenizer's run directory, "stage:0" for the first of the run's own stages, or
            "" (codes only: nothing can be drawn as pixels).
        images: what to encode where `path` is ""; its `crop`, `resize` and `flip` give way to:
        views: codes kept per image and resize: "center", "flip" (image and mirrored image) or "ten"
            (four corners and the centre, then the same mirrored). Training draws one at random;
            of the other splits only the centre crop at the first resize is kept.
        resizes: side of the square that views are cut from, as multiples of `images.size`.
        shuffle, workers: as for images.
    """

    path: str = ""
    tokenizer: str = "stage:0"
    images: ImageData = ImageData()
    views: str = "ten"
    resizes: tuple[float, ...] = (1.1, 1.05)
    shuffle: bool = True
    workers: int = 0


@dataclass
class LatentData:
    """Posterior moments of labelled images, made once by a KL autoencoder.

    Attributes:
        path: a folder written by `lintime prepare latents`; "" encodes `images` with `autoencoder`
            into the run's latents/ folder before training starts.
        autoencoder: folder or file of a published autoencoder, or "" (latents only: nothing can be
            drawn as pixels).
        scaling_factor: of the autoencoder: a net is trained on latents times this.
        images: what to encode where `path` is "": the centre crop of every image, and of training
            images also its mirror image if `flip` is set; `crop` and `resize` are not read.
        text, text_encoder, shuffle, workers: as for images.
    """

    path: str = ""
    autoencoder: str = ""
    scaling_factor: float = 0.18215
    images: ImageData = ImageData(filter="bicubic", flip=True)
    text: str = ""
    text_encoder: str = ""
    shuffle: bool = True
    workers: int = 0


@dataclass
class VideoData:
    """Labelled videos of square frames, values in [-1, 1].

    Attributes:
        path: .npz or .npy files (or a folder or glob of them) of uint8 videos [N, F, H, W, 3]
            (labels as for images), or ``builtin:moving_digits``: scikit-learn's digits, half a
            frame wide, that move and bounce. Of several files those named after a split (val, test)
            are that split.
        size: side of a frame: its shorter side is resized to it, then its centre is cut out.
        frames: F of a clip, which is cut out of a longer video: at random in training, from the
            middle in validation.
        stride: every how many frames of the video a clip takes one.
        validation_fraction, shuffle, workers: as for images.
    """

    path: str = "builtin:moving_digits"
    size: int = 16
    frames: int = 8
    stride: int = 1
    validation_fraction: float = 0.05
    shuffle: bool = True
    workers: int = 0


@dataclass
class Optim:
    """Optimiser and schedule.

    Attributes:
        name: "adamw", "lion" or "adafactor".
        learning_rate: peak learning rate.
        schedule: "cosine", "linear", "sqrt" or "constant", after `warmup` updates from 0.
        final: share of the peak that is left at the end of the first three.
        decay_steps: updates at which the decay ends; 0 = `Run.steps`.
        weight_decay: per-update decay. Transformer-VQ's recipe does not multiply it by the learning
            rate; `decay_times_lr=True` gives the usual decoupled AdamW decay.
        clip: global-norm clipping of gradients; 0 = none.
        accumulate: micro-batches per update (rows are split, never time).
    """

    name: str = "adamw"
    learning_rate: float = 4e-4
    schedule: str = "cosine"
    final: float = 0.1
    warmup: int = 100
    decay_steps: int = 0
    weight_decay: float = 0.0
    decay_times_lr: bool = False
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-9
    clip: float = 0.0
    accumulate: int = 1


@dataclass
class EMA:
    """Exponential moving average of the parameters; decay 0 keeps none.

    Attributes:
        decay: a <- decay a + (1 - decay) p.
        interval: updates from one averaging to the next.
        start: updates during which the average is a copy.
        power: after them, decay warms up as 1 - (1 + s)^-power, s the updates since; 0: at once.
    """

    decay: float = 0.0
    interval: int = 1
    start: int = 0
    power: float = 0.0


@dataclass
class Distill:
    """Training of a DiT with other mixers to do what a trained one does (`lintime distill`).

    Attributes:
        teacher: run directory of the trained DiT, or "stage:n". It must differ from the net in its
            mixers only. "": no distillation.
        layers: layer by layer: every block gets what goes into the teacher's block and is to give
            what comes out; only mixers train. Without it end to end: the net runs on its own, and
            all of it trains.
        block_weight, output_weight: weights of mean squared plus mean absolute error of the blocks'
            outputs (their mean over the blocks), and of the net's; end to end only.
        denoise_weight: of the loss of `process` itself; end to end only.
    """

    teacher: str = ""
    layers: bool = False
    block_weight: float = 1.0
    output_weight: float = 1.0
    denoise_weight: float = 0.0


@dataclass
class Precision:
    """How a step is computed.

    Attributes:
        compute: dtype of activations and matmuls, "float32" or "bfloat16"; parameters stay float32.
        remat: what the backward pass recomputes: "none", "full" (each layer) or "dots" (all but
            matmul outputs).
        unroll: compile stacked layers one by one, not as a loop, which copies what the backward
            pass needs of each: faster steps on a GPU, but compilation takes long.
    """

    compute: str = "float32"
    remat: str = "none"
    unroll: bool = False


@dataclass
class Mesh:
    """Sizes of the mesh axes; -1 takes what the other axes leave of the devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


@dataclass
class Checkpoint:
    """every: updates between saves (0 = only at the end); keep: latest saves kept; keep_best: best
    by validation loss kept besides."""

    every: int = 1000
    keep: int = 3
    keep_best: int = 1


@dataclass
class Eval:
    """Validation during training, and what `lintime eval` does besides.

    Attributes:
        every: updates between validations (0 = only at the end).
        batches: validation batches (0 = all).
        samples: images that `lintime eval` draws (models by class or text; 0 = none).
        inception: file of the published Inception weights for FID, its relatives and rFID.
        reference: statistics or images to compare with, an .npz file of the ADM evaluator.
        clip: folder of published CLIP weights for the CLIP score of models by text.
    """

    every: int = 1000
    batches: int = 100
    samples: int = 0
    inception: str = ""
    reference: str = ""
    clip: str = ""


@dataclass
class Log:
    """every: updates between metric lines; tensorboard / wandb need the `track` extra."""

    every: int = 50
    tensorboard: bool = False
    wandb: str = ""  # project name


@dataclass
class Run:
    """One experiment. See the docstring of each part."""

    net: Any
    process: Any = Autoregressive()
    data: Any = Data()
    optim: Optim = Optim()
    ema: EMA = EMA()
    precision: Precision = Precision()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    sample: Any = Sample()
    log: Log = Log()
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8
    init_from: str = ""
    distill: Distill = Distill()
    stages: tuple[Run, ...] = ()


# Kinds of part a Run can hold; `lintime` reads saved configs back through these names.
NETS = {
    "transformer_vq": TransformerVQConfig,
    "mamba": MambaConfig,
    "aim": AiMConfig,
    "dit": DiTConfig,
    "flexidit": FlexiDiTConfig,
    "dih": DiHConfig,
    "jit": JiTConfig,
    "text_video_dih": TextVideoDiHConfig,
    "vq_tokenizer": VQTokenizerConfig,
}
PROCESSES = {
    "autoregressive": Autoregressive,
    "adversarial_reconstruction": AdversarialReconstruction,
    "gaussian_diffusion": GaussianDiffusion,
    "flow_matching": FlowMatching,
    "flexible_diffusion": FlexibleDiffusion,
    "flexible_flow": FlexibleFlow,
    "noise_levels": NoiseLevels,
}
DATA = {
    "text": Data,
    "images": ImageData,
    "videos": VideoData,
    "codes": CodeData,
    "latents": LatentData,
}
SAMPLES = {
    "text": Sample,
    "images": ImageSample,
    "diffusion": DiffusionSample,
    "flexible": FlexibleSample,
    "levels": LevelSample,
}
