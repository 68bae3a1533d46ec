"""Runs of DiT and FlexiDiT that train in seconds, on images made of noise."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal

from lintime.model.nets.dit import DiTConfig
from lintime.model.nets.flexidit import FlexiDiTConfig
from lintime.model.processes.flexible import FlexibleDiffusion, FlexibleFlow
from lintime.model.processes.flow import FlowMatching
from lintime.model.processes.gaussian import GaussianDiffusion
from lintime.train import loop
from lintime.train.override import apply_overrides
from lintime.train.schema import (
    EMA,
    Checkpoint,
    DiffusionSample,
    FlexibleSample,
    ImageData,
    LatentData,
    Run,
    VideoData,
)
from tests.tiny_images import CLASSES, COMMON, SIZE

NET = DiTConfig(
    input_size=SIZE, patch_size=2, in_channels=3, d_model=16, n_layer=2, n_head=2,
    num_classes=CLASSES, mlp_ratio=2.0, headdim=8, d_state=4, chunk=8,
)  # fmt: skip
FLOW = dataclasses.replace(NET, learn_sigma=False)
KEPT = {"ema": EMA(decay=0.5), "checkpoint": Checkpoint(every=0, keep=9, keep_best=0)}
DRAWN = {"count": 4, "rows": 4, "steps": 3}


def image_data(path) -> ImageData:
    return ImageData(path=str(path), size=SIZE, resize=1.0, validation_fraction=0.2)


def dit_run(images, *overrides: str, flow: bool = False) -> Run:
    """A pixel DiT, four updates: Gaussian diffusion with learned variances, or flow matching."""
    run = Run(
        net=FLOW if flow else NET, process=FlowMatching() if flow else GaussianDiffusion(),
        data=image_data(images), steps=4, **COMMON | KEPT,
        sample=DiffusionSample(method="euler" if flow else "ddpm", **DRAWN),
    )  # fmt: skip
    return apply_overrides(run, overrides)


def latent_run(images, autoencoder, *overrides: str) -> Run:
    """A DiT over the 4x4x2 latents of the tests' autoencoder, whose scaling factor is 0.5."""
    run = dit_run(images, "net.input_size=4", "net.in_channels=2")
    data = LatentData(images=run.data, autoencoder=str(autoencoder), scaling_factor=0.5)
    return apply_overrides(dataclasses.replace(run, data=data), overrides)


def flexible_run(images, *overrides: str, flow: bool = False, variant: str = "shared") -> Run:
    """A FlexiDiT of patch sizes 2 and 4, six updates."""
    run = dit_run(images, flow=flow)
    terms = {"denoise": 0.0, "distill": 1.0} if variant == "lora" else {"distill": 0.5}
    parts = {
        "net": FlexiDiTConfig(base=run.net, patch_sizes=(2, 4), variant=variant, rank=2),
        "process": (FlexibleFlow if flow else FlexibleDiffusion)(**terms),
        "sample": FlexibleSample(**vars(run.sample)),
        "steps": 6,
    }
    return apply_overrides(dataclasses.replace(run, **parts), overrides)


@contextlib.contextmanager
def stopped_after(step: int, monkeypatch):
    """The process receives SIGTERM when the last update before `step` is handed out."""
    original, seen = loop.put_batch, []

    def put_batch(batch, number, *rest):
        if number == step - 1 and not seen:
            seen.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", put_batch)
        yield


def video_run(path, *overrides: str, flexible: bool = False, variant: str = "shared") -> Run:
    """A DiT of videos, four frames of 8x8 in patches of 2x2x2, three updates; or a FlexiDiT that
    takes patches of 1x4x4 and 4x4x4 as well."""
    run = dit_run(path, flow=True)
    net = dataclasses.replace(run.net, frames=4, patch_frames=2, mixing="factorised")
    data = VideoData(path=str(path), size=SIZE, frames=4, validation_fraction=0.2)
    run = dataclasses.replace(run, net=net, data=data, steps=3)
    if flexible:
        sizes = ((2, 2, 2), (1, 4, 4), (4, 4, 4))
        parts = {
            "net": FlexiDiTConfig(base=net, patch_sizes=sizes, variant=variant, rank=2),
            "process": FlexibleFlow(distill=0.5),
            "sample": FlexibleSample(**vars(run.sample)),
        }
        run = dataclasses.replace(run, **parts)
    return apply_overrides(run, overrides)
