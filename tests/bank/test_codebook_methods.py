"""Banks whose codebooks are not EM's: build, stream, refit, commit and open again."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.users import user_table
from recbole_uip.em.kernels import nearest_codes
from recbole_uip.em.states import offsets
from recbole_uip.profiles import infer
from recbole_uip.settings import METHODS, UIPSettings

from ..em.conftest import make_world
from .conftest import folds_of

N_USERS, N_ITEMS, CODES, LEVELS = 80, 40, 7, 2
FACETS = {"company": {"source": "collaborative", "codes": CODES, "rank": 3, "levels": LEVELS}}
OTHERS = [method for method in METHODS if method != "em"]


@pytest.fixture(scope="module")
def behaviours():
    return make_world(n_users=N_USERS, n_items=N_ITEMS).behaviours


@pytest.fixture(scope="module", params=OTHERS)
def inferred(request, behaviours):
    settings = UIPSettings.from_dict(
        {
            "uip_facets": FACETS,
            "uip_folds": 2,
            "uip_history": "observed",
            "uip_codebook": {"method": request.param, "sample": 400},
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return settings, infer(behaviours, None, settings)


@pytest.fixture
def bank(inferred, behaviours, tmp_path):
    """All users before their first event."""
    settings, profiles = inferred
    items = [f"i{number}" for number in range(N_ITEMS)]
    model = ProfileModel.from_profiles(profiles, items, settings, implicit=False)
    table = user_table(
        model,
        [f"u{number}" for number in range(N_USERS)],
        folds_of(profiles, behaviours),
        np.zeros(N_USERS, np.int64),
        np.full(N_USERS, -np.inf),
        np.tile(model.kernels.initial, (N_USERS, 1)),
    )
    with FeatureBank.create(tmp_path / "bank", model, table) as bank:
        yield bank


def test_profiles_have_the_method_that_was_asked_for(inferred):
    settings, profiles = inferred
    levels = profiles.facets["company"].codebooks_["uip_company"].levels_
    kinds = {"kmeans": "HardEM", "vq": "OnlineVQ", "fsq": "FiniteScalar", "sinkhorn": "Sinkhorn",
             "random": "RandomCodebook"}  # fmt: skip
    assert [type(level).__name__ for level in levels] == [kinds[settings.codebook.method]] * LEVELS
    assert [field.size for field in profiles.fields] == [CODES] * LEVELS
    described = profiles.report["company"]["uip_company"][0]
    assert described["perplexity"] > 1 and np.isfinite(described["lower_bounds"]).all()


def test_streaming_gives_the_point_in_time_tokens_and_refit_keeps_to_the_rule(
    bank, inferred, behaviours
):
    settings, profiles = inferred
    fields = {field.name: field.values for field in profiles.fields}
    for now in np.unique(behaviours.time):
        rows = np.flatnonzero(behaviours.time == now)
        users = [f"u{user}" for user in behaviours.user[rows]]
        items = [f"i{item}" for item in behaviours.item[rows]]
        expected = np.column_stack([fields[name][rows] for name in bank.fields])
        np.testing.assert_array_equal(bank.look_up_many(users), expected)
        bank.update_many(users, items, behaviours.liked[rows], behaviours.time[rows])

    everyone = bank.users()
    before = bank.look_up_many(everyone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        report = bank.refit()
    after = bank.look_up_many(everyone)
    assert report.moved == {
        name: float((before != after)[:, c].mean()) for c, name in enumerate(bank.fields)
    }
    # A code keeps more of its users than it would by chance.
    if settings.codebook.method != "random":
        assert report.moved["uip_company"] < 0.7
    states = np.stack([bank.state_of(user)[0] for user in everyone])
    offset, noise, known = offsets(states)
    numbers = bank.model.encoder.profile_fields.numbers
    expected = nearest_codes(offset, noise, numbers, CODES, LEVELS) + 1
    np.testing.assert_array_equal(after[known], expected[known])
    assert known.all()

    bank.commit()
    with FeatureBank.open(bank.folder) as reader:
        assert reader.model.settings.codebook == settings.codebook
        np.testing.assert_array_equal(reader.look_up_many(everyone), after)
        np.testing.assert_array_equal(reader.model.encoder.profile_fields.numbers, numbers)
