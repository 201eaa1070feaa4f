"""Numbers of tokens: a hash table in compiled code over the bytes of Arrow strings.

A dict of a million tokens answers a single look-up as fast as Python can ask. A million look-ups
at once cost it a second and more: each waits for the memory of a string object, of the dict's
index, of its entry and of the key, one after the other. Here tokens lie end to end as bytes, a
slot of the table is 8 bytes, and the memory of many tokens is asked for before the first is
compared. A token costs its bytes, 8 bytes for where it ends and 11 to 21 for its slot: 0.7 GB
for 25 million users, where a dict of strings takes 3.5 GB.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
import numba
import numpy as np
import pyarrow as pa
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from recbole_uip.bank.store import BankError

__all__ = ["TokenIndex", "decodable", "token_array"]

# Tokens found one by one that are kept at hand as a dict: about 10 MB.
RECENT = 1 << 16
# Fewer tokens are not worth a second thread.
PARALLEL_TOKENS = 50_000
# Tokens decoded at once on iteration.
DECODED = 1 << 16
# Tokens whose memory is asked for together; twice as many lines fit into the first cache.
AHEAD = 64
FIRST_SLOTS = 64

_compiled = numba.njit(cache=True, nogil=True, error_model="numpy")
_inlined = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
# Giving Python's lock away costs a tenth of one look-up.
_called_often = numba.njit(cache=True, error_model="numpy")

# Odd numbers of 32 random-looking bits set; those of wyhash.
_K0, _K1, _K2 = (
    np.uint64(number) for number in (0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3)
)
_NUMBER_BITS = np.uint64(0xFFFFFFFF)
_HASH_BITS = np.uint64(0xFFFFFFFF00000000)


class TokenIndex:
    """Tokens and their numbers: 0, 1, ... in the order in which they came.

    The table is the only truth. Beside it, a dict holds the tokens that :meth:`get` has found
    lately, of bounded size, because whoever looks one user up mostly comes back for that user
    (look-up, match, update).

    One thread at a time may :meth:`add`. Others may look up in the meantime: they find what was
    there before they began, and perhaps what came since.

    Parameters
    ----------
    tokens : pyarrow.Array, pyarrow.ChunkedArray, ndarray or sequence of str, of length n
    what : str
        What a token stands for, for messages.

    Raises
    ------
    BankError
        If a token is given twice, is null or is no string.
    """

    def __init__(self, tokens: Any = (), what: str = "user") -> None:
        self.what = what
        self._n = 0
        # Keyed anew in each process, so that nobody can send tokens that all meet in one slot.
        self._seed = int.from_bytes(os.urandom(7), "little")
        slots = np.zeros(FIRST_SLOTS, np.uint64)
        # Readers take the table as a whole, whatever is put in its place while they read.
        self._set_table(slots, np.zeros(1, np.int64), np.empty(0, np.uint8))
        self._recent: dict[str, int] = {}
        tokens = token_array(tokens, what)
        chunks = [_strings(chunk) for chunk in _chunks(tokens)]
        self._reserve(len(tokens), sum(int(ends[-1] - ends[0]) for ends, _ in chunks))
        for ends, data in chunks:
            first = self._n
            numbers = self._add(ends, data)
            again = np.flatnonzero(numbers != np.arange(first, first + len(numbers)))
            if len(again):
                token = self.take(numbers[again[:1]])[0].as_py()
                raise BankError(f"{what} {token!r} is given twice: leave one out")

    def __len__(self) -> int:
        return self._n

    def __contains__(self, token: str) -> bool:
        return self.get(token) >= 0

    def __iter__(self) -> Iterator[str]:
        """Tokens in the order of their numbers, decoded as they are asked for."""
        for low in range(0, self._n, DECODED):
            yield from _decoded(self.slice(low, low + DECODED))

    def to_list(self) -> list[str]:
        """All tokens in the order of their numbers."""
        return list(self)

    def slice(self, low: int = 0, high: int | None = None) -> pa.LargeStringArray:
        """Tokens of the numbers from ``low`` to before ``high``, without a copy."""
        high = self._n if high is None else min(high, self._n)
        low = min(low, high)
        _, ends, data, _ = self._table
        part = pa.py_buffer(ends[low : high + 1])
        return pa.LargeStringArray.from_buffers(high - low, part, pa.py_buffer(data))

    def take(self, numbers: np.ndarray) -> pa.LargeStringArray:
        """Tokens of many numbers."""
        return self.slice().take(pa.array(numbers))

    def get(self, token: str, default: int = -1) -> int:
        """Number of one token.

        Raises
        ------
        BankError
            If it is no string.
        """
        try:
            number = self._recent.get(token)
        except TypeError:  # it has no hash
            raise BankError(f"{self.what} {token!r} is no string: give strings") from None
        if number is None:
            try:
                with_header = self._with_header
                number = _find_one(token.encode(), with_header[0])
            except UnicodeEncodeError:  # half a surrogate pair, which no file holds
                return default
            except AttributeError:
                raise BankError(f"{self.what} {token!r} is no string: give strings") from None
            if number < 0:
                return default
            if len(self._recent) >= RECENT:
                self._recent.clear()
            self._recent[token] = number
        return number

    def find_many(self, tokens: Any) -> np.ndarray:
        """Numbers of many tokens, -1 for those that are not there.

        Parameters
        ----------
        tokens : pyarrow.Array, pyarrow.ChunkedArray, ndarray or sequence of str, of length n

        Returns
        -------
        ndarray of int64, shape (n,)

        Raises
        ------
        BankError
            If a token is null or no string.
        """
        found = [self._find(*_strings(chunk)) for chunk in _chunks(token_array(tokens, self.what))]
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, np.int64)])

    def add(self, tokens: Any) -> np.ndarray:
        """Numbers of many tokens; those that are not there get the next ones, in their order.

        Parameters and errors are those of :meth:`find_many`.
        """
        chunks = [_strings(chunk) for chunk in _chunks(token_array(tokens, self.what))]
        added = []
        for ends, data in chunks:
            self._reserve(len(ends) - 1, int(ends[-1] - ends[0]))
            added.append(self._add(ends, data))
        return added[0] if len(added) == 1 else np.concatenate([*added, np.empty(0, np.int64)])

    def _find(self, ends: np.ndarray, data: np.ndarray) -> np.ndarray:
        n, table = len(ends) - 1, self._table
        numbers = np.empty(n, np.int64)
        if n < PARALLEL_TOKENS:
            _find_all(ends, data, *table, numbers)
            return numbers
        workers = joblib.cpu_count()
        # More parts than threads, in case that one of them has less of a core than another.
        cuts = np.linspace(0, n, 4 * workers + 1).astype(np.int64)
        with ThreadPoolExecutor(workers) as pool:
            parts = [
                pool.submit(_find_all, ends[low : high + 1], data, *table, numbers[low:high])
                for low, high in itertools.pairwise(cuts)
            ]
            for part in parts:
                part.result()
        return numbers

    def _add(self, ends: np.ndarray, data: np.ndarray) -> np.ndarray:
        """As :meth:`add`, where there is room for all."""
        numbers = np.empty(len(ends) - 1, np.int64)
        self._n = _add_all(ends, data, *self._table, self._n, numbers)
        return numbers

    def _reserve(self, n_more: int, bytes_more: int) -> None:
        """Make room for more tokens, whose bytes number ``bytes_more``."""
        slots, ends, data, _ = self._table
        n, n_bytes = self._n + n_more, int(ends[self._n]) + bytes_more
        if n >= _NUMBER_BITS:
            raise BankError(f"{n:,} {self.what}s are more than an index holds: split the bank")
        ends = _grown(ends, n + 1, self._n + 1)
        data = _grown(data, n_bytes, int(ends[self._n]))
        if 4 * n > 3 * len(slots):  # above, runs of slots that are taken grow long
            slots = np.zeros(1 << (4 * n // 3).bit_length(), np.uint64)
            _rebuild(slots, ends, data, self._seed, self._n)
        self._set_table(slots, ends, data)

    def _set_table(self, slots: np.ndarray, ends: np.ndarray, data: np.ndarray) -> None:
        self._table = (slots, ends, data, self._seed)
        # The table beside its header, so that its memory is there while the header is in use.
        self._with_header = _header(*self._table), self._table


def token_array(tokens: Any, what: str = "user") -> pa.Array | pa.ChunkedArray:
    """Tokens as Arrow strings; nothing is copied that is so already.

    Parameters
    ----------
    tokens : pyarrow.Array, pyarrow.ChunkedArray, ndarray or sequence of str
    what : str
        What a token stands for, for messages.

    Raises
    ------
    BankError
        If a token is null or no string.
    """
    if isinstance(tokens, str):
        raise BankError(f"{what}s={tokens!r} is a text: give a list of {what}s")
    if not isinstance(tokens, pa.Array | pa.ChunkedArray):
        tokens = _array_of(tokens, what)
    tokens = decodable(tokens)
    kind = tokens.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        if len(tokens) and not pa.types.is_string_view(kind):
            raise BankError(f"{what}s are of type {tokens.type}: give strings")
        kind = pa.string()
    if tokens.type != kind:
        tokens = tokens.cast(kind)
    if tokens.null_count:
        row = tokens.is_null().index(pa.scalar(True)).as_py()
        raise BankError(f"{what} in row {row} is null: leave that row out")
    return tokens


def decodable(tokens: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The same, without a dictionary of string views, as polars has them and Arrow cannot read."""
    kind = tokens.type
    if pa.types.is_dictionary(kind) and pa.types.is_string_view(kind.value_type):
        return tokens.cast(pa.dictionary(kind.index_type, pa.large_string()))
    return tokens


def _array_of(tokens: Any, what: str) -> pa.Array:
    """Arrow strings of what is not Arrow."""
    if isinstance(tokens, list | tuple) and tokens:
        # Joining reads each string object twice and calls nothing in between, so the processor
        # can wait for many of them at once; pa.array takes three times as long where they are
        # scattered.
        try:
            text = "\0".join(tokens).encode()
        except (TypeError, UnicodeEncodeError):
            text = None  # pa.array says what is wrong
        if text is not None:
            data = np.frombuffer(text, np.uint8)
            between = np.flatnonzero(data == 0)
            if len(between) == len(tokens) - 1:  # else a token has a zero in it
                return _joined(text, data, between)
    try:
        return pa.array(tokens, pa.large_string())
    except (pa.ArrowException, UnicodeEncodeError, TypeError, ValueError) as error:
        raise BankError(f"{what}s must be strings ({error})") from error


def _joined(text: bytes, data: np.ndarray, between: np.ndarray) -> pa.Array:
    """Tokens of a text with a zero byte between each two."""
    ends = np.empty(len(between) + 2, np.int64)
    ends[0], ends[-1] = 0, len(data) - len(between)
    ends[1:-1] = between - np.arange(len(between))
    text = text.replace(b"\0", b"")
    return pa.LargeStringArray.from_buffers(len(ends) - 1, pa.py_buffer(ends), pa.py_buffer(text))


def _chunks(tokens: pa.Array | pa.ChunkedArray) -> Sequence[pa.Array]:
    return tokens.chunks if isinstance(tokens, pa.ChunkedArray) else [tokens]


def _strings(tokens: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens begin and end, shape (n + 1,), int64, and their bytes."""
    _, ends, data = tokens.buffers()
    if data is None:
        data = pa.py_buffer(b"")
    kind = np.int64 if pa.types.is_large_string(tokens.type) else np.int32
    if ends is None or not len(tokens):
        ends = np.zeros(1, np.int64)
    else:
        ends = np.frombuffer(ends, kind)[tokens.offset : tokens.offset + len(tokens) + 1]
        ends = ends.astype(np.int64, copy=False)
    data = np.frombuffer(data, np.uint8) if data.size else np.empty(0, np.uint8)
    # One type for compiled code, whatever the buffers allow.
    ends.flags.writeable = data.flags.writeable = False
    return ends, data


def _decoded(tokens: pa.Array) -> list[str]:
    # Three times as fast as to_pylist.
    return tokens.to_numpy(zero_copy_only=False).tolist()


def _grown(array: np.ndarray, size: int, used: int) -> np.ndarray:
    """An array with room for ``size`` numbers; grows by half, but is first made to measure."""
    if size <= len(array):
        return array
    grown = np.empty(max(size, len(array) + len(array) // 2), array.dtype)
    grown[:used] = array[:used]
    return grown


# --- compiled -------------------------------------------------------------------------------


def _loader(bits: int):
    """Compiled function of a byte array and a place: the word of ``bits`` bits from there on."""

    @intrinsic
    def load(typing_context, array, at):
        def code(context, builder, signature, arguments):
            data = make_array(signature.args[0])(context, builder, arguments[0]).data
            place = builder.gep(data, [arguments[1]])
            word = builder.load(builder.bitcast(place, ir.IntType(bits).as_pointer()))
            word.align = 1
            return builder.zext(word, ir.IntType(64)) if bits < 64 else word

        return types.uint64(array, types.int64), code

    return load


_load_8, _load_4 = _loader(64), _loader(32)


@intrinsic
def _prefetch(typing_context, array, at):
    """Ask for the memory of ``array[at]``, and do not wait for it."""

    def code(context, builder, signature, arguments):
        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        # For reading, to be kept in all caches, data.
        builder.call(function, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), code


@intrinsic
def _pointer(typing_context, address):
    """The pointer to an address."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


@intrinsic
def _fold(typing_context, left, right):
    """The two halves of the product of two 64-bit numbers, xored."""

    def code(context, builder, signature, arguments):
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(each, wide) for each in arguments))
        high = builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))
        return builder.xor(high, builder.trunc(product, ir.IntType(64)))

    return types.uint64(types.uint64, types.uint64), code


@_inlined
def _hash(data, at, n, seed):
    """Hash of the ``n`` bytes from ``at`` on: wyhash, which no pattern of digits degrades."""
    first = last = np.uint64(0)
    seed = np.uint64(seed)
    mixed = seed
    if n > 16:
        end = at + n
        while at + 16 < end:
            mixed = _fold(_load_8(data, at) ^ _K1, _load_8(data, at + 8) ^ mixed)
            at += 16
        first, last = _load_8(data, end - 16), _load_8(data, end - 8)
    elif n >= 8:
        first, last = _load_8(data, at), _load_8(data, at + n - 8)
    elif n >= 4:
        first, last = _load_4(data, at), _load_4(data, at + n - 4)
    elif n > 0:
        first = (
            (np.uint64(data[at]) << np.uint64(16))
            | (np.uint64(data[at + (n >> 1)]) << np.uint64(8))
            | np.uint64(data[at + n - 1])
        )
    return _fold(_K2 ^ seed ^ np.uint64(n), _fold(first ^ _K1, last ^ mixed))


@_inlined
def _equal(left, i, right, j, n):
    """Whether ``n`` bytes agree."""
    if n >= 8:
        for at in range(0, n - 8, 8):
            if _load_8(left, i + at) != _load_8(right, j + at):
                return False
        return _load_8(left, i + n - 8) == _load_8(right, j + n - 8)
    if n >= 4:
        return _load_4(left, i) == _load_4(right, j) and (
            _load_4(left, i + n - 4) == _load_4(right, j + n - 4)
        )
    for at in range(n):  # noqa: SIM110
        if left[i + at] != right[j + at]:
            return False
    return True


@_inlined
def _is_token(number, token, at, size, ends, data):
    """Whether ``number`` is that of the token; False for -1."""
    # A slot that was filled since the table was taken may have its token elsewhere.
    return (
        0 <= number < len(ends) - 1
        and ends[number + 1] - ends[number] == size
        and ends[number + 1] <= len(data)
        and _equal(token, at, data, ends[number], size)
    )


@_inlined
def _probe(token, at, size, hashed, slots, ends, data):
    """The slot of a token and its number; the free slot where it would go and -1 if it has none.

    A slot holds the upper half of the token's hash and its number plus one; 0 is free.
    """
    mask = np.uint64(len(slots) - 1)
    slot = hashed & mask
    while True:
        entry = slots[slot]
        if entry == 0:
            return slot, np.int64(-1)
        if (entry ^ hashed) & _HASH_BITS == 0:
            number = np.int64(entry & _NUMBER_BITS) - 1
            if _is_token(number, token, at, size, ends, data):
                return slot, number
        slot = (slot + np.uint64(1)) & mask


@_called_often
def _find_one(token, header):
    """Number of one token, a bytes object; -1 if it is not there.

    Handing three arrays over would take longer than the search: :func:`_header` has them as one.
    """
    slots = numba.carray(_pointer(header[0]), header[1], np.uint64)
    ends = numba.carray(_pointer(header[2]), header[3], np.int64)
    data = numba.carray(_pointer(header[4]), header[5], np.uint8)
    size = len(token)
    return _probe(token, 0, size, _hash(token, 0, size, header[6]), slots, ends, data)[1]


def _header(slots, ends, data, seed) -> np.ndarray:
    """Addresses and lengths of a table's arrays, who must outlive it, and its seed."""
    numbers = [
        number for array in (slots, ends, data) for number in (array.ctypes.data, len(array))
    ]
    return np.array([*numbers, seed], np.int64)


@_compiled
def _find_all(token_ends, tokens, slots, ends, data, seed, numbers):
    """Write the number of each token, or -1."""
    hashes = np.empty(AHEAD, np.uint64)
    mask = np.uint64(len(slots) - 1)
    for low in range(0, len(numbers), AHEAD):
        n = min(AHEAD, len(numbers) - low)
        # Each step asks for the memory that the next one reads, for all tokens of the block.
        for i in range(n):
            at = token_ends[low + i]
            hashes[i] = _hash(tokens, at, token_ends[low + i + 1] - at, seed)
            _prefetch(slots, np.int64(hashes[i] & mask))
        for i in range(n):
            slot = hashes[i] & mask
            while slots[slot] != 0 and (slots[slot] ^ hashes[i]) & _HASH_BITS != 0:
                slot = (slot + np.uint64(1)) & mask
            numbers[low + i] = np.int64(slots[slot] & _NUMBER_BITS) - 1
            _prefetch(ends, numbers[low + i])
        for i in range(n):
            if 0 <= numbers[low + i] < len(ends):
                _prefetch(data, ends[numbers[low + i]])
        for i in range(n):
            at = token_ends[low + i]
            size = token_ends[low + i + 1] - at
            number = numbers[low + i]
            if number >= 0 and not _is_token(number, tokens, at, size, ends, data):
                # Another token has the same upper half of a hash.
                numbers[low + i] = _probe(tokens, at, size, hashes[i], slots, ends, data)[1]


@_compiled
def _add_all(token_ends, tokens, slots, ends, data, seed, n_known, numbers):
    """Write the number of each token, the next one for a new token; return how many there are."""
    hashes = np.empty(AHEAD, np.uint64)
    mask = np.uint64(len(slots) - 1)
    for low in range(0, len(numbers), AHEAD):
        n = min(AHEAD, len(numbers) - low)
        for i in range(n):
            at = token_ends[low + i]
            hashes[i] = _hash(tokens, at, token_ends[low + i + 1] - at, seed)
            _prefetch(slots, np.int64(hashes[i] & mask))
        for i in range(n):
            at = token_ends[low + i]
            size = token_ends[low + i + 1] - at
            slot, number = _probe(tokens, at, size, hashes[i], slots, ends, data)
            if number < 0:
                number, end = n_known, ends[n_known]
                for byte in range(size):
                    data[end + byte] = tokens[at + byte]
                ends[number + 1] = end + size
                # Last, because from now on others may find it.
                slots[slot] = (hashes[i] & _HASH_BITS) | np.uint64(number + 1)
                n_known += 1
            numbers[low + i] = number
    return n_known


@_compiled
def _rebuild(slots, ends, data, seed, n):
    """Enter ``n`` distinct tokens into free slots."""
    hashes = np.empty(AHEAD, np.uint64)
    mask = np.uint64(len(slots) - 1)
    for low in range(0, n, AHEAD):
        high = min(low + AHEAD, n)
        for number in range(low, high):
            at = ends[number]
            hashes[number - low] = _hash(data, at, ends[number + 1] - at, seed)
            _prefetch(slots, np.int64(hashes[number - low] & mask))
        for number in range(low, high):
            hashed = hashes[number - low]
            slot = hashed & mask
            while slots[slot] != 0:
                slot = (slot + np.uint64(1)) & mask
            slots[slot] = (hashed & _HASH_BITS) | np.uint64(number + 1)
