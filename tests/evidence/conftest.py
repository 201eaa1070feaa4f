"""A store of made-up runs whose truth is known, as an experiment leaves it behind."""

import json

import numpy as np
import pytest
import sklearn.metrics

from recbole_uip.bridge.metrics import gauc
from recbole_uip.evidence.experiments.store import RunStore, key_of

SEEDS = (1, 2, 3, 4, 5)
N_USERS, N_ROWS = 60, 900
ROWS = {"train": 7200, "valid": N_ROWS, "test": N_ROWS}


def test_world(world=0):
    """Rows, users, items, labels and what is known of them; the logit that is true of each row."""
    rng = np.random.default_rng(world)
    user = rng.integers(1, N_USERS, size=N_ROWS)
    logit = rng.normal(size=N_ROWS) + rng.normal(size=N_USERS)[user]
    return {
        "row": 8100 + np.arange(N_ROWS),
        "user": user,
        "item": rng.integers(1, 200, size=N_ROWS),
        "list": 4 * user + rng.integers(0, 4, size=N_ROWS),
        "label": (rng.random(N_ROWS) < 1 / (1 + np.exp(-logit))).astype(np.int8),
        "history": rng.integers(0, 40, size=N_ROWS),
        "user_rows": rng.integers(0, 3, size=N_ROWS),
        "item_rows": rng.integers(0, 300, size=N_ROWS),
        "logit": logit,
    }


test_world.__test__ = False


class Laboratory:
    """Writes plans and runs into ``folder``; remembers the predictions of each run.

    A case is a dict with ``arm``, ``skill`` (how much of the truth its scores know), and, where
    they differ, ``dataset``, ``model``, ``variant``, ``config``, ``facets``, ``protocol``.
    """

    def __init__(self, folder):
        self.folder = folder
        self.store = RunStore(folder / "runs")
        self.predictions = {}

    def run(self, case, seed, world=0, order=None, **changes):
        """Make one run; its key."""
        rows = test_world(world)
        place = {name: case[name] for name in ("dataset", "model", "arm", "variant")}
        key = key_of({**place, "seed": seed, "point": case.get("point")})
        rng = np.random.default_rng([seed, int(key, 16) % 2**32])
        logit = case["skill"] * rows["logit"] + 0.5 * rng.normal(size=N_ROWS)
        score = (1 / (1 + np.exp(-logit))).astype(np.float32)
        self.predictions[case["arm"], str(case["variant"]), seed] = rows["label"], score
        arrays = {f"test_{name}": values for name, values in rows.items() if name != "logit"}
        arrays["test_score"] = score
        profiles = {}
        if case["facets"]:
            token = 1 + (rows["logit"] + 0.3 * rng.normal(size=N_ROWS) > 0).astype(np.int16)
            arrays["test_token_uip_taste"] = np.where(rows["history"] > 0, token, 0)
            bounds = [-3.0, -2.0 - seed / 100, -1.5]
            profiles["taste"] = {
                "prior_variance": [0.5],
                "uip_taste": [
                    {
                        "converged": True,
                        "iterations": 3,
                        "lower_bound": -1.4,
                        "lower_bounds": bounds,
                        "perplexity": 1.9,
                        "usage": [0.6, 0.4],
                        "reseeded": 0,
                    }
                ],
            }
        metrics = {
            "auc": sklearn.metrics.roc_auc_score(rows["label"], score),
            "logloss": sklearn.metrics.log_loss(rows["label"], score.astype(float)),
            "gauc": gauc(rows["user"], rows["label"], score),
            "list_auc": gauc(rows["list"], rows["label"], score),
        }
        record = {
            **place,
            "seed": seed,
            "valid": {name: value - 0.01 for name, value in metrics.items()},
            "test": metrics,
            "fields": ["item_id", "uip_taste"] if case["facets"] else ["item_id"],
            "profile_fields": ["uip_taste"] if case["facets"] else [],
            "user_id": "keep",
            "config": {"uip_arms": {case["arm"]: {"facets": case["facets"]}}, **case["config"]},
            "seconds": 10.0 + seed,
            "epochs": 7,
            "score_seconds": 0.0009,
            "parameters": 1234,
            "cost": case["cost"],
            "protocol": {
                "split": {"RS": [0.8, 0.1, 0.1]},
                "order": "TO",
                "group_by": None,
                "mode": {"valid": "labeled", "test": "labeled"},
                "rows": ROWS,
                "threshold": {"rating": 4},
                "liked_share": 0.55,
                "time": "point_in_time",
                "history": "observed",
                "refresh_seconds": 0.0,
                **case["protocol"],
            },
            "profiles": profiles,
            "versions": {"python": "3.11", "recbole": "1.2.1"},
            "finished": f"2026-01-0{seed}T00:00:00+00:00",
            **changes,
        }
        if order is not None:
            arrays = {name: values[order] for name, values in arrays.items()}
        self.store.write(key, record, arrays)
        return key

    def experiment(self, name, cases, seeds=SEEDS, missing=(), **plan):
        """Write a plan and its runs, but those of ``missing``: pairs of arm and seed."""
        described = []
        for case in map(complete, cases):
            keys = {}
            for seed in seeds:
                place = {part: case[part] for part in ("dataset", "model", "arm", "variant")}
                if (case["arm"], seed) in missing:
                    keys[str(seed)] = key_of({**place, "seed": seed, "point": None})
                else:
                    keys[str(seed)] = self.run(case, seed)
            described.append({**place, "seeds": keys})
        return self.plan(name, described, **plan)

    def plan(self, name, described, **plan):
        """Write ``experiment.json``; its folder."""
        folder = self.folder / name
        folder.mkdir()
        places = ("dataset", "model", "arm", "variant")
        content = {
            "name": name,
            "title": f"The {name} experiment",
            "question": "Does it help?",
            "baseline": described[0]["arm"],
            "compare": [],
            "cases": described,
            "family": [
                {part: case[part] for part in places} | {"key": next(iter(case["seeds"].values()))}
                for case in described
            ],
            "tuning": [],
            "runs": "../runs",
            "commands": [f"recbole-uip experiment {name}"],
            **plan,
        }
        (folder / "experiment.json").write_text(json.dumps(content))
        return folder


def complete(case):
    """A case with all that it does not say at its usual value."""
    usual = {
        "dataset": "toy", "model": "DeepFM", "variant": {}, "config": {}, "facets": [],
        "protocol": {}, "cost": {},
    }  # fmt: skip
    return {**usual, **case}


@pytest.fixture
def laboratory(tmp_path):
    return Laboratory(tmp_path)
