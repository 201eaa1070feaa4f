"""The codes of a bank in Redis: one key a user, looked up without this bank or its model.

============================  =================================================================
``<prefix>meta``              JSON: field names, number type, the codes of unknown users, the
                              bank's generation, and which keys hold the users
``<prefix><n>:<user>``        the user's codes of export n, in the order of the field names, as
                              little-endian unsigned integers of one size
============================  =================================================================

A user is one plain string, not a hash: a code takes 1 byte (2 where a field has more than 255
tokens), where a hash repeats every field's name in every user. With the default profile that is
6 bytes a user, and 72 with what Redis says a key and its value take (106 with its own table).

An export writes its users under new keys and then replaces ``meta``, which is its commit point,
as the manifest is the bank's: readers see the old codes or the new, never some of each. It
takes the memory of both until it has deleted the old. One export at a time; no Redis Cluster,
whose nodes answer for parts of the keys alone.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recbole_uip.bank.store import BankError
from recbole_uip.bank.tokens import token_array

if TYPE_CHECKING:
    import redis

    from recbole_uip.bank.bank import FeatureBank

__all__ = ["RedisLookup", "from_redis", "to_redis"]

FORMAT = 1


def to_redis(
    bank: FeatureBank, client: redis.Redis, prefix: str = "uip:", batch: int = 1000
) -> int:
    """Put every user's codes into Redis, and delete those of the export before.

    Parameters
    ----------
    bank : FeatureBank
        Its codes as they are now, updates included that are not committed.
    client : redis.Redis
        Without ``decode_responses``.
    prefix : str
        Begins every key of this bank, and is not empty. No other keys may begin with it.
    batch : int
        Users written in one round trip.

    Returns
    -------
    int
        Number of users.

    Raises
    ------
    BankError
        If the client decodes answers, ``prefix`` is empty, or a key under it is not of this
        package.
    """
    _check_client(client)
    if not prefix:
        # Any key of digits and a colon would be one of an export before, and deleted.
        raise BankError("prefix='' would take every key for one of this bank: give one, as 'uip:'")
    if batch < 1:
        raise BankError(f"batch={batch} must be at least 1")
    users, dtype = bank.users(), _number_type(bank)
    old = _read_meta(client, prefix)
    number = 1 if old is None else old["export"] + 1
    mine = f"{prefix}{number}:"
    _delete_exports(client, prefix, keep={old and old["export"]})  # of one that was killed
    for low in range(0, len(users), batch):
        block = users[low : low + batch]
        codes = bank.look_up_many(block).astype(dtype)
        # One command for many users: four times as fast as a pipeline of one command each.
        client.mset({mine + user: row.tobytes() for user, row in zip(block, codes, strict=True)})
    meta = {
        "format": FORMAT,
        "export": number,
        "generation": bank.generation,
        "users": len(users),
        "fields": list(bank.fields),
        "dtype": dtype,
        "unknown": bank.unknown_codes.tolist(),
    }
    client.set(_meta_key(prefix), json.dumps(meta))
    _delete_exports(client, prefix, keep={number})
    return len(users)


def from_redis(client: redis.Redis, prefix: str = "uip:") -> RedisLookup:
    """Look-ups of what :func:`to_redis` has put under ``prefix``."""
    return RedisLookup(client, prefix)


class RedisLookup:
    """Codes by user token, from Redis; the same as the bank's at the time of the export.

    Parameters
    ----------
    client : redis.Redis
        Without ``decode_responses``.
    prefix : str

    Attributes
    ----------
    fields : tuple of str
        Names of what :meth:`look_up` gives, in order.
    generation : int
        Commit that the bank stood on.

    Raises
    ------
    BankError
        If there is no export under ``prefix``, or it is of another version.
    """

    def __init__(self, client: redis.Redis, prefix: str = "uip:") -> None:
        _check_client(client)
        self._client, self._prefix, self._export = client, prefix, None
        self._load()

    def __len__(self) -> int:
        """Number of users."""
        return self._n_users

    def look_up(self, user: str) -> np.ndarray:
        """Codes of a user, shape (n_fields,), int32; those of an empty history for an unknown one.

        One round trip; two for an unknown user, who might be known to a newer export. Errors are
        those of :meth:`look_up_many`.
        """
        return self.look_up_many([user])[0]

    def look_up_many(self, users: Sequence[str]) -> np.ndarray:
        """Codes of many users, all of the same export, shape (n, n_fields), int32.

        Raises
        ------
        BankError
            If a user is no string.
        """
        users = token_array(users).to_pylist()
        if not users:
            return np.empty((0, len(self.fields)), np.int32)
        while True:
            values = self._client.mget([self._keys + user for user in users])
            # Nothing is deleted before the metadata name the next export.
            if None not in values or not self._load():
                break
        codes = np.tile(self._unknown, (len(users), 1))
        for row, value in enumerate(values):
            if value is not None:
                codes[row] = np.frombuffer(value, self._dtype)
        return codes

    def _load(self) -> bool:
        """Read the metadata; whether they name another export than before."""
        meta = _read_meta(self._client, self._prefix)
        if meta is None:
            raise BankError(
                f"Redis has no key {_meta_key(self._prefix)!r}: export the bank there first, or "
                "give the prefix it was exported with"
            )
        if meta["export"] == self._export:
            return False
        self._export, self.generation = meta["export"], meta["generation"]
        self._keys, self._dtype = f"{self._prefix}{self._export}:", np.dtype(meta["dtype"])
        self.fields, self._n_users = tuple(meta["fields"]), meta["users"]
        self._unknown = np.array(meta["unknown"], dtype=np.int32)
        return True


def _number_type(bank: FeatureBank) -> str:
    """The smallest little-endian type that holds every token of a look-up."""
    fields = bank.model.encoder.fields
    largest = max((field.size for field in fields if field.name in bank.fields), default=0)
    return np.min_scalar_type(largest).newbyteorder("<").str


def _meta_key(prefix: str) -> str:
    return f"{prefix}meta"


def _read_meta(client: redis.Redis, prefix: str) -> dict[str, Any] | None:
    key = _meta_key(prefix)
    text = client.get(key)
    if text is None:
        return None
    try:
        meta = json.loads(text)
        if meta["format"] != FORMAT:
            raise BankError(
                f"the key {key!r} in Redis has the format {meta['format']!r}, and this recbole-uip "
                f"reads {FORMAT}: export again under another prefix"
            )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BankError):
            raise
        raise BankError(
            f"the key {key!r} in Redis is not of recbole-uip: give another prefix"
        ) from error
    return meta


def _delete_exports(
    client: redis.Redis, prefix: str, keep: Collection[int | None], batch: int = 1000
) -> None:
    """Delete the keys of all exports but those of ``keep``; memory is freed in the background."""
    pattern = re.sub(r"([*?\[\]\\^-])", r"\\\1", prefix) + "[0-9]*"
    number_of = re.compile(re.escape(prefix.encode()) + rb"(\d+):")
    found = ((key, number_of.match(key)) for key in client.scan_iter(match=pattern, count=batch))
    keys = (key for key, number in found if number and int(number[1]) not in keep)
    while chunk := list(itertools.islice(keys, batch)):
        client.unlink(*chunk)


def _check_client(client: redis.Redis) -> None:
    if client.connection_pool.connection_kwargs.get("decode_responses"):
        raise BankError(
            "client has decode_responses=True, and codes are no text: make one without it"
        )
