"""``recbole-uip adapt`` on atomic files, and a run with what it made."""

from __future__ import annotations

import itertools
import json

from recbole_uip import cli, run_recbole_uip

from ..bridge.conftest import Atomic, make_rows
from ..lm.conftest import save_lm


def test_command(tmp_path, rng, capsys):
    save_lm(tmp_path / "lm")
    words = itertools.product(("star", "toy", "night", "city", "man"), ("war", "day", "heat", "a"))
    items = [(f"i{i}", " ".join(pair), "drama") for i, pair in enumerate(words)]
    Atomic(tmp_path, "toy", make_rows(rng, n_items=20), items=items).write()
    facets = {"taste": {"source": "lm", "rank": 2, "codes": 4}}
    line = [
        f"--data_path={tmp_path}",
        f"--uip_cache={tmp_path / 'cache'}",
        "--load_col={inter: [user_id, item_id, rating, timestamp]}",
        "--threshold={rating: 4}",
        f"--uip_facets={json.dumps(facets)}",
        "--uip_item_text={title}",
        f"--uip_lm={tmp_path / 'lm'}",
        "--gpu_id=",
    ]
    folder = tmp_path / "adapter"
    adapt = ["adapt", "--dataset=toy", f"--output={folder}", "--epochs=2", *line]
    assert cli.main(adapt) == 0
    out = capsys.readouterr().out
    assert "2 held-out texts" in out
    assert f"--uip_lm_adapter={folder}" in out
    assert cli.main(adapt) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main([*adapt[:2], f"--output={tmp_path / 'other'}", "--method=ia3", *line]) == 2
    assert "invalid choice: 'ia3'" in capsys.readouterr().err
    results = run_recbole_uip(
        "LR",
        "toy",
        config={"epochs": 1, "uip_output": str(tmp_path / "out")},
        command_line=[*line, f"--uip_lm_adapter={folder}"],
    )
    assert results["cost"]["lm_tokens"] > 0
