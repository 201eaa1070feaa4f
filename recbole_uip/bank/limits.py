"""What a bank's service takes in one request, and how often it sees to its files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from recbole_uip.settings import SettingsError

__all__ = ["ServiceSettings"]


def _setting(default: float, what: str) -> float:
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of a request, and how often the bank's files are written or read.

    Parameters
    ----------
    max_users, max_items, max_events : int
        Entries of a request.
    max_bytes : int
        Size of a request's body.
    body_seconds : float
        In which a request's body must have come.
    commit_seconds : float
        Between a writer's commits; a crash loses at most the events since the last.
    refresh_seconds : float
        Between a reader's checks for new commits.

    Raises
    ------
    SettingsError
        If one is not a finite number above 0.
    """

    max_users: int = _setting(10_000, "users of a look-up")
    max_items: int = _setting(10_000, "items of a match or a score")
    max_events: int = _setting(10_000, "events of an update")
    max_bytes: int = _setting(4 << 20, "bytes of a request")
    body_seconds: float = _setting(30.0, "seconds in which a request's body must have come")
    commit_seconds: float = _setting(10.0, "with --write, commit so often")
    refresh_seconds: float = _setting(10.0, "without --write, look for commits so often")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 < value < math.inf:
                raise SettingsError(f"{each.name}={value!r} must be a finite number above 0")
