"""The data as the commands that measure the profile stage alone load them."""

import numpy as np
import pytest
import torch

from recbole_uip.bridge.preparation import create_dataset, data_preparation
from recbole_uip.evidence.task import load_dataset
from recbole_uip.settings import SettingsError

from ..bridge.conftest import LENIENCY, Atomic, make_rows

RANDOM = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "RO", "group_by": None, "mode": "labeled"}


@pytest.fixture
def small(tmp_path, rng):
    return Atomic(tmp_path, rows=make_rows(rng)).write()


def test_a_random_split_is_that_of_a_run(small):
    config = small.config(eval_args=RANDOM, uip_facets={"leniency": LENIENCY})
    torch.manual_seed(1)
    first, _ = load_dataset(config)
    torch.manual_seed(2)
    second, _ = load_dataset(config)
    np.testing.assert_array_equal(first.behaviours.split, second.behaviours.split)
    other, _ = load_dataset(small.config(seed=7, eval_args=RANDOM, uip_facets={"l": LENIENCY}))
    assert (other.behaviours.split != first.behaviours.split).any()


def test_held_out_events_that_no_profile_can_see_are_refused(small):
    keys = {"uip_time": "static", "uip_history": "observed", "uip_facets": {"leniency": LENIENCY}}
    config = small.config(**keys)
    with pytest.raises(SettingsError, match="uip_history=observed has no meaning with uip_time=st"):
        data_preparation(config, create_dataset(config))
