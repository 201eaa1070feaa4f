"""Checkpoints and pickles that can only hold what we know."""

from __future__ import annotations

import enum
import importlib
import io
import os
import pickle
from typing import Any

import numpy as np
import torch

from recbole_uip.settings import SettingsError

__all__ = ["UnsafeFileError", "load_checkpoint", "load_pickle", "plain"]


class UnsafeFileError(SettingsError):
    """A saved file is broken, or names something that is not in the list of known types."""


def plain(value: Any) -> Any:
    """``value`` in types that JSON and ``torch.load(weights_only=True)`` know; else its ``str``."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    return str(value)


def load_checkpoint(path: str | os.PathLike, device: Any) -> dict:
    """Load a model checkpoint: tensors and plain values only.

    Raises
    ------
    UnsafeFileError
        If the file holds anything else, such as a whole RecBole config.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise UnsafeFileError(
            f"checkpoint {os.fspath(path)} holds more than weights and plain values ({reason}); "
            "it is not loaded, because that could run code. Save it again with recbole-uip"
        ) from error


# What RecBole's datasets and dataloaders are made of. Of these modules, classes alone may be
# named: a function could be called with arguments of the file's choosing.
_CLASS_MODULES = (
    "recbole.data.dataloader",
    "recbole.data.transform",
    "recbole.sampler",
    "recbole_uip.bridge.dataset",
    "recbole_uip.em",
)
_NAMES = {
    "builtins": {"set", "frozenset", "slice", "range", "complex", "bytearray", "object"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "logging": {"getLogger"},
    "numpy": {"ndarray", "dtype"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
    "recbole.data.interaction": {"Interaction"},
    "recbole.utils.enum_type": {
        "EvaluatorType",
        "FeatureSource",
        "FeatureType",
        "InputType",
        "KGDataLoaderState",
        "ModelType",
    },
    "recbole_uip.behaviours": {"Behaviours"},
    "recbole_uip.bridge.config": {"restore_config"},
    "recbole_uip.profiles": {"ProfileField", "Profiles", "TextVectors"},
    "recbole_uip.tuning": {"Tuned"},
    "recbole_uip.settings": {
        "ArmSettings",
        "CodebookSettings",
        "FacetSettings",
        "GradientSettings",
        "LMSettings",
        "MatchSettings",
        "UIPSettings",
    },
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.utils.data._utils.fetch": {"_MapDatasetFetcher"},
    "torch.utils.data.dataloader": {"_DatasetKind"},
    "torch.utils.data.sampler": {"BatchSampler", "RandomSampler", "SequentialSampler"},
}


def _load_storage(data: bytes) -> Any:
    # torch's own _load_from_bytes unpickles its argument without restriction.
    return torch.load(io.BytesIO(data), weights_only=True)


_METHODS = (
    "collate_fn",
    "_neg_sample_by_pair_wise_sampling",
    "_neg_sample_by_point_wise_sampling",
)


def _getattr(owner: Any, name: str) -> Any:
    # A dataloader refers to its own bound methods, which pickle as getattr(dataloader, name).
    if isinstance(owner, torch.utils.data.DataLoader) and name in _METHODS:
        return getattr(owner, name)
    raise UnsafeFileError(f"the saved file asks for attribute {name!r} of {type(owner).__name__}")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) == ("builtins", "getattr"):
            return _getattr
        if "." not in name and name in _NAMES.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if "." not in name and any(
            module == known or module.startswith(f"{known}.") for known in _CLASS_MODULES
        ):
            found = getattr(importlib.import_module(module), name, None)
            # __module__ keeps out what such a module merely imports.
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise UnsafeFileError(f"the saved file names {module}.{name}")


def load_pickle(path: str | os.PathLike) -> Any:
    """Unpickle a saved dataset or dataloaders, of known types only.

    Raises
    ------
    UnsafeFileError
        If the file is broken, or names any other type or function; that has not been called.
    """
    with open(path, "rb") as file:
        try:
            return _Unpickler(file).load()
        except UnsafeFileError as error:
            raise UnsafeFileError(
                f"{os.fspath(path)} is not loaded: {error}, which is not a part of a saved "
                "dataset. Delete the file to have it built again"
            ) from None
        except Exception as error:
            # A broken pickle can fail in any way: a wrong opcode, a missing name, bad bytes.
            raise UnsafeFileError(
                f"{os.fspath(path)} is not a saved dataset that can be read "
                f"({type(error).__name__}: {error}). Delete the file to have it built again"
            ) from error
