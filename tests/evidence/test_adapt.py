"""``recbole-uip adapt`` on atomic files, and a run with what it made."""

from __future__ import annotations

import itertools
import json

import pyarrow.parquet
import pytest

from recbole_uip import cli, run_recbole_uip
from recbole_uip.settings import SettingsError

from ..bridge.conftest import Atomic, make_rows
from ..lm.conftest import save_lm


@pytest.fixture
def line(tmp_path, rng):
    """The settings that name a toy dataset and LM."""
    save_lm(tmp_path / "lm")
    # More than an embedding has numbers: of fewer, whitened scores are the same by any LM.
    first = ("star", "toy", "night", "city", "man", "story", "the")
    pairs = itertools.product(first, ("war", "day", "heat", "a", "wars", "comedy", "action"))
    items = [(f"i{i}", " ".join(pair), "drama") for i, pair in enumerate(pairs)]
    Atomic(tmp_path, "toy", make_rows(rng, n_items=len(items)), items=items).write()
    facets = {"taste": {"source": "lm", "rank": 2, "codes": 4}}
    return [
        f"--data_path={tmp_path}",
        f"--uip_cache={tmp_path / 'cache'}",
        "--load_col={inter: [user_id, item_id, rating, timestamp]}",
        "--threshold={rating: 4}",
        f"--uip_facets={json.dumps(facets)}",
        "--uip_item_text={title}",
        f"--uip_lm={tmp_path / 'lm'}",
        "--gpu_id=",
    ]


def test_command(line, tmp_path, capsys):
    folder = tmp_path / "adapter"
    adapt = ["adapt", "--dataset=toy", f"--output={folder}", "--epochs=2", "--learning_rate=0.03"]
    assert cli.main([*adapt, *line]) == 0
    out = capsys.readouterr().out
    assert "5 held-out texts" in out
    assert f"--uip_lm_adapter={folder}" in out
    assert cli.main([*adapt, *line]) == 2
    assert "is there already" in capsys.readouterr().err

    def run(name, *more):
        given = {"epochs": 1, "uip_output": str(tmp_path / name)}
        results = run_recbole_uip("LR", "toy", config=given, command_line=[*line, *more])
        tokens = pyarrow.parquet.read_table(tmp_path / name / "profiles.parquet")["uip_taste"]
        return results, tokens

    plain, tokens = run("plain")
    adapted, others = run("adapted", f"--uip_lm_adapter={folder}")
    assert adapted["models"]["LR"]["plain"]["config"]["uip_lm_adapter"] == str(folder)
    # Its scores are not those of the LM alone, and neither are the tokens that come of them.
    assert adapted["cost"]["lm_tokens"] > 0 and plain["cost"]["lm_tokens"] > 0
    assert others != tokens


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--method=ia3", "invalid choice: 'ia3'"),
        ("--learning_rate=fast", "invalid float value: 'fast'"),
        ("--weight_decay=0.1", "--weight_decay is of RecBole's training"),
        ("--train_batch_size=8", "--train_batch_size is of RecBole's training"),
    ],
)
def test_refusals(line, option, words, tmp_path, capsys):
    assert cli.main(["adapt", "--dataset=toy", f"--output={tmp_path / 'a'}", option, *line]) == 2
    assert words in capsys.readouterr().err


def test_the_learning_rate_is_passed_on(line, tmp_path, monkeypatch):
    found = []

    def adapt(*given, learning_rate, **options):
        found.append(learning_rate)
        raise SettingsError("that is enough")

    monkeypatch.setattr("recbole_uip.lm.adapt.adapt", adapt)
    for more in ([], ["--learning_rate=0.5"]):
        command = ["adapt", "--dataset=toy", f"--output={tmp_path / 'a'}", *line, *more]
        assert cli.main(command) == 2
    assert found == [None, 0.5]
