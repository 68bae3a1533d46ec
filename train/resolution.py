"""Weights of a DiT of another resolution: what becomes of its positions is said, not guessed.

Positions are computed, not stored, so weights fit any resolution; what they mean there is up to
`base_size` of `DiTConfig`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..model.convert.dit import size_of_positions
from ..model.nets.dit import DiTConfig
from ..model.nets.flexidit import FlexiDiTConfig
from .config_files import read_config
from .errors import UserError


def check_resolution(net: DiTConfig | FlexiDiTConfig, size: int, base: int = 0) -> str:
    """What happens to the positions of a checkpoint in a net, "" if they are its own.

    Args:
        net: that takes the weights. size, base: input_size and base_size of what they were trained
            with.

    Raises:
        UserError: they are of another resolution, and the net's base_size does not say what to do.
    """
    net, at = (net.base, "net.base") if isinstance(net, FlexiDiTConfig) else (net, "net")
    base, now = base or size, net.base_size or net.input_size
    if (net.input_size, now) == (size, base):
        return ""
    further = {True: "extrapolates", False: "crops"}[net.input_size > size]
    ways = f"{at}.base_size={base} interpolates them (stretched over the same range)"
    if net.input_size != size:
        ways += f", {at}.base_size={net.input_size} {further} them"
    what = f"positions of a checkpoint of input_size={size} in a net of {net.input_size}"
    if not net.base_size and now != base:
        raise UserError(f"{what}: {ways}; set one of these")
    return f"{what}: {at}.base_size={now}, where {ways}"


def check_positions_of(flat: dict[str, Any], net: DiTConfig | FlexiDiTConfig) -> str:
    """`check_resolution` for the arrays of a published file; "" where they do not tell."""
    dit = net.base if isinstance(net, FlexiDiTConfig) else net
    size = size_of_positions(flat["pos_embed"], dit.patch_size) if "pos_embed" in flat else 0
    if not size or size == dit.input_size:  # the table itself is compared
        return ""
    return check_resolution(net, size)


def check_resolution_of(path: str, net: DiTConfig | FlexiDiTConfig) -> str:
    """`check_resolution` for a run directory; "" for what is none of a DiT, or is to
    become something else."""
    file = Path(path).expanduser() / "config.json"
    saved = read_config(file).net if file.is_file() else None
    saved = saved.base if isinstance(saved, FlexiDiTConfig) else saved
    if not isinstance(saved, DiTConfig) or not isinstance(getattr(net, "base", net), DiTConfig):
        return ""
    return check_resolution(net, saved.input_size, saved.base_size)
