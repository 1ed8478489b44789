"""What is done to a latent: f becomes f'."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tubelet.config import Config


class Suppress(Config):
    """f' = -strength x the latent's largest observed activation, active or not."""

    kind: Literal["suppress"] = "suppress"
    strength: float = Field(default=0.0, ge=0)
    """0: the latent is switched off (f' = 0). 2: as in saev's demonstrations (Stevens et al., s = -2)."""


class Amplify(Config):
    """f' = factor x f: only where the latent is active."""

    kind: Literal["amplify"] = "amplify"
    factor: float = 4.0
    """1 changes nothing, 0 switches off."""


class SetTo(Config):
    """f' = value, active or not."""

    kind: Literal["set"] = "set"
    value: float
    """In units of the code."""


Operation = Annotated[Suppress | Amplify | SetTo, Field(discriminator="kind")]
