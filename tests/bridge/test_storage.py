import os
import pickle

import numpy as np
import pytest
import torch

from recbole_uip.bridge.storage import (
    UnsafeFileError,
    load_checkpoint,
    load_pickle,
    plain,
)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def evil_calls(mark):
    from recbole.config import Config
    from recbole.data.interaction import Interaction

    command = f"touch {mark}"
    return [
        Evil(os.system, command),
        Evil(eval, f"__import__('os').system({command!r})"),
        Evil(getattr, Interaction.__init__, "__globals__"),
        # RecBole's Config evaluates the strings it is given.
        Evil(Config, None, None, None, {"x": f"__import__('os').system({command!r})"}),
        [Evil(torch.storage._load_from_bytes, pickle.dumps(Evil(os.system, command)))],
    ]


@pytest.mark.parametrize("number", range(5))
def test_malicious_pickles_are_refused(tmp_path, number):
    mark, path = tmp_path / "mark", tmp_path / "file.pth"
    path.write_bytes(pickle.dumps(evil_calls(mark)[number]))
    with pytest.raises(UnsafeFileError):
        load_pickle(path)
    assert not mark.exists()


def test_dotted_names_are_refused(tmp_path):
    path = tmp_path / "file.pth"
    # STACK_GLOBAL of "os.system" out of a module that imports os.
    module, name = b"recbole_uip.bridge.dataset", b"os.system"
    path.write_bytes(
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module
        + b"\x8c"
        + bytes([len(name)])
        + name
        + b"\x93."
    )
    with pytest.raises(UnsafeFileError, match=r"names recbole_uip\.bridge\.dataset\.os\.system"):
        load_pickle(path)


def test_a_broken_file_is_an_error_that_says_so(tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(pickle.dumps(list(range(1000)))[:100])
    with pytest.raises(UnsafeFileError, match="Delete the file"):
        load_pickle(path)


def test_malicious_checkpoint_is_refused(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "model.pth"
    torch.save({"state_dict": {}, "config": Evil(os.system, f"touch {mark}")}, path)
    with pytest.raises(UnsafeFileError, match=r"model\.pth"):
        load_checkpoint(path, "cpu")
    assert not mark.exists()


def test_tensors_and_arrays_survive(tmp_path):
    path = tmp_path / "file.pth"
    value = {"t": torch.arange(3), "a": np.array(["x", None], dtype=object), "s": {1, 2}}
    path.write_bytes(pickle.dumps(value))
    loaded = load_pickle(path)
    assert loaded["t"].tolist() == [0, 1, 2]
    assert loaded["a"].tolist() == ["x", None]
    assert loaded["s"] == {1, 2}


def test_plain():
    from recbole.utils import ModelType

    value = {"m": ModelType.CONTEXT, "d": torch.device("cpu"), "n": (np.int64(3), np.float32(0.5))}
    assert plain(value) == {"m": "CONTEXT", "d": "cpu", "n": [3, 0.5]}
