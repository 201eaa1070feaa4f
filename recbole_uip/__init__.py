"""UserIP-Tuning for RecBole: inferred user profiles as token fields of stock CTR models."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["ProfileEncoder", "run_recbole_uip"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the core of this package must not import RecBole.
    if name == "run_recbole_uip":
        from recbole_uip.bridge.run import run_recbole_uip

        return run_recbole_uip
    if name == "ProfileEncoder":
        from recbole_uip.bank.transformer import ProfileEncoder

        return ProfileEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
