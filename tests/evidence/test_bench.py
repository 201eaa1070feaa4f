import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_uip import cli
from recbole_uip.evidence import bench, figures
from recbole_uip.evidence.bench import (
    Matrices,
    bench_profiles,
    matmul_ceiling,
    matrices,
    prefix_flops,
    scoring_flops,
)
from recbole_uip.evidence.figures import Figure, format_bench, write_figures
from recbole_uip.settings import SettingsError

from ..bridge.conftest import Atomic, make_rows
from ..lm.conftest import make_model, save_lm

MOOD = {"mood": {"source": "constant", "bins": 6, "half_life": [5, "inf"]}}
TASTE = {
    "taste": {"source": "lm", "prompt": "taste in movies", "rank": 2, "codes": 4},
    "interests": {
        "source": "lm",
        "weight": "positive",
        "rank": 2,
        "codes": 4,
        "match": {"bins": 4},
    },
}
TITLES = ["star wars", "toy story", "heat", "the godfather", "city of night", "man", "a day"]
GENRES = ["drama", "comedy action", "thriller"]


# --- counts -------------------------------------------------------------------------------------


def test_flops_of_a_tiny_llama_by_hand():
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    weights = matrices(LlamaForCausalLM(config))
    # each layer: q and o 8 x 8, k and v 4 x 8, gate, up and down 12 x 8
    assert weights.layer_weights == 2 * (2 * 64 + 2 * 32 + 3 * 96)
    assert weights.head_weights == 11 * 8
    # Three texts of 10 tokens together, an ending of 2, a prefix of 5: 16 tokens go forward once
    # and backward twice, 7 meet the head forward and backward.
    layers = 960 * 2 * (16 * 3 + 5)
    assert scoring_flops(weights, 3, 10, 2, 5) == layers + 88 * 2 * 2 * 7
    # Without endings the three last tokens are not run, and there is one gradient.
    assert scoring_flops(weights, 3, 10) == 960 * 2 * 7 * 2 + 88 * 2 * 2 * 7


def test_flops_as_the_docstring_of_scoring_states():
    weights = Matrices(((106_000_000, 1),), (28_000_000, 1))
    # n long texts: the first token and the ending weigh nothing
    per_token = scoring_flops(weights, 1, 10**6 + 1, 0) / 10**6
    assert per_token == pytest.approx(750e6, rel=0.005)
    per_token = scoring_flops(weights, 1, 10**6 + 1) / 10**6
    assert per_token == pytest.approx(540e6, rel=0.01)


def test_flops_of_prefix_scores_by_hand():
    weights = Matrices(((4, 3), (3, 4)), (10, 3))
    # 7 tokens and 3 colons forward, and back through half of the layers, once or twice
    layers, head = 2 * 24 * 10, 2 * 30 * 2 * 7
    assert prefix_flops(weights, 0.5, 3, 7, 0, 1) == 1.5 * layers + head
    assert prefix_flops(weights, 0.5, 3, 7, 2, 2) == 2 * (layers + 2 * 24 * 6) + head


def test_tied_heads_and_embeddings_are_no_layers():
    weights = matrices(make_model(tie_word_embeddings=True))
    assert len(weights.layers) == 2 * 7
    assert weights.head[1] == 32


# --- floors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceilings_are_positive_and_leave_the_threads(dtype, monkeypatch):
    monkeypatch.setattr(bench, "TIMED_FLOPS", 1e6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # so that both ways are tried
        assert matmul_ceiling([(48, 32), (32, 48)], 16, dtype, repeats=2) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert figures.copy_bandwidth(1 << 16, 2) > 0


def test_ratios():
    assert Figure("stage", "", 3.0, "s", 1.5).ratio == 2.0
    assert Figure("flops", "", 2e9, "FLOP/s", 4e9).ratio == 2.0
    assert Figure("memory", "", 1e9, "B").ratio is None
    assert Figure("cached", "", 1.0, "s", 0.0).ratio is None


# --- output -------------------------------------------------------------------------------------


@pytest.fixture
def results():
    figures = [
        Figure("scoring", "LM scoring: 2 texts", 123.4, "s", 100.0),
        Figure("flops", "  of 12 GFLOP", 99e6, "FLOP/s", 2.5e9),
        Figure("stage", "profile stage", 1.25, "s", 0.000025),
        Figure("memory", "peak memory of the process", 1_500_000_000, "B"),
    ]
    return {
        "dataset": "toy",
        "machine": {
            "cpu": "Some CPU",
            "cores": 2,
            "threads": 1,
            "load_average": [0.5, 1.0, 2.0],
            "copy_bandwidth": 1.2e10,
            "device": "cpu",
            "dtype": "bfloat16",
        },
        "figures": [each.to_dict() for each in figures],
        "notes": ["How it is counted."],
        "versions": {"python": "3.11"},
    }


def test_table(results):
    header, empty, titles, rule, *rows = format_bench(results).splitlines()
    assert header == (
        "toy on Some CPU: cores 2, threads 1, load average at start 0.50 1.00 2.00; "
        "copy 12.0 GB/s; LM on cpu in bfloat16; python 3.11"
    )
    assert empty == ""
    assert [cell.strip() for cell in titles.split("|")] == ["figure", "measured", "floor", "ratio"]
    assert set(rule) == {"-", "+"}
    assert len({len(line) for line in (titles, rule, *rows[:4])}) == 1
    cells = [[cell.strip() for cell in row.split(" | ")] for row in rows[:4]]
    assert cells == [
        ["LM scoring: 2 texts", "123 s", "100 s", "1.23"],
        ["of 12 GFLOP", "99 MFLOP/s", "2.5 GFLOP/s", "25.3"],
        ["profile stage", "1.25 s", "25 µs", "50,000"],
        ["peak memory of the process", "1.5 GB", "-", "-"],
    ]
    assert rows[4:] == ["", "How it is counted."]


def test_json_is_whole_or_absent(results, tmp_path):
    path = tmp_path / "new" / "bench.json"
    write_figures(path, results)
    assert json.loads(path.read_text()) == results
    with pytest.raises(TypeError):
        write_figures(tmp_path / "bad.json", {"figure": object()})
    with pytest.raises(SettingsError, match="--json="):
        write_figures(path / "below a file.json", results)
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


# --- end to end ---------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, rng, monkeypatch):
    """The arguments that bench a toy dataset, by facets."""
    monkeypatch.setattr(bench, "TIMED_FLOPS", 1e6)
    monkeypatch.setattr(figures, "COPY_BYTES", 1 << 16)
    items = [(f"i{i}", TITLES[i % 7], GENRES[i % 3]) for i in range(14)] + [("i14", "", "")]
    Atomic(tmp_path, "toy", make_rows(rng), items=items).write()

    def arguments(facets, *more):
        return [
            "--dataset=toy",
            f"--data_path={tmp_path}",
            f"--uip_cache={tmp_path / 'cache'}",
            "--load_col={inter: [user_id, item_id, rating, timestamp]}",
            "--threshold={rating: 4}",
            f"--uip_facets={json.dumps(facets)}",
            "--gpu_id=",
            f"--json={tmp_path / 'bench.json'}",
            *more,
        ]

    return arguments


def check_figures(figures):
    for each in figures:
        assert set(each) == {"key", "name", "measured", "unit", "floor", "details", "ratio"}
        assert each["measured"] > 0
        assert (each["floor"] is None) == (each["key"] == "memory") == (each["ratio"] is None)


def test_without_lm(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.lm, "load", None)  # not called
    assert cli.main(["bench", "profiles", *toy(MOOD, "--repeats=2")]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "bench.json").read_text())
    assert format_bench(results) == out.rstrip("\n")
    assert set(results) == {
        "dataset",
        "items",
        "repeats",
        "data_seconds",
        "machine",
        "figures",
        "notes",
        "versions",
        "command",
    }
    assert results["command"].startswith("recbole-uip bench profiles --dataset=toy")
    assert [each["key"] for each in results["figures"]] == ["stage", "transform", "memory"]
    check_figures(results["figures"])
    stage = results["figures"][0]["details"]
    assert (stage["rows"], stage["facets"], stage["fields"]) == (400, 1, 2)
    assert len(stage["seconds"]) == 2
    # two fields of one direction: S and N, written and read
    assert stage["state_bytes"] == 400 * 2 * 2 * 4 * 2
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def lm_settings(tmp_path):
    folder = tmp_path / "tiny"
    save_lm(folder)
    return [f"--uip_lm={folder}", "--uip_lm_dtype=float32", "--uip_item_text={title} ( {genre} )"]


def test_with_a_tiny_lm(toy, lm_settings, tmp_path, capsys):
    assert cli.main(["bench", "profiles", *toy({**TASTE, **MOOD}, *lm_settings)]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    keys = ["scoring", "flops", "prefix", "cached", "stage"] + ["transform"] * 3 + ["memory"]
    assert [each["key"] for each in results["figures"]] == keys
    check_figures(results["figures"])
    scoring, _, prefix, cached, stage = (each["details"] for each in results["figures"][:5])
    assert scoring["texts"] == 14
    # the names "taste in movies" and "interests", their soft tokens, and these tokens' tangents
    assert scoring["prefix_tokens"] == 3 + 1 + 2 + 2 * 32
    # the ending brings one token, "and", before the verb
    assert scoring["lm_tokens"] == scoring["text_tokens"] + 14 + scoring["prefix_tokens"]
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32), scoring["head_weights"]
    run, predicted = scoring["text_tokens"] + 14, scoring["text_tokens"] - 14
    assert scoring["layer_weights"] == weights[0]
    assert scoring["flops"] == (
        2 * weights[0] * (3 * run + scoring["prefix_tokens"]) + 4 * weights[1] * predicted
    )
    # a colon before each text, the ending's token after it
    assert prefix["lm_tokens"] == scoring["text_tokens"] + 2 * 14
    assert cached["files"] == 2  # one shard, and the soft tokens
    assert stage["items_with_text"] == 14
    assert stage["cost"]["lm_tokens"] == 0
    # the user's cache holds no more than before, and the temporary one is gone
    assert [each.name for each in (tmp_path / "cache").iterdir()] == ["models"]
    assert "14 texts" in capsys.readouterr().out


@pytest.mark.parametrize("mixed", [True, False])
def test_no_facet_of_the_lm_is_timed_with_its_work(mixed, toy, lm_settings, tmp_path):
    facets = {"genres": {"source": "embedding", "rank": 2, "codes": 4}}
    if mixed:
        facets["mood"] = {"source": "prefix", "rank": 2, "codes": 4}
        facets |= TASTE
    line = ["bench", "profiles", *toy(facets, *lm_settings), "--repeats=1"]
    assert cli.main(line) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    keys = ["scoring", "flops", "prefix", "cached"] * mixed
    keys += ["stage", *["transform"] * len(facets), "memory"]
    assert [each["key"] for each in figures] == keys
    stage = figures[keys.index("stage")]["details"]
    assert (stage["items_with_text"], stage["cost"]["lm_tokens"]) == (14, 0)
    assert [each.name for each in (tmp_path / "cache").iterdir()] == ["models"]


def test_the_users_cache_is_read_where_it_holds_all_embeddings(toy, lm_settings, tmp_path):
    facets = {"genres": {"source": "embedding", "rank": 2, "codes": 4}}
    settings = [each for each in toy(facets, *lm_settings) if "json=" not in each]
    task = bench.load_task(bench.parse_config("toy", None, None, settings)[1])
    for n_held in (9, 14):
        bench.lm.embed(task.distinct[:n_held], task.settings.lm, task.settings.cache)
        assert bench._holds_scores(task) == (n_held == 14)


def test_some_items(toy, lm_settings, tmp_path):
    line = ["bench", "profiles", *toy(TASTE, *lm_settings), "--items", "9", "--repeats", "1"]
    assert cli.main(line) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert figures[0]["details"]["texts"] == 9
    stage = figures[4]["details"]
    assert (stage["items_with_text"], stage["cost"]["lm_tokens"]) == (9, 0)
    # Once the user's cache holds them all, the stage has them all.
    more = [each for each in toy(TASTE, *lm_settings) if "json=" not in each]
    task = bench.load_task(bench.parse_config("toy", None, None, more)[1])
    bench.lm.score(task.distinct, task.prompts, task.endings, task.settings.lm, task.settings.cache)
    assert cli.main(line) == 0
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert figures[0]["details"]["texts"] == 9
    stage = figures[4]["details"]
    assert (stage["items_with_text"], stage["cost"]["lm_tokens"]) == (14, 0)


# --- errors -------------------------------------------------------------------------------------


def test_a_missing_dataset(capsys, tmp_path):
    line = [f"--data_path={tmp_path}", "--uip_facets={mood: {source: constant}}", "--gpu_id="]
    with pytest.raises(SettingsError, match=r"no-such-data\.inter"):
        bench_profiles("no-such-data", command_line=line)
    assert cli.main(["bench", "profiles", "--dataset=no-such-data", *line]) == 2
    error = capsys.readouterr().err
    assert "no-such-data.inter" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--repeats=0"], "repeats=0"),
        (["--items=0"], "items=0"),
        (["--dataset=a,b"], "one dataset"),
        (["--uip_facets={}"], "this command needs facets"),
        (["--uip_facet=1"], "did you mean"),
    ],
)
def test_bad_settings(line, words, capsys):
    assert cli.main(["bench", "profiles", "--gpu_id=", *line]) == 2
    assert words in capsys.readouterr().err


def test_usage_errors_exit_with_2():
    assert cli.main(["bench"]) == 2
    assert cli.main(["bench", "profiles", "--repeats=many"]) == 2
    assert cli.main(["summary"]) == 2


def test_summary_command(tmp_path, capsys):
    for seed in (1, 2):
        arms = {
            name: {"test": {"auc": auc + seed / 100, "logloss": 0.5, "gauc": 0.6, "list_auc": 0.6}}
            for name, auc in (("plain", 0.7), ("uip", 0.75))
        }
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        result = {"dataset": "toy", "seed": seed, "models": {"FM": arms}}
        (folder / "results.json").write_text(json.dumps(result))
    folders = [str(tmp_path / f"seed-{seed}") for seed in (1, 2)]
    assert cli.main(["summary", *folders]) == 0
    assert "| FM | uip | 2 | 0.7650" in capsys.readouterr().out
    assert cli.main(["summary", str(tmp_path / "nothing")]) == 2
    assert cli.main(["summary", *folders, "--seed=1"]) == 2
    assert "--seed=1" in capsys.readouterr().err
