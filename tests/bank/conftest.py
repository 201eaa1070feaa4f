from __future__ import annotations

import numpy as np
import pytest

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.users import user_table
from recbole_uip.profiles import infer
from recbole_uip.settings import UIPSettings

from ..em.conftest import make_world
from ..test_profiles import FACETS

N_USERS, N_ITEMS = 300, 80


@pytest.fixture(scope="session")
def world():
    return make_world(n_users=N_USERS, n_items=N_ITEMS)


@pytest.fixture(scope="session")
def bank_settings(tmp_path_factory):
    return UIPSettings.from_dict(
        {
            "uip_facets": FACETS,
            "uip_history": "observed",
            "uip_cache": str(tmp_path_factory.mktemp("cache")),
        }
    )


@pytest.fixture(scope="session")
def inferred(world, bank_settings):
    return infer(world.behaviours, None, bank_settings)


@pytest.fixture(scope="session")
def users():
    return [f"u{number:03d}" for number in range(N_USERS)]


@pytest.fixture(scope="session")
def items():
    return [f"i{number}" for number in range(N_ITEMS)]


@pytest.fixture
def model(inferred, items, bank_settings):
    return ProfileModel.from_profiles(inferred, items, bank_settings, implicit=False)


def folds_of(inferred, behaviours):
    fold = np.zeros(behaviours.n_users, dtype=np.int64)
    fold[behaviours.user] = inferred.events.fold
    return fold


@pytest.fixture
def empty_bank(tmp_path, model, inferred, world, users):
    """All users, none of whom has met anything yet."""
    n, initial = len(users), model.kernels.initial
    table = user_table(
        model,
        users,
        folds_of(inferred, world.behaviours),
        np.zeros(n, np.int64),
        np.full(n, -np.inf),
        np.tile(initial, (n, 1)),
    )
    with FeatureBank.create(tmp_path / "bank", model, table) as bank:
        yield bank
