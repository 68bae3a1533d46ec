"""`lintime distill`: another mixer for the attention of a trained DiT, which learns from it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from ...model.nets.dit import DiTConfig
from ..checkpoint import FOLDER
from ..config_files import read_config
from ..errors import UserError
from ..override import apply_overrides
from ..prepare.encoding import encoded_dir
from ..schema import EMA, Distill, LatentData, Optim, Run
from ..tasks.distill import read_teacher, same_mixers
from ..validate import check_overrides, validate

EXAMPLES = """\
examples:
  lintime distill runs/dit --mixer pom --out runs/dit-pom
  lintime distill runs/dit --out runs/dit-pom --layer-steps 500 --steps 2000 net.degree=3
  lintime distill runs/dit --out runs/dit-pom distill.denoise_weight=1 stages.0.batch_size=64
"""

MIXERS = ("pom", "mamba2", "mamba1")
LAYER_STEPS, STEPS = 2000, 10000
END = Optim(learning_rate=2e-4, warmup=100, b2=0.99, clip=1.0)
LAYERS = dataclasses.replace(END, learning_rate=1e-3)
DECAY = 0.99  # of averages, at most
STAGE = "stages.0."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lintime distill`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "teacher", metavar="RUN", help="run directory of the DiT (of a published one: `convert`)"
    )
    parser.add_argument(
        "--mixer", choices=MIXERS, default="pom", help="in place of its own (default pom)"
    )
    parser.add_argument(
        "--out", "--run", metavar="DIR", required=True, help="run directory to make, or continue"
    )
    parser.add_argument(
        "--layer-steps", type=int, default=LAYER_STEPS, metavar="N",
        help=f"updates layer by layer (default {LAYER_STEPS:,}); 0 leaves that stage out",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N",
        help=f"updates end to end (default {STEPS:,})",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value",
        help="of both stages, e.g. net.degree=3; stages.0.FIELD=.. of the first alone",
    )  # fmt: skip


def run_command(arguments: argparse.Namespace) -> None:
    """`lintime distill`: trains both stages in the run directory, or goes on with them."""
    from ..finish import finish
    from ..launch import join, program
    from ..loop import train

    run = distill_run(
        arguments.teacher, mixer=arguments.mixer, layer_steps=arguments.layer_steps,
        steps=arguments.steps, overrides=arguments.overrides,
    )  # fmt: skip
    join(arguments.coordinator, arguments.processes, arguments.process_index, arguments.distributed)
    result = train(run, arguments.out)
    words = [*program(), "distill", arguments.teacher, "--mixer", arguments.mixer]
    words += ["--layer-steps", str(arguments.layer_steps), "--steps", str(arguments.steps)]
    words += [*arguments.overrides, *(["--distributed"] if arguments.distributed else [])]
    sys.stdout.flush()
    finish(run, result, [*words, "--run", arguments.out])


def distill_run(
    teacher: str | Path,
    *,
    mixer: str = "pom",
    layer_steps: int = LAYER_STEPS,
    steps: int = STEPS,
    overrides: Sequence[str] = (),
) -> Run:
    """The run that gives a trained DiT another mixer, on the teacher's own data and process.

    Stage 0 trains the new mixers layer by layer, then the run trains everything end to end. PoM is
    as in the published distillation of SD3 (degree 4, expand 2, as many gates as heads). Optimisers
    are `LAYERS` and `END`; where the teacher was averaged, so is the student, over fewer updates.

    Args:
        teacher: run directory of a DiT.
        mixer: of the student. layer_steps, steps: updates of the stages; 0 layer_steps for no
            stage.
        overrides: `field=value`, of both stages; `stages.0.field=value` of the first alone.

    Returns:
        The run, for `train`.

    Raises:
        UserError: the teacher is not there or cannot have another mixer, or a faulty value.
    """
    teacher = Path(teacher)
    if not (teacher / "config.json").is_file() or not (teacher / FOLDER).is_dir():
        raise UserError(
            f"{teacher} is no run directory; name a trained DiT, or make a run of published "
            f"weights with `lintime convert --from {teacher} --out RUN`"
        )
    theirs = read_config(teacher / "config.json")
    if not isinstance(theirs.net, DiTConfig):
        raise UserError(
            f"{teacher} is a {type(theirs.net).__name__}; only a DiT can be given another mixer"
        )
    data, encoded = theirs.data, encoded_dir(theirs, teacher)
    if isinstance(data, LatentData) and not data.path and encoded.is_dir():
        data = dataclasses.replace(data, path=str(encoded))  # they need not be made again
    fields = {"degree": 4, "expand": 2} if mixer == "pom" else {}
    run = dataclasses.replace(
        theirs, net=dataclasses.replace(theirs.net, mixer=mixer, **fields), data=data, stages=(),
        init_from=str(teacher), distill=Distill(teacher=str(teacher)), steps=steps,
        optim=END, ema=EMA(decay=min(theirs.ema.decay, DECAY)),
    )  # fmt: skip
    own = [o for o in overrides if o.startswith(STAGE)]
    run = apply_overrides(run, [o for o in overrides if not o.startswith(STAGE)])
    if same_mixers(theirs.net, run.net):
        raise UserError(f"{teacher} has these mixers already; set net.degree or another --mixer")
    if layer_steps:
        set_by_hand = {k: v for k, v in vars(run.optim).items() if v != getattr(END, k)}
        stage = dataclasses.replace(
            run, steps=layer_steps, distill=Distill(teacher=run.distill.teacher, layers=True),
            optim=dataclasses.replace(LAYERS, **set_by_hand),
        )  # fmt: skip
        run = dataclasses.replace(run, stages=(stage,), init_from="stage:0")
        run = apply_overrides(run, own)
    elif own:
        raise UserError(f"{own[0]}: there is no stage with --layer-steps 0; leave it out")
    validate(run)
    check_overrides(run, overrides)
    for part in (run, *run.stages):
        read_teacher(part)
    return run
