"""Banks of facets whose vectors are of the items' texts: look-ups, updates, new items."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from recbole_uip import lm
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.export_peft import soft_tokens
from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.store import BankError
from recbole_uip.bank.users import user_table
from recbole_uip.profiles import infer
from recbole_uip.settings import UIPSettings

from ..em.conftest import make_world
from ..lm.conftest import WORDS, save_lm
from .conftest import folds_of

N_USERS, N_ITEMS = 80, 40
TOLD = {"weight": "contrast", "codes": 4, "rank": 2, "match": {"rank": 3, "bins": 6}}
FACETS = {
    "embedded": {**TOLD, "source": "embedding"},
    "prefixed": {**TOLD, "source": "prefix"},
    "worded": {**TOLD, "source": "words", "directions": "fisher"},
    "taste": {**TOLD, "source": "lm"},
    "together": {**TOLD, "source": "collaborative", "texts": ["words", "embedding"]},
}
UNMET = 11  # an item without events


@pytest.fixture(scope="module")
def behaviours():
    behaviours = make_world(n_users=N_USERS, n_items=N_ITEMS).behaviours
    item = np.where(behaviours.item == UNMET, 12, behaviours.item)
    return dataclasses.replace(behaviours, item=item)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(5)
    return [" ".join(rng.choice(WORDS[7:-2], 4)) for _ in range(N_ITEMS)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_lm(folder)
    return {
        "uip_history": "observed",
        "uip_item_text": "{title}",
        "uip_lm": str(folder),
        "uip_lm_dtype": "float32",
        "uip_cache": str(folder / "cache"),
    }


@pytest.fixture(params=["embedded", "prefixed", "worded", "together", "all"])
def bank(request, behaviours, texts, settings, tmp_path):
    """All users before their first event; what was inferred of them."""
    chosen = FACETS if request.param == "all" else {request.param: FACETS[request.param]}
    parsed = UIPSettings.from_dict({**settings, "uip_facets": chosen})
    profiles = infer(behaviours, texts, parsed)
    items = [f"i{number}" for number in range(N_ITEMS)]
    model = ProfileModel.from_profiles(profiles, items, parsed, implicit=False)
    users = [f"u{number}" for number in range(N_USERS)]
    table = user_table(
        model,
        users,
        folds_of(profiles, behaviours),
        np.zeros(N_USERS, np.int64),
        np.full(N_USERS, -np.inf),
        np.tile(model.kernels.initial, (N_USERS, 1)),
    )
    with FeatureBank.create(tmp_path / "bank", model, table) as bank:
        yield bank, profiles


def test_streaming_gives_the_point_in_time_tokens(bank, behaviours):
    bank, profiles = bank
    fields = {field.name: field.values for field in profiles.fields}
    for now in np.unique(behaviours.time):
        rows = np.flatnonzero(behaviours.time == now)
        users = [f"u{user}" for user in behaviours.user[rows]]
        items = [f"i{item}" for item in behaviours.item[rows]]
        expected = np.column_stack([fields[name][rows] for name in bank.fields])
        np.testing.assert_array_equal(bank.look_up_many(users), expected)
        for user, item, row in list(zip(users, items, rows, strict=True))[::9]:
            found = bank.match(user, [item])[0].tolist()
            assert found == [fields[name][row] for name in bank.match_fields]
        for user, item, row in zip(users, items, rows, strict=True):
            bank.update(user, item, behaviours.liked[row], behaviours.time[row])


def test_a_new_item_has_the_vectors_of_its_text(bank, texts):
    """One with the text of an item without events has that item's, also after a commit."""
    bank, _ = bank
    bank.add_items(["same", "none"], [texts[UNMET], None])
    bank.commit()
    with FeatureBank.open(bank.folder) as reader:
        for model in (bank.model, reader.model):
            for facet in model.settings.facets:
                vectors = model.encoder.vectors(facet.name)
                known = vectors[:, UNMET]
                np.testing.assert_allclose(vectors[:, N_ITEMS], known, rtol=0, atol=2e-3)
                assert np.abs(known).max(axis=1).min() > 0.1
                assert (vectors[:, N_ITEMS + 1] == 0).all()
        np.testing.assert_array_equal(reader.match("u1", ["same"]), bank.match("u1", ["same"]))


@pytest.mark.parametrize("bank", ["worded"], indirect=True)
def test_words_without_an_lm(bank, texts, monkeypatch):
    bank, _ = bank
    assert bank.model.lm_fingerprint is None and bank.model.prompt_fingerprint is None
    monkeypatch.setattr(lm, "score", lambda *_: pytest.fail("the LM was asked"))
    bank.add_items(["loud"], [f"{texts[7].upper()} Unheard!"])
    vectors = bank.model.encoder.vectors("worded")
    np.testing.assert_allclose(vectors[:, N_ITEMS], vectors[:, 7], rtol=0, atol=2e-3)


@pytest.mark.parametrize("bank", ["embedded"], indirect=True)
def test_embeddings_are_of_one_lm_and_no_prompt(bank, texts):
    bank, profiles = bank
    assert bank.model.lm_fingerprint == profiles.texts["embedding"].fingerprint
    assert bank.model.prompt_fingerprint is None
    bank.model.lm_fingerprint = "0" * 64
    with pytest.raises(BankError, match="is not the LM that scored"):
        bank.add_items(["new"], [texts[0]])


@pytest.mark.parametrize("bank", ["prefixed"], indirect=True)
def test_a_prefix_is_of_a_prompt(bank):
    model = bank[0].model
    other = dataclasses.replace(model.settings.facets[0], prompt="habits")
    renamed = dataclasses.replace(
        model, settings=dataclasses.replace(model.settings, facets=(other,))
    )
    assert None is not model.prompt_fingerprint != renamed.prompt_fingerprint is not None


@pytest.mark.parametrize("bank", ["all"], indirect=True)
def test_only_scores_give_soft_prompts(bank):
    model = bank[0].model
    assert soft_tokens(model, "taste", 1).shape == (1, 32)
    for facet in ("embedded", "worded"):
        with pytest.raises(BankError, match="those that have them are uip_prefixed, uip_taste$"):
            soft_tokens(model, facet, 1)
