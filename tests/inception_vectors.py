"""Vectors of the FID Inception network from an independent implementation, torchvision's.

`python -m tests.inception_vectors FILE` (with torch and torchvision installed, which no test needs)
builds torchvision's Inception3 in float64, exchanges the pools that differ, fills it with the
numbers of `published_arrays`, runs it on `images()` and writes what `tests/inception_vectors.npz`
holds: per stage the mean, the standard deviation and SAMPLES values of each image, and the whole
outputs that the metrics read. Written with torch 2.13.0, torchvision 0.28.0.
"""

import sys
import zlib

import numpy as np

from lintime.model.nets.inception import reference_shapes

SAMPLES = 24
HEIGHT, WIDTH = 256, 200


def bits(name: str, count: int) -> np.ndarray:
    """64-bit numbers of a bit generator, whose stream numpy promises not to change."""
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)


def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of that name: uniform, so scaled that activations stay between 0.3 and 10."""
    count = int(np.prod(shape))
    uniform = (bits(name, count) >> np.uint64(40)).astype(np.float64) / 2**24
    if name.endswith("conv.weight") or name == "fc.weight":
        high = (6 / np.prod(shape[1:])) ** 0.5
        low = -high
    elif name.endswith(("bn.weight", "running_var")):
        low, high = 0.5, 1.5
    else:
        low, high = -0.3, 0.3
    return (low + (high - low) * uniform).astype(np.float32).reshape(shape)


def published_arrays() -> dict[str, np.ndarray]:
    """Made-up weights with the names and shapes of the published file."""
    return {name: array(name, shape) for name, shape in reference_shapes().items()}


def images() -> np.ndarray:
    """Two images [2, HEIGHT, WIDTH, 3] uint8: noise, and noise in squares of 8 pixels."""
    count = 2 * HEIGHT * WIDTH * 3
    out = (bits("images", count) >> np.uint64(56)).astype(np.uint8)
    out = out.reshape(2, HEIGHT, WIDTH, 3)
    out[1] = np.kron(out[1, ::8, ::8], np.ones((8, 8, 1), np.uint8))
    return out


def summary(stage: np.ndarray) -> np.ndarray:
    """[B, 2 + SAMPLES]: mean, standard deviation and evenly spaced values of a stage, NHWC."""
    flat = np.asarray(stage, np.float64).reshape(len(stage), -1)
    at = np.linspace(0, flat.shape[1] - 1, SAMPLES).astype(int)
    return np.concatenate([flat.mean(1)[:, None], flat.std(1)[:, None], flat[:, at]], 1)


def main(path: str) -> None:
    import torch
    from torchvision.models import inception

    functional = inception.F
    plain_average = functional.avg_pool2d
    in_last_block = []

    def block_pool(x, **window):
        if in_last_block:
            return functional.max_pool2d(x, **window)
        return plain_average(x, **window, count_include_pad=False)

    functional.avg_pool2d = block_pool
    net = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net = net.double().eval()
    shapes = {n: tuple(a.shape) for n, a in net.state_dict().items() if "num_batches" not in n}
    arrays = {name: torch.from_numpy(array(name, shape)) for name, shape in shapes.items()}
    net.load_state_dict(arrays, strict=False)
    net.Mixed_7c.register_forward_pre_hook(lambda *_: in_last_block.append(True))
    net.Mixed_7c.register_forward_hook(lambda *_: in_last_block.clear())
    renamed = {"maxpool1": "MaxPool_1", "maxpool2": "MaxPool_2", "avgpool": "pool", "fc": "logits"}
    stages = {}

    def keep(name):
        def hook(_, inputs, output):
            stages[name] = output

        return hook

    for name, module in net.named_children():
        if name != "dropout":
            module.register_forward_hook(keep(renamed.get(name, name)))
    net.Mixed_6d.branch1x1.register_forward_hook(keep("spatial"))

    # The resize by another road: sampling at positions i * size / 299, borders repeated.
    def positions(size):
        at = torch.arange(299, dtype=torch.float64) * (size / 299)
        return at.clamp(max=size - 1) * 2 / (size - 1) - 1

    y, x = torch.meshgrid(positions(HEIGHT), positions(WIDTH), indexing="ij")
    grid = torch.stack([x, y], -1).expand(2, 299, 299, 2)
    pixels = torch.from_numpy(images()).permute(0, 3, 1, 2).double()
    pixels = functional.grid_sample(pixels, grid, padding_mode="border", align_corners=True)
    stages["input"] = (pixels - 128) / 128
    with torch.no_grad():
        net(stages["input"])

    out = {}
    for name, stage in stages.items():
        stage = stage.permute(0, 2, 3, 1) if stage.ndim == 4 else stage
        stage = stage.numpy()
        if name == "spatial":
            out[name] = stage[:1, :, :, :7]
        elif name in ("pool", "logits"):
            out[name] = stage.reshape(2, -1)
        else:
            out[name] = summary(stage)
    np.savez_compressed(path, **{name: a.astype(np.float32) for name, a in out.items()})


if __name__ == "__main__":
    main(sys.argv[1])
