"""Which arm of a run is the null control of which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dgd_lightning.decode.guided import as_readout
from dgd_lightning.modules.arms import Arm


def control_of(arms: Sequence[Arm]) -> dict[str, str]:
    """By name of a null control, the arm it controls: it differs from it in the readout that it stands in for alone."""
    plain = {arm.name: replace(arm, name="", readout=as_readout(arm.readout)) for arm in arms if arm.blends}
    found = {}
    for name, arm in plain.items():
        controls = getattr(arm.readout, "controls", None)  # a user's own readout may lack it
        original = controls() if controls else None
        if original is None:
            continue
        wanted = replace(arm, readout=original)
        twin = next((other for other, settings in plain.items() if settings == wanted), None)
        if twin is not None:
            found[name] = twin
    return found
