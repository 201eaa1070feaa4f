"""What RecBole refuses, said as one clear error."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from recbole_uip.settings import SettingsError

__all__ = ["recbole_refusals"]

logger = logging.getLogger(__name__)

# What RecBole raises, knowingly or not, where a setting or a file is not what it takes; the last
# two are torch's for a size or an optimiser that it cannot make, and for want of memory.
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError)
_REFUSALS += (ImportError, TypeError, ValueError, RuntimeError, MemoryError)


@contextlib.contextmanager
def recbole_refusals(config: Any = None) -> Iterator[None]:
    """Turn an exception that RecBole's own code raised into a :class:`SettingsError`.

    The error names the settings of RecBole's that ``config`` was given.

    RecBole checks few of its settings, so most that it cannot use end in a plain exception
    somewhere within it. An exception of this package's own code is a defect, and goes on.
    """
    try:
        yield
    except SettingsError:
        raise
    except _REFUSALS as error:
        where = _last_frame(error.__traceback__)
        if where is None:
            raise
        logger.debug("what RecBole raised", exc_info=True)
        reason = " ".join(str(error).split()) or "no message"
        # A config that is not whole yet may not know them.
        given = vars(config).get("external_config_dict", {}) if config is not None else {}
        keys = ", ".join(sorted(key for key in given if not key.startswith("uip_")))
        yours = f" (given are {keys})" if keys else ""
        raise SettingsError(
            f"RecBole cannot use a setting or the data: {reason} ({type(error).__name__} in "
            f"{where}). Check the settings that this names{yours}, and that the files have the "
            "columns and types that load_col and the other settings ask for"
        ) from error


def _last_frame(traceback: TracebackType | None) -> str | None:
    """The function and module of the innermost frame of RecBole, unless ours is further in."""
    found = None
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if package == "recbole":
            found = f"{traceback.tb_frame.f_code.co_name} of {module}"
        elif package == "recbole_uip":
            found = None
        traceback = traceback.tb_next
    return found
