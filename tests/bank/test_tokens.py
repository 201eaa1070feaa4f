"""The token index against a dict."""

import threading

import numba
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_uip.bank import tokens as module
from recbole_uip.bank.store import BankError
from recbole_uip.bank.tokens import TokenIndex, token_array

# Lengths on both sides of every case of the hash; zeros, and more than one byte a letter.
TOKENS = st.text(
    st.sampled_from("ab0\0é漢😀"), max_size=20
) | st.integers(0, 50).map(str) | st.text("xy", min_size=14, max_size=70)  # fmt: skip

FORMS = [
    list,
    tuple,
    lambda tokens: np.array(tokens, dtype=object),
    lambda tokens: np.array(tokens, dtype=str),
    lambda tokens: pa.array(tokens, pa.string()),
    lambda tokens: pa.array(tokens, pa.large_string()),
    lambda tokens: pa.array(["before", *tokens, "after"], pa.string())[1:-1],
    lambda tokens: pa.array(["before", *tokens, "after"], pa.large_string())[1:-1],
    lambda tokens: pa.array(tokens, pa.string()).dictionary_encode(),
    lambda tokens: pa.array(tokens, pa.string_view()).dictionary_encode(),
    lambda tokens: pa.chunked_array([tokens[:2], [], tokens[2:]], pa.string()),
]


@numba.njit
def hash_of(token, seed):
    """Hash of a bytes object."""
    return module._hash(token, 0, len(token), seed)


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.lists(TOKENS, max_size=40), min_size=1, max_size=4), st.lists(TOKENS))
def test_it_is_a_dict(batches, others):
    index, expected = TokenIndex(), {}
    for batch in batches:
        numbers = [expected.setdefault(token, len(expected)) for token in batch]
        assert index.add(batch).tolist() == numbers
        assert len(index) == len(expected)
        assert list(index) == index.to_list() == index.slice().to_pylist() == list(expected)
    asked = [*others, *expected]
    numbers = [expected.get(token, -1) for token in asked]
    assert index.find_many(asked).tolist() == numbers
    for _ in range(2):  # found, and found lately
        assert [index.get(token) for token in asked] == numbers
    assert [token in index for token in asked] == [number >= 0 for number in numbers]


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    tokens = ["u1", "", "a much longer token than most", "é", "u12345678"]
    index = TokenIndex(form(tokens))
    assert index.to_list() == tokens
    asked = ["no", *tokens[::-1], "u", "u2"]
    assert index.find_many(form(asked)).tolist() == [-1, 4, 3, 2, 1, 0, -1, -1]
    assert index.add(form([*asked[:3], "no"])).tolist() == [5, 4, 3, 5]
    assert index.take(np.array([5, 1])).to_pylist() == ["no", ""]
    assert index.slice(4, 99).to_pylist() == ["u12345678", "no"]


@pytest.mark.parametrize("form", FORMS[:1] + FORMS[4:])
def test_nothing(form):
    index = TokenIndex(form([]))
    assert len(index) == 0 and index.to_list() == []
    assert index.find_many(form([])).dtype == np.int64
    assert index.find_many(form([])).tolist() == index.add(form([])).tolist() == []
    assert index.find_many(form(["a"])).tolist() == [-1]
    assert index.get("a") == -1 and index.get("a", 7) == 7


def test_many_tokens_on_threads(monkeypatch):
    monkeypatch.setattr(module, "PARALLEL_TOKENS", 1000)
    tokens = pa.array([f"u{number}" for number in range(50_000)])
    index = TokenIndex(tokens)
    order = np.random.default_rng(0).permutation(50_000)
    np.testing.assert_array_equal(index.find_many(tokens.take(pa.array(order))), order)
    assert (index.find_many([f"v{number}" for number in range(50_000)]) == -1).all()


@pytest.mark.parametrize("name", ["{}", "u{:09d}", "{:032d}", "000{}000", "{}@example.org"])
def test_sequential_names_do_not_meet(name):
    """Runs of taken slots are as short as chance has them, at up to 3/4 of slots taken."""
    n = 48_000
    index = TokenIndex([name.format(number) for number in range(n)])
    slots, _, _, seed = index._table
    home = np.array(
        [hash_of(token.encode(), seed) & (len(slots) - 1) for token in index],
        dtype=np.int64,
    )
    # Of random homes, exp(-load) of the slots are nobody's.
    free = 1 - len(np.unique(home)) / len(slots)
    assert free == pytest.approx(np.exp(-n / len(slots)), abs=0.01)
    halves = np.array([hash_of(token.encode(), seed) >> 32 for token in index])
    assert len(np.unique(halves)) > n - 10


def test_only_bytes_decide():
    """A token is itself also where another one of the same half of a hash stands before it."""
    index = TokenIndex(["a1", "a2"])
    slots, _, _, seed = index._table
    for token, number in (("a1", 0), ("a2", 1)):
        hashed = hash_of(token.encode(), seed)
        home, half = int(hashed) & (len(slots) - 1), np.uint64(hashed) & module._HASH_BITS
        slots[:] = 0
        slots[home] = half | np.uint64(1 - number + 1)
        slots[(home + 1) % len(slots)] = half | np.uint64(number + 1)
        assert index.find_many([token]).tolist() == [number] == [index.get(token)]


def test_the_dict_of_recent_tokens_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "RECENT", 10)
    index = TokenIndex([str(number) for number in range(100)])
    assert [index.get(str(number)) for number in range(100)] == list(range(100))
    assert len(index._recent) <= 10
    assert index.get("new") == -1
    index.add(["new"])
    assert index.get("new") == 100


def test_look_ups_while_tokens_are_added():
    index, stop, wrong = TokenIndex([f"u{number}" for number in range(1000)]), [], []
    asked = pa.array([f"u{number}" for number in range(60_000)])

    def look_up():
        while not stop:
            found = index.find_many(asked)
            known = found >= 0
            if not known[:1000].all() or (found[known] != np.flatnonzero(known)).any():
                wrong.append(found)

    thread = threading.Thread(target=look_up)
    thread.start()
    for low in range(1000, 60_000, 500):
        index.add(asked[low : low + 500])
    stop.append(True)
    thread.join()
    assert not wrong and (index.find_many(asked) == np.arange(60_000)).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a", "b", "c", "b"], "user 'b' is given twice"),
        (pa.chunked_array([["a", "b"], ["c", "a"]]), "user 'a' is given twice"),
        (["a", None], "user in row 1 is null"),
        (pa.array(["a", None]), "user in row 1 is null"),
        ([1, 2], "users must be strings"),
        (["a", 2], "users must be strings"),
        (["a", "\ud800"], "users must be strings"),
        (pa.array([1, 2]), "users are of type int64"),
        (np.array([1, 2]), "users must be strings"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(BankError, match=message):
        TokenIndex(tokens)


def test_bad_single_tokens():
    index = TokenIndex(["a"], "item")
    assert index.get("\ud800") == -1
    with pytest.raises(BankError, match="item 5 is no string"):
        index.get(5)


def test_arrow_strings_are_not_copied():
    for kind in (pa.string(), pa.large_string()):
        tokens = pa.array(["a", "b"], kind)
        assert token_array(tokens) is tokens
