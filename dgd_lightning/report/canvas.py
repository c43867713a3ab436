"""An empty matplotlib figure, made without pyplot: no global state, no display; imported when the first is drawn."""

from typing import Any


def empty_figure(width: float, height: float) -> Any:
    """A figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
