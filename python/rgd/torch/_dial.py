"""`tau` and `scale` as attributes of objects that have a weighting; for `rgd.KL` they are the dial."""

from __future__ import annotations

import dataclasses
from typing import Any

from rgd.weightings import Weighting


class NoNumberError(AttributeError, TypeError):
    """A weighting without `tau` or `scale`: an AttributeError for `hasattr`, and a TypeError as in 0.1.0."""


class Dial:
    """A loss, a loss function or an optimizer with a `weighting` that can be set."""

    weighting: Any

    @property
    def tau(self) -> float:
        """The clipping factor of the weighting, if it has one. Setting it replaces the weighting."""
        return number_of(self.weighting, "tau")

    @tau.setter
    def tau(self, tau: float) -> None:
        number_of(self.weighting, "tau")
        self.weighting = dataclasses.replace(self.weighting, tau=tau)

    @property
    def scale(self) -> float:
        """The scaling factor of the weighting, if it has one. Setting it replaces the weighting.

        For `rgd.KL` this is the dial. If its sign changes while `tau` is the default of the old sign, `tau`
        becomes the default of the new sign: infinite for a negative scale, else 1.
        """
        return number_of(self.weighting, "scale")

    @scale.setter
    def scale(self, scale: float) -> None:
        number_of(self.weighting, "scale")
        turn = getattr(self.weighting, "with_scale", None)
        new = dataclasses.replace(self.weighting, scale=scale) if turn is None else turn(scale)
        self.weighting = new


def number_of(weighting: Weighting, name: str) -> float:
    """A number of a weighting; if it was not given, the value that follows from the others.

    Raises:
        NoNumberError: If there is no such number.
    """
    if not hasattr(weighting, name):
        example = {"tau": "tau=1.0", "scale": "scale=-0.7"}[name]
        raise NoNumberError(
            f"{weighting} has no {name}: set weighting=..., as in weighting=rgd.KL({example})"
        )
    value = getattr(weighting, name)
    return getattr(weighting, f"effective_{name}") if value is None else value
