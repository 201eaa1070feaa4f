"""What of the LM is part of a run's key beside its settings."""

import json

import pytest
import torch

from recbole_uip.evidence.experiments import plan
from recbole_uip.evidence.experiments.plan import load_experiment

FACETS = {
    "likes": {"weight": "positive", "codes": 2, "rank": 1},
    "genres": {"source": "embedding", "codes": 2, "rank": 1},
    "leniency": {"source": "constant", "bins": 4},
}


@pytest.fixture
def key(tmp_path, monkeypatch):
    """The key of an arm's run where the default LM is ``lm``, run in ``dtype``."""

    def key(arm, lm=None, dtype=torch.float32, **settings):
        monkeypatch.setattr(plan, "local_fingerprint", lambda *_: lm)
        monkeypatch.setattr(plan, "resolve_dtype", lambda _: (torch.device("cpu"), dtype))
        file = tmp_path / "asked.yaml"
        arms = {arm: {"facets": [arm]}}
        asked = {"title": "t", "datasets": ["ml-100k"], "models": ["FM"], "seeds": [1]}
        given = {"uip_facets": FACETS, "uip_item_text": "{title}", "use_gpu": False, **settings}
        file.write_text(json.dumps({"uip_experiment": {**asked, "arms": arms}, **given}))
        experiment = load_experiment(str(file))
        (case,) = experiment.cases()
        return experiment.run(case, 1).key

    return key


@pytest.mark.parametrize("arm", ["likes", "genres"])
def test_other_weights_or_another_type_make_another_run(key, arm):
    keys = {key(arm), key(arm, "weights"), key(arm, dtype=torch.bfloat16)}
    assert len(keys) == 3
    # What a setting says is in the key already.
    given = {"uip_lm_dtype": "bfloat16"}
    assert key(arm, dtype=torch.bfloat16, **given) == key(arm, **given)


def test_a_run_without_the_lm_has_nothing_of_it(key):
    assert key("leniency", "weights", torch.bfloat16) == key("leniency")
