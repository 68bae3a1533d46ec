"""Vectors of the KL autoencoder from the published implementation, diffusers' AutoencoderKL.

`python -m tests.autoencoder_vectors FILE` (with torch and diffusers installed, which no test needs)
fills a small one with the numbers of `array`, encodes `images()` and decodes `latents()` in
float64, and writes what `tests/autoencoder_vectors.npz` holds: these outputs, and the names and
shapes of Stable Diffusion's autoencoder. Written with torch 2.13.0, diffusers 0.42.1.
"""

import sys

import numpy as np

from tests.inception_vectors import bits

# Three levels: shortcuts where channels change, two resizes each way; sides that differ.
SMALL = dict(
    block_out_channels=(32, 64, 96), layers_per_block=1, latent_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
)  # fmt: skip
RELEASED = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
HEIGHT, WIDTH = 16, 12


def uniform(name: str, *shape: int) -> np.ndarray:
    """Numbers in [-1, 1) that depend on the name alone."""
    count = int(np.prod(shape))
    return ((bits(name, count) >> np.uint64(40)) / 2**23 - 1).astype(np.float32).reshape(shape)


def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter of that name: no bias 0, no gain 1, activations of about one size."""
    if len(shape) > 1:
        gain = 3.0 if ".to_q" in name or ".to_k" in name else 1.0  # attention that attends
        return gain * uniform(name, *shape) * np.float32((3 / np.prod(shape[1:])) ** 0.5)
    middle = 1.0 if name.endswith("weight") else 0.0
    return np.float32(middle) + 0.5 * uniform(name, *shape)


def images() -> np.ndarray:
    """[2, HEIGHT, WIDTH, 3] in [-1, 1]."""
    return uniform("images", 2, HEIGHT, WIDTH, 3)


def latents() -> np.ndarray:
    """[2, HEIGHT / 4, WIDTH / 4, 3]."""
    return 2 * uniform("latents", 2, HEIGHT // 4, WIDTH // 4, 3)


def main(path: str) -> None:
    import torch
    from diffusers import AutoencoderKL

    net = AutoencoderKL(**SMALL).double().eval()
    names = {n: torch.from_numpy(array(n, tuple(a.shape))) for n, a in net.state_dict().items()}
    net.load_state_dict(names)
    enter = lambda a: torch.from_numpy(a).permute(0, 3, 1, 2).double()
    leave = lambda a: a.permute(0, 2, 3, 1).numpy().astype(np.float32)
    with torch.no_grad():
        posterior = net.encode(enter(images())).latent_dist
        decoded = net.decode(enter(latents())).sample
    with torch.device("meta"):
        released = AutoencoderKL(**RELEASED).state_dict()
    np.savez_compressed(
        path, mean=leave(posterior.mean), logvar=leave(posterior.logvar), decoded=leave(decoded),
        released="\n".join(f"{n} {tuple(a.shape)}" for n, a in sorted(released.items())),
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
