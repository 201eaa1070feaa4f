import json
import shutil

import pytest

from recbole_uip import cli
from recbole_uip.evidence import bench_bank as module
from recbole_uip.evidence import bench_http, figures
from recbole_uip.evidence.figures import format_bench

from ..bridge.conftest import Atomic, make_rows

FACETS = {"mood": {"source": "constant", "bins": 6, "half_life": [5, "inf"]}}


@pytest.fixture
def line(tmp_path, rng, monkeypatch):
    """The command that benches a bank of a toy dataset's items, without an LM."""
    monkeypatch.setattr(figures, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(bench_http, "SECONDS", 1)
    for name in ("LOOK_UPS", "UPDATES"):
        monkeypatch.setattr(module, name, 3000)
    items = [(f"i{i}", "title", "genre") for i in range(15)]
    Atomic(tmp_path, "toy", make_rows(rng), items=items).write()
    return [
        "bench",
        "bank",
        "--dataset=toy",
        f"--data_path={tmp_path}",
        "--load_col={inter: [user_id, item_id, rating, timestamp]}",
        "--threshold={rating: 4}",
        f"--uip_facets={json.dumps(FACETS)}",
        "--gpu_id=",
        f"--json={tmp_path / 'bench.json'}",
        "--events=2000",
        "--repeats=2",
    ]


def test_every_figure_has_its_floor(line, tmp_path, capsys):
    assert cli.main(line) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert format_bench(results) == capsys.readouterr().out.rstrip("\n")
    assert (results["dataset"], results["events"], results["repeats"]) == ("toy", 2000, 2)
    assert results["command"].startswith("recbole-uip bench bank --dataset=toy")
    keys = [each["key"] for each in results["figures"]]
    assert keys[:3] == ["building", "building", "memory"]
    single = ["look_up", "look_up", "look_up_many", "look_up_many"]
    # Bytes: all, and those of mood, codes and row.
    expected = [*single, *["bytes"] * 4, "update", *["update_many"] * 4, "commit"]
    # The load generator is not on every machine.
    expected += ["http"] * 2 if shutil.which("hey") else []
    assert keys[3:] == expected
    for each in results["figures"]:
        assert each["measured"] > 0
        without = each["key"] in ("memory", "bytes")
        assert (each["floor"] is None) == (each["ratio"] is None) == without
        assert without or each["floor"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--events=1"], "events=1 must be at least 1000"),
        (["--repeats=0"], "repeats=0 must be at least 1"),
    ],
)
def test_too_few(line, arguments, words, tmp_path, capsys):
    assert cli.main([*line, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "bench.json").exists()
