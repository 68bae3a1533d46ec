"""`lintime convert`: published checkpoints in and out, and dense attention into VQ attention."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...model.nets.aim import AiMConfig
from ...model.nets.dih import DiHConfig
from ...model.nets.dit import DiTConfig
from ...model.nets.flexidit import FlexiDiTConfig
from ...model.nets.jit import JiTConfig
from ...model.nets.mamba_lm import MambaConfig
from ...model.nets.transformer_vq import TransformerVQConfig
from ...model.nets.vq_tokenizer import VQTokenizerConfig
from ..arrays import (
    WEIGHTS,
    config_beside,
    encode_arrays,
    must_be_new,
    read_arrays,
    read_hyperparameters,
)
from ..checkpoint import save_inference
from ..config_files import load_config, read_config, save_config
from ..errors import UserError
from ..files import write_atomic
from ..schema import CodeData, DiffusionSample, ImageData, Run
from ..validate import validate
from ..weights import check_weights
from . import (
    aim as convert_aim,
    dih as convert_dih,
    dit as convert_dit,
    flexidit as convert_flexidit,
    jit as convert_jit,
    mamba as convert_mamba,
    tokenizer as convert_tokenizer,
    transformer_vq as convert_vq,
)
from .transformer_vq import dense_run_to_vq

EXAMPLES = """\
examples:
  lintime convert --from checkpoint_125000 --config hyperparameters.json --out runs/enwik8
  lintime convert --from x.npz --out runs/x net.block_len=512 net.mem_len=512 net.logit_scale=1
  lintime convert --from mamba-130m --out runs/mamba-130m      # a folder with config.json
  lintime convert --run runs/x --to safetensors --out x.safetensors
  lintime convert --run runs/mamba --to bin --out mamba        # for mamba_ssm's from_pretrained
  lintime convert --from aim-xlarge --out runs/aim-xl          # AiM with its tokenizer
  lintime convert --from vq_ds16_c2i.pt --out runs/vq16        # a tokenizer alone
  lintime convert --from DiT-XL-2-256x256.pt --out runs/dit    # --layout sit for SiT
  lintime convert --from last.ckpt --out runs/jit              # JiT, its first average
  lintime convert --from DiH.ckpt --out runs/dih               # its averaged weights
  lintime convert --run runs/flexi --to safetensors --out flexi   # and --from flexi, back
  lintime convert --run runs/dense --to vq --out runs/dense-vq net.n_code=512
"""
# Each system's module has to_run(flat, ...) and from_run(run, ...).
SYSTEMS = {
    TransformerVQConfig: convert_vq,
    MambaConfig: convert_mamba,
    AiMConfig: convert_aim,
    VQTokenizerConfig: convert_tokenizer,
    DiTConfig: convert_dit,
    FlexiDiTConfig: convert_flexidit,
    JiTConfig: convert_jit,
    DiHConfig: convert_dih,
}
LAYOUTS = {name: module for module in SYSTEMS.values() for name in module.LAYOUTS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lintime convert`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--from", "--run", dest="source", metavar="PATH", required=True,
        help="checkpoint to read (.safetensors, .npz, PyTorch .bin or .ckpt, checkpoint_<step>, "
        "state_<step>, or a folder of such), or a run directory",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="PATH", required=True, help="run directory, file or folder to make"
    )
    parser.add_argument(
        "--to", choices=["run", "vq", *WEIGHTS], default="run",
        help="run: run directory from a checkpoint (default); vq: dense run into a VQ run; "
        "safetensors, bin (PyTorch), npz: run into a file of the published layout",
    )  # fmt: skip
    parser.add_argument("--layout", choices=list(LAYOUTS), help="default: the one that fits")
    parser.add_argument(
        "--config", metavar="JSON|NAME",
        help="published hyperparameters as a JSON object, or a lintime config; default: the "
        "config.json beside the checkpoint, if there is one",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. net.mem_len=512")


def run_command(arguments: argparse.Namespace) -> None:
    """`lintime convert`: dispatches on --to and says what to do next."""
    source, out = Path(arguments.source), Path(arguments.out)
    if arguments.to == "vq":
        dense_run_to_vq(source, out, overrides=arguments.overrides)
        print(
            f"{out} holds the VQ model. Fine-tune it for a few percent of the training steps:\n"
            f"  lintime train CONFIG net.attention=vq init_from={out}\n"
            "with the CONFIG and the settings of the dense run. As it is:\n"
            f"  lintime eval --run {out}"
        )
    elif arguments.to == "run":
        config, reference = _read_config_argument(arguments.config)
        convert(
            source, out, layout=arguments.layout, config=config, reference=reference,
            overrides=arguments.overrides,
        )  # fmt: skip
        run = read_config(out / "config.json")
        if isinstance(run.net, VQTokenizerConfig):
            print(
                f"{out} is ready:\n  lintime eval --run {out} data.path=IMAGES\n"
                f"  lintime sample --run {out} data.path=IMAGES\n"
                f"  lintime prepare codes IMAGES --tokenizer {out} --out DIR"
            )
        elif isinstance(run.sample, DiffusionSample):
            pixels = isinstance(run.data, ImageData)
            more = "" if pixels else " data.autoencoder=FOLDER"
            print(f"{out} is ready:\n  lintime sample --run {out}{more}")
        elif isinstance(run.data, CodeData):
            print(
                f"{out} is ready:\n  lintime sample --run {out}\n"
                f"  lintime eval --run {out} eval.samples=50000 eval.inception=FILE "
                "eval.reference=FILE"
            )
        elif run.data.vocab:
            print(
                f"{out} is ready:\n  lintime eval --run {out} data.path=FILE\n"
                f"  lintime sample --run {out}\n  lintime train CONFIG init_from={out}"
            )
        else:
            print(
                f"{out} is ready. It takes the ids of the tokenizer it was trained with:\n"
                f'  run = lintime.load("{out}")  # in Python\n'
                "  logits, _ = run.net.apply(run.variables, ids)  # ids [B, T] int32"
            )
    else:
        layout, weights, hyperparameters = export(
            source, out, file_format=arguments.to, layout=arguments.layout
        )
        print(f"{weights} holds the weights in the {layout} layout, "
              f"{hyperparameters} the hyperparameters.")  # fmt: skip
        run = read_config(source / "config.json")
        says_all = getattr(SYSTEMS[type(run.net)], "says_all", None)
        if says_all and not says_all(run):
            print(
                "The layout says nothing of process and data, and these are not the published "
                f"ones. Back here:\n  lintime convert --from {weights} "
                f"--config {source / 'config.json'} --out DIR"
            )
        if getattr(run.net, "position_offset", 1) == 0:
            print(
                "The layout cannot say net.position_offset=0: the published code samples as if it "
                "were 1, and to read it back here takes convert ... net.position_offset=0"
            )


# ---------------------------------------------------------------- checkpoint -> run directory


def convert(
    source: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    config: Run | None = None,
    reference: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Make a run directory, for `eval`, `sample` and `init_from`, of a published checkpoint.

    Args:
        source: .safetensors, .npz, a PyTorch .bin, a flax `checkpoint_<step>` file, an Orbax
            `state_<step>` directory, or a folder of such: `model.safetensors` or
            `pytorch_model.bin`, also in shards, else the newest. Nothing is ever executed.
        out: run directory to make.
        layout: one of `LAYOUTS`; None finds out.
        config: the run to use; its net must fit the arrays.
        reference: instead of `config`, hyperparameters under the reference's names. With neither,
            a `config.json` beside the arrays is read; without one the net is inferred from the
            arrays and `overrides` tell the rest.
        overrides: `field=value`, applied last.

    Returns:
        `out`.

    Raises:
        UserError: an unreadable source, arrays of another model, or hyperparameters missing.
    """
    out = must_be_new(Path(out))
    flat = read_arrays(source)
    system = LAYOUTS[layout] if layout else recognise(flat)
    beside = config_beside(source)
    if config is None and reference is None and beside:
        config, reference = read_hyperparameters(beside)
    run, variables = system.to_run(
        flat, layout=layout, config=config, reference=reference, overrides=overrides,
        source=source,
    )  # fmt: skip
    validate(run)
    check_weights(run, variables, source)
    runs = {out: (run, variables)}
    if system is convert_aim:
        runs |= convert_aim.extra_runs(flat, out, source)
    for folder, (each, weights) in runs.items():
        save_inference(folder, weights, 0, {"converted_from": str(source)})
        save_config(each, folder / "config.json")
    return out


def recognise(flat: Mapping[str, np.ndarray]) -> ModuleType:
    """The system whose names these are; Transformer-VQ's explains what it does not know."""
    for system in (
        convert_aim, convert_mamba, convert_flexidit, convert_dit, convert_dih, convert_jit,
        convert_tokenizer,
    ):  # fmt: skip
        if system.recognises(flat):
            return system
    return convert_vq


def _read_config_argument(text: str | None) -> tuple[Run | None, dict | None]:
    """--config: (run, None) for a lintime config, (None, hyperparameters) for a reference's."""
    if not text:
        return None, None
    if Path(text).suffix != ".json":
        return load_config(text)[0], None
    return read_hyperparameters(text)


# ---------------------------------------------------------------- run directory -> files


def export(
    run_dir: str | Path, out: str | Path, *, file_format: str, layout: str | None = None
) -> tuple[str, Path, Path]:
    """Write the newest weights of a run (averaged ones, where it keeps them) in a published layout.

    An `out` that ends in the format's suffix gets the arrays, and the same name with .json the
    hyperparameters under the reference's names. Any other `out` becomes a folder with the usual
    names, `model.safetensors`, `pytorch_model.bin` or `model.npz`, and `config.json`.

    Args:
        run_dir: run directory. file_format: "safetensors", "bin" (PyTorch) or "npz".
        layout: as in `convert`; None takes the first that can hold the model.

    Returns:
        The layout written, and the files of the weights and of the hyperparameters.

    Raises:
        UserError: no layout can hold the model, `out` exists, or a package is missing.
    """
    out = must_be_new(Path(out))
    run = read_config(Path(run_dir) / "config.json")
    system = SYSTEMS[type(run.net)]
    if layout and LAYOUTS[layout] is not system:
        raise UserError(f"{run_dir} does not fit {layout}; choose {' or '.join(system.LAYOUTS)}")
    layout, reference, flat = system.from_run(run, run_dir, layout)
    if out.suffix == f".{file_format}":
        weights, hyperparameters = out, out.with_suffix(".json")
    else:
        weights, hyperparameters = out / WEIGHTS[file_format], out / "config.json"
    write_atomic(weights, encode_arrays(flat, file_format))
    write_atomic(hyperparameters, json.dumps(reference, indent=2) + "\n")
    return layout, weights, hyperparameters
