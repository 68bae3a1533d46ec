"""`lintime flexify`: a trained DiT into a FlexiDiT, which takes several patch sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...model.layers.patches import Patch, patch_name
from ...model.nets.dit import DiT, DiTConfig
from ...model.nets.flexidit import FlexiDiTConfig, flexify
from ..arrays import config_beside, must_be_new, read_arrays, read_hyperparameters
from ..checkpoint import FOLDER, restore_inference, save_inference
from ..config_files import read_config, save_config
from ..errors import UserError
from ..loaded.flexible import mode_costs, shown_budget
from ..override import apply_overrides
from ..schema import Run
from ..tasks.flexible import flexible_run, split_base
from ..validate import validate
from . import dit as convert_dit
from .command import recognise

EXAMPLES = """\
examples:
  lintime flexify runs/dit --patch-sizes 2,4 --out runs/flexi
  lintime flexify DiT-XL-2-256x256.pt --patch-sizes 2,4 --variant lora --out runs/x net.rank=32
  lintime flexify SiT-XL-2-256.pt --layout sit --patch-sizes 2,4 --out runs/flexi-sit
"""


BASE = "net.base."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lintime flexify`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "source", metavar="RUN|FILE", help="run directory, or published DiT weights"
    )
    parser.add_argument(
        "--patch-sizes", metavar="P,P,..", required=True,
        help="all patch sizes the net shall take, its own included; of videos 1x2x2,2x4x4",
    )  # fmt: skip
    parser.add_argument(
        "--variant", choices=["shared", "lora"], default="shared",
        help="shared: all sizes train the same weights (default); lora: the DiT is frozen, other "
        "sizes have embeddings of their own and adapters",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", required=True, help="run directory to make")
    parser.add_argument(
        "--layout", choices=convert_dit.LAYOUTS, help="of a published file: DiT (default) or SiT"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the adapters' first weights")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. net.rank=32")


def run_command(arguments: argparse.Namespace) -> None:
    """`lintime flexify`: makes the run and says what its modes cost."""
    run = flexify_run(
        arguments.source, arguments.out, patch_sizes=parse_sizes(arguments.patch_sizes),
        variant=arguments.variant, layout=arguments.layout, seed=arguments.seed,
        overrides=arguments.overrides,
    )  # fmt: skip
    net, out = run.net, arguments.out
    print(f"{out} holds the FlexiDiT; patch size {patch_name(net.powerful)} is the DiT as it was.")
    costs, what = mode_costs(net), "video" if net.base.frames else "image"
    for patch, cost in costs.items():
        print(
            f"  patch size {patch_name(patch)}: {cost / 1e9:.4g} Gmacs per {what} and step, "
            f"{cost / costs[net.powerful]:.1%}"
        )
    others = ", ".join(map(patch_name, net.others))
    if others:
        print(
            f"Patch size {others} has learned nothing yet. Fine-tune, then draw at a budget:\n"
            f"  lintime train CONFIG init_from={out}"
        )
        if budget := shown_budget(net):
            print(f"  lintime sample --run {out} --budget 1,{budget:g}")


def parse_sizes(text: str) -> tuple[Patch, ...]:
    """Patch sizes from "2,4", or "1x2x2,2x4x4" for videos.

    Raises:
        UserError: not whole numbers.
    """
    try:
        sides = [tuple(map(int, part.split("x"))) for part in text.split(",")]
        return tuple(side[0] if len(side) == 1 else side for side in sides)
    except ValueError:
        raise UserError(
            f"--patch-sizes {text}: give whole numbers separated by commas, e.g. 2,4, or "
            "1x2x2,2x4x4 for videos"
        ) from None


def flexify_run(
    source: str | Path,
    out: str | Path,
    *,
    patch_sizes: Sequence[Patch],
    variant: str = "shared",
    layout: str | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Run:
    """Make a run directory with the FlexiDiT of a trained DiT, for `sample` and `init_from`.

    Args:
        source: run directory (its averaged weights where it keeps them), or a published checkpoint,
            as `convert` reads it. out: run directory to make.
        patch_sizes, variant: of `FlexiDiTConfig`. seed: of the adapters.
        layout: of a published checkpoint, as for `convert`.
        overrides: `field=value`, applied last: settings of the net such as net.rank, or whatever
            the run needs. net.base.n_head and the like tell what a published file does not; they
            cannot change the DiT of a run.

    Returns:
        The new run.

    Raises:
        UserError: the source is no DiT or is flexible already, patch sizes that cannot be, `out`
            exists, or an override that changes the DiT.
    """
    out = must_be_new(Path(out))
    told = [o.replace(BASE, "net.", 1) for o in overrides if o.startswith(BASE)]
    run, params = _trained_dit(Path(source), layout, told)
    base = run.net
    net = FlexiDiTConfig(base=base, patch_sizes=tuple(patch_sizes), variant=variant)
    run = apply_overrides(flexible_run(run, net), overrides)
    if run.net.base != base:
        raise UserError(
            f"net.base is the DiT of {source} and cannot be changed; leave out "
            f"{', '.join(o for o in overrides if o.startswith(BASE))}"
        )
    validate(run)
    try:
        params = flexify(run.net, params, jax.random.key(seed))
    except ValueError as error:
        raise UserError(f"net: {error}") from error
    variables = jax.tree.map(np.asarray, split_base(params))
    save_inference(out, variables, 0, {"flexified_from": str(source)})
    save_config(run, out / "config.json")
    return run


def _trained_dit(
    source: Path, layout: str | None, told: Sequence[str]
) -> tuple[Run, dict[str, Any]]:
    """The run of a DiT and its parameters; `layout` and overrides `told` are for files.

    Raises:
        UserError: it is of another net, or not readable.
    """
    if (source / FOLDER).is_dir():
        if layout:
            raise UserError(f"--layout {layout} is of published files; {source} is a run")
        run = read_config(source / "config.json")
        _check_kind(run, source)
        net = run.net
        shape = (1, *net.shape)
        one = jax.ShapeDtypeStruct((1,), "int32")
        image = jax.ShapeDtypeStruct(shape, "float32")
        init = lambda *inputs: DiT(net).init(jax.random.key(0), *inputs)["params"]
        abstract = {"params": jax.eval_shape(init, image, one, one)}
        return run, jax.tree.map(np.asarray, restore_inference(source, abstract))["params"]
    flat = read_arrays(source)
    beside = config_beside(source)
    config, reference = read_hyperparameters(beside) if beside else (None, None)
    run, variables = recognise(flat).to_run(
        flat, layout=layout, config=config, reference=reference, overrides=told, source=source
    )
    _check_kind(run, source)
    return run, variables["params"]


def _check_kind(run: Run, source: Path) -> None:
    if isinstance(run.net, FlexiDiTConfig):
        raise UserError(
            f"{source} is flexible already, with patch sizes "
            f"{', '.join(map(patch_name, run.net.patch_sizes))}; name the DiT it was made of"
        )
    if not isinstance(run.net, DiTConfig):
        raise UserError(f"{source} is no DiT; flexify takes a run or a checkpoint of one")
