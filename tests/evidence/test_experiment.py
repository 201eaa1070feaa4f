"""Experiments: what they parse, which runs they share, and that finished runs are not repeated."""

import json
import math
import re

import numpy as np
import pytest
import yaml

from recbole_uip import cli
from recbole_uip.behaviours import TRAIN
from recbole_uip.bridge.config import UIPConfig
from recbole_uip.bridge.sequences import SequenceConfig
from recbole_uip.evidence.experiments import run as experiment_module
from recbole_uip.evidence.experiments.outcomes import compare, load, measure
from recbole_uip.evidence.experiments.plan import experiment_names, load_experiment
from recbole_uip.evidence.experiments.run import run_experiment
from recbole_uip.evidence.experiments.store import RunStore, key_of
from recbole_uip.evidence.report.assemble import write_report
from recbole_uip.files import atomic_write
from recbole_uip.settings import SettingsError

N_USERS, N_ITEMS, N_ROWS = 30, 12, 240
FACETS = {
    "taste": {"source": "words", "weight": "contrast", "codes": 4, "rank": 2},
    "leniency": {"source": "constant", "bins": 4, "half_life": ["inf"]},
    "company": {"source": "collaborative", "codes": 4, "rank": 2, "match": {"rank": 2, "bins": 4}},
}
ARMS = {
    "plain": {"facets": [], "user_id": "keep"},
    "uip": {"facets": ["leniency", "company"], "user_id": "drop"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(4)
    pairs = rng.permutation(N_USERS * N_ITEMS)[:N_ROWS]
    rows = [
        f"u{pair // N_ITEMS}\ti{pair % N_ITEMS}\t{rng.integers(1, 6)}\t{1000 + rng.integers(0, 99)}"
        for pair in pairs
    ]
    (folder / "tiny").mkdir()
    for kind, header, lines in (
        ("inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", rows),
        ("item", "item_id:token\ttitle:token_seq", [f"i{i}\tfilm {i % 4}" for i in range(N_ITEMS)]),
    ):
        path = folder / "tiny" / f"tiny.{kind}"
        path.write_text("\n".join([header, *lines]) + "\n")
    return folder


@pytest.fixture
def written(data, tmp_path):
    """Write an experiment on the tiny data, and load it."""

    def written(plan=None, name="asked", arguments=(), **settings):
        plan = {
            "title": "Tiny",
            "datasets": ["tiny"],
            "models": ["FM"],
            "seeds": [1],
            "arms": ARMS,
            **(plan or {}),
        }
        content = {
            "uip_experiment": {key: part for key, part in plan.items() if part is not ...},
            "data_path": str(data),
            "checkpoint_dir": str(tmp_path / "saved"),
            "load_col": {
                "inter": ["user_id", "item_id", "rating", "timestamp"],
                "item": ["item_id"],
            },
            "threshold": {"rating": 3},
            "use_gpu": False,
            "epochs": 1,
            "train_batch_size": 64,
            "embedding_size": 4,
            "mlp_hidden_size": [4],
            "MAX_ITEM_LIST_LENGTH": 3,
            "uip_facets": FACETS,
            "uip_item_text": "{title}",
            "uip_folds": 2,
            "uip_codebook": {"sample": 100},
            **settings,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return load_experiment(str(path), arguments)

    return written


def runs_of(experiment, tuned=None):
    return {
        (case.model, case.arm, tuple(map(str, dict(case.variant).values())), seed): experiment.run(
            case, seed, tuned
        )
        for case in experiment.cases()
        for seed in experiment.seeds
    }


def run_of(experiment, arm="uip", model="FM"):
    (case,) = [case for case in experiment.cases() if (case.arm, case.model) == (arm, model)]
    return experiment.run(case, experiment.seeds[0])


# What a file says.


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_of_properties_can_be_run(name):
    experiment = load_experiment(name, ["--use_gpu=False"])
    assert len(experiment.title.split()) > 3
    cases = list(experiment.cases())
    assert {case.arm for case in cases} == {arm.name for arm in experiment.arms}
    assert {case.model for case in cases} == set(experiment.models)
    # A config takes its time: each arm and each variant in one of the models and data sets.
    chosen = {(case.arm, case.variant, case.model in ("DIN", "DIEN")): case for case in cases}
    point = experiment.tune.points()[0] if experiment.tune else None
    keys: dict[tuple, set] = {}
    for case in list(chosen.values())[:16]:
        run = experiment.run(case, experiment.seeds[0], point)
        assert run.config["data_path"].endswith(case.dataset)
        assert run.config["show_progress"] is False
        keys.setdefault((case.dataset, case.model, case.variant), set()).add(run.key)
    # Variants that change nothing for an arm share their runs; arms of one variant do not.
    assert sum(map(len, keys.values())) == len(list(chosen.values())[:16])


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_is_a_config_file_too(name):
    config = UIPConfig("DeepFM", "ml-1m", [f"properties/experiment/{name}.yaml"])
    assert config.uip.facets and "uip_experiment" not in config.final_config_dict


def test_cases_cross_datasets_variants_models_and_arms(written):
    experiment = written(
        {
            "models": ["FM", "LR", "DIN"],
            "arms": {**ARMS, "history": {"models": ["DIN"], "facets": []}},
            "vary": [
                {"uip_refresh": ["0s", "1h"]},
                {"uip_folds": [2], "uip_empty": ["pad", "prior"]},
            ],
        }
    )
    cases = list(experiment.cases())
    variants = list(dict.fromkeys(dict(case.variant).__repr__() for case in cases))
    assert variants == [
        "{'uip_refresh': '0s'}",
        "{'uip_refresh': '1h'}",
        "{'uip_folds': 2, 'uip_empty': 'pad'}",
        "{'uip_folds': 2, 'uip_empty': 'prior'}",
    ]
    assert len(cases) == len(set(cases)) == 4 * (2 * 2 + 1)
    assert {(case.model, case.arm) for case in cases if case.model == "DIN"} == {("DIN", "history")}
    assert experiment.baseline == "plain"


def test_layers_of_settings(written, tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 7\nlearning_rate: 0.5\nweight_decay: 0.25\n")
    plan = {
        "extends": [str(tmp_path / "base.yaml")],
        "datasets": ["other", "tiny"],
        "by_dataset": {"tiny": {"train_batch_size": 3, "dropout_prob": 0.125}},
        "arms": {"plain": {"facets": [], "settings": {"stopping_step": 2, "dropout_prob": 0.25}}},
        "vary": [{"dropout_prob": [0.5]}],
    }
    experiment = written(plan, learning_rate=0.125, arguments=["--weight_decay=0.75"])
    (case,) = experiment.only(datasets=["tiny"]).cases()
    config = experiment.run(case, 9, {"stopping_step": 3}).config
    # Its own settings over the file it extends; a dataset's, an arm's, a variant's, tuned ones;
    # the command's.
    assert config["train_batch_size"] == 3
    assert config["epochs"] == 1 and config["learning_rate"] == 0.125
    assert config["dropout_prob"] == 0.5 and config["stopping_step"] == 3
    assert config["weight_decay"] == 0.75 and config["seed"] == 9


def test_keys_with_dots_change_one_value_inside_another(written):
    experiment = written(
        {
            "arms": {
                "all": {"facets": "all"},
                "few": {
                    "facets": "all",
                    "settings": {"uip_facets.company.match.bins": 2, "uip_facets.taste.codes": 2},
                },
                "star": {"facets": "all", "settings": {"uip_facets.*.match.bins": 3}},
                "none": {"facets": "all", "settings": {"uip_facets.company.match": None}},
                "method": {"facets": "all", "settings": {"uip_codebook.method": "fsq"}},
            }
        }
    )
    uip = {name: run_of(experiment, name).config.uip for name in ("all", "few", "star", "none")}
    bins = {
        name: [facet.match and facet.match.bins for facet in settings.facets]
        for name, settings in uip.items()
    }
    assert bins == {
        "all": [None, None, 4], "few": [None, None, 2], "star": [None, None, 3], "none": [None] * 3
    }  # fmt: skip
    assert [facet.codes for facet in uip["few"].facets] == [2, 32, 4]
    method = run_of(experiment, "method").config.uip.codebook
    assert (method.method, method.sample) == ("fsq", 100)
    # The file's own settings stay as they were.
    assert experiment.settings["uip_facets"] == FACETS


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--seed=7", "choose by --seeds"),
        ("--model=FM", "choose by --models"),
        ("--dataset=tiny", "choose by --datasets"),
        ("--uip_arms={plain: {facets: []}}", "choose by --arms"),
        ("--config_files=x.yaml", "extends"),
        ("--uip_refresh=1h", "sets it apart for some of its runs"),
        ("--uip_codebook={sample: 9}", "sets it apart for some of its runs"),
        ("--learning_rate=0.1", "sets it apart for some of its runs"),
    ],
)
def test_what_an_experiment_sets_for_each_run_is_not_for_the_command_line(argument, words, written):
    plan = {
        "vary": [{"uip_refresh": ["0s", "1h"]}],
        "arms": {**ARMS, "few": {"facets": "all", "settings": {"uip_codebook.sample": 50}}},
        "tune": {"seed": 1, "grid": {"learning_rate": [0.01, 0.02]}},
    }
    assert written(plan, arguments=["--weight_decay=0.1"])
    with pytest.raises(SettingsError, match=words):
        written(plan, arguments=[argument])


def test_a_split_without_rows_is_refused_before_training(written, tmp_path):
    split = {"split": {"RS": [0.9, 0.1, 0.0]}, "order": "TO", "group_by": None, "mode": "labeled"}
    with pytest.raises(SettingsError, match="leaves a split without rows"):
        run_experiment(written(eval_args=split), tmp_path / "out")
    assert not list((tmp_path / "out" / "runs").glob("*.json"))


@pytest.mark.parametrize("key", ["uip_facets.tast.codes", "uip_facets.*.match.x.y", "uip_fold.a"])
def test_a_key_with_dots_that_names_nothing_is_refused(written, key):
    experiment = written({"vary": [{key: [1]}]})
    with pytest.raises(SettingsError, match=f"asked: {re.escape(key)} names nothing that is set"):
        runs_of(experiment)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"modles": ["FM"]}, "unknown key 'modles'; known are title, question"),
        ({"title": ...}, "title is missing"),
        ({"seeds": []}, "seeds is missing"),
        ({"datasets": "tiny"}, "datasets='tiny' must be a list of names, each once"),
        ({"models": ["FM", "FM"]}, "models=.* must be a list of names, each once"),
        ({"models": "FM"}, "models='FM' must be a list"),
        ({"seeds": 2020}, "seeds=2020 must be a list of whole numbers"),
        ({"seeds": [1, "2"]}, "seeds=.* must be a list of whole numbers"),
        ({"seeds": [1, True]}, "seeds=.* must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "must be a list of whole numbers, each once"),
        ({"extends": "a.yaml"}, "extends='a.yaml' must be a list of names"),
        ({"extends": ["absent.yaml"]}, "there is no file 'absent.yaml'"),
        ({"by_dataset": {"tin": {}}}, "by_dataset.tin: it is not among the experiment's, tiny"),
        ({"by_dataset": {"tiny": [1]}}, r"by_dataset.tiny=\[1\] must map keys to values"),
        ({"arms": ...}, "it has neither arms nor uip_arms"),
        ({"arms": ["plain"]}, r"arms=\['plain'\] must map keys to values"),
        ({"arms": {"a": ["x"]}}, r"arms.a=\['x'\] must map keys to values"),
        ({"arms": {"a": {"settings": ["x"]}}}, r"arms.a.settings=\['x'\] must map keys"),
        ({"arms": {"a": {"models": ["DeepFM"]}}}, "arms.a.models: DeepFM is not among the exp"),
        ({"arms": {"a": {"models": "FM"}}}, "arms.a.models='FM' must be a list of names"),
        ({"models": ["DIN"]}, "DIN reads a user's events and no profile, so it needs an arm"),
        (
            {"models": ["DIN"], "arms": {"a": {"models": ["DIN"], "facets": ["company"]}}},
            "arms.a: DIN read a user's events and no profile: leave facets empty",
        ),
        (
            {"models": ["DIEN"], "arms": {"a": {"models": ["DIEN"], "user_id": "drop"}}},
            "arms.a: DIEN read a user's events",
        ),
        (
            {"compare": [["plain", "absent"]]},
            r"compare=\['plain', 'absent'\] must name two arms of",
        ),
        ({"compare": ["plain", "uip"]}, "compare='plain' must name two arms"),
        ({"compare": [["plain"]]}, r"compare=\['plain'\] must name two arms of plain, uip"),
        ({"vary": {"uip_refresh": ["0s"]}}, "vary=.* must be a list of grids"),
        ({"vary": [{"uip_refresh": "1h"}]}, "vary.uip_refresh='1h' must be a list of values"),
        ({"vary": []}, r"vary=\[\] must be a list of grids"),
        ({"tune": {"grid": {}}}, "tune=.* must have the two keys seed and grid"),
        ({"tune": ["grid"]}, r"tune=\['grid'\] must map keys to values"),
        ({"tune": {"seed": "x", "grid": {}}}, r"tune.seed=\['x'\] must be a list of whole numbers"),
        (
            {"tune": {"seed": 1, "grid": {"epochs": 3}}},
            "tune.grid.epochs=3 must be a list of values",
        ),
    ],
)
def test_what_an_experiment_cannot_mean_is_refused(written, plan, message):
    with pytest.raises(SettingsError, match=message) as raised:
        written(plan)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        ({"arms": {"a": {"facet": []}}}, {}, "unknown setting 'uip_arms.a.facet'; did you mean"),
        ({"arms": {"a": {"facets": ["tast"]}}}, {}, "uip_arms.a.facets: no facet 'tast'; did you"),
        ({"models": ["FMM"]}, {}, "model='FMM' is not a model of RecBole; did you mean"),
        ({}, {"uip_refesh": "1h"}, "unknown setting 'uip_refesh'; did you mean 'uip_refresh'"),
        ({"vary": [{"uip_history": ["all"]}]}, {}, "uip_history='all' must be one of"),
    ],
)
def test_settings_are_checked_before_anything_is_trained(
    written, tmp_path, monkeypatch, plan, settings, message
):
    monkeypatch.setattr(experiment_module, "_make", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SettingsError, match=message):
        run_experiment(written(plan, **settings), tmp_path / "out")


def test_files_that_are_no_experiments_are_refused(tmp_path):
    path = tmp_path / "x.yaml"
    with pytest.raises(
        SettingsError, match="there is none named 'ml-1m-tme'; known are .*ml-1m-time, "
    ):
        load_experiment("ml-1m-tme")
    with pytest.raises(SettingsError, match="there is no file"):
        load_experiment(str(path))
    for text, message in (
        ("epochs: 3", "experiment x has no mapping uip_experiment"),
        ("uip_experiment: [a", "experiment x is not YAML"),
        ("- 1", "experiment x has no mapping uip_experiment"),
    ):
        path.write_text(text)
        with pytest.raises(SettingsError, match=message):
            load_experiment(str(path))


def test_only_a_part_of_it(written):
    experiment = written(
        {
            "models": ["FM", "DIN"],
            "seeds": [1, 2],
            "arms": {**ARMS, "history": {"models": ["DIN"]}},
            "compare": [["uip", "plain"], ["uip", "history"]],
        }
    )
    part = experiment.only(models=["FM"], seeds=[2], arms=["uip", "plain"], datasets=None)
    assert (part.models, part.seeds, part.baseline) == (("FM",), (2,), "plain")
    assert part.compare == (("uip", "plain"),)
    with pytest.raises(SettingsError, match="--seeds=3: experiment asked has 1, 2"):
        experiment.only(seeds=[3])
    with pytest.raises(SettingsError, match="nothing is left to run with --models=DIN --arms=uip"):
        experiment.only(models=["DIN"], arms=["uip"])


# Which runs are the same.

RECBOLE = {
    "learning_rate": 0.2, "train_batch_size": 32, "eval_batch_size": 33, "weight_decay": 0.1,
    "epochs": 2, "stopping_step": 4, "embedding_size": 5, "threshold": {"rating": 4},
    "val_interval": {"rating": "[0,3);(3,5]"}, "user_inter_num_interval": "[2,inf)",
    "eval_args": {"split": {"RS": [0.7, 0.2, 0.1]}, "order": "TO", "group_by": None,
                  "mode": "labeled"},
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
    "learner": "sgd", "clip_grad_norm": {"max_norm": 1}, "valid_metric": "LogLoss",
    "metric_decimal_place": 3, "shuffle": False, "normalize_all": False, "enable_amp": True,
    "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    "reproducibility": False, "MAX_ITEM_LIST_LENGTH": 5,
}  # fmt: skip
PROFILE = {
    "uip_facets": {**FACETS, "company": {**FACETS["company"], "codes": 3}},
    "uip_facets.company.rank": 1,
    "uip_facets.company.levels": 2,
    "uip_facets.company.half_life": [5],
    "uip_facets.company.weight": "all",
    "uip_facets.company.directions": "fisher",
    "uip_facets.company.texts": ["words"],
    "uip_facets.company.match.bins": 3,
    "uip_facets.company.match.posterior": "sums",
    "uip_facets.company.match.rank": 1,
    "uip_facets.company.match.half_life": [5, 9],
    "uip_facets.company.match": None,
    "uip_facets.leniency.bins": 3,
    "uip_facets.leniency.half_life": [7],
    "uip_codebook": {"sample": 99},
    "uip_codebook.method": "kmeans",
    "uip_codebook.n_init": 2,
    "uip_codebook.max_iter": 3,
    "uip_codebook.tol": 0.5,
    "uip_time": "static",
    "uip_history": "train",
    "uip_refresh": "10s",
    "uip_empty": "prior",
    "uip_folds": 3,
}
NOTHING = {
    "checkpoint_dir": "elsewhere", "show_progress": True, "worker": 2, "gpu_id": "1",
    "state": "DEBUG", "save_dataset": True, "log_wandb": True,
    "uip_output": "out", "uip_cache": "cache", "uip_lm_device": "cpu", "uip_user_id": "keep",
}  # fmt: skip
# What neither leniency nor a collaborative facet reads.
UNREAD = {
    "uip_lm": "another", "uip_lm_dtype": "float32", "uip_lm_batch_tokens": 77,
    "uip_lm_text_tokens": 77, "uip_lm_adapter": "some/adapter", "uip_item_text": "{title}!",
    "uip_endings": {"liked": " a", "disliked": " b"}, "uip_facets.taste.codes": 8,
    "uip_facets.taste.directions": "fisher", "uip_facets.leniency.codes": 3,
    "uip_facets.leniency.levels": 2, "uip_facets.leniency.rank": 3,
    "uip_likelihood": "item", "uip_gradient": {"steps": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def known():
    """Keys that were asked for before: a config takes its time."""
    return {}


@pytest.fixture
def key(written, known, data):
    def key(settings=None, arm="uip", model="FM", section=None):
        size = (data / "tiny" / "tiny.inter").stat().st_size
        asked = repr((settings, arm, model, section, size))
        if asked not in known:
            known[asked] = make(settings, arm, model, section)
        return known[asked]

    def make(settings, arm, model, section):
        dotted = {name: value for name, value in (settings or {}).items() if "." in name}
        flat = {name: value for name, value in (settings or {}).items() if name not in dotted}
        arms = {**ARMS, "history": {"models": ["DIN", "DIEN"]}}
        arms[arm] = {**arms.get(arm, {}), **(section or {}), "settings": dotted}
        plan = {"models": ["FM", "LR", "DIN", "DIEN"], "arms": arms}
        return run_of(written(plan, **flat), arm, model).key

    return key


@pytest.mark.parametrize("name", RECBOLE)
def test_recboles_settings_make_another_run(key, name):
    assert key({name: RECBOLE[name]}, "plain") != key(arm="plain")


@pytest.mark.parametrize("name", PROFILE)
def test_profile_settings_make_another_run_of_an_arm_with_profiles_alone(key, name):
    assert key({name: PROFILE[name]}) != key()
    assert key({name: PROFILE[name]}, "plain") == key(arm="plain")


@pytest.mark.parametrize("name", NOTHING)
def test_settings_that_shape_no_result_do_not_make_another_run(key, name):
    assert key({name: NOTHING[name]}) == key()


@pytest.mark.parametrize("name", UNREAD)
def test_what_an_arm_does_not_read_does_not_make_another_run(key, name):
    assert key({name: UNREAD[name]}) == key()


def test_facets_without_a_prompt_do_not_make_another_run_of_an_arm_with_one(key):
    facets = {**FACETS, "likes": {"weight": "positive", "codes": 2, "rank": 1}}

    def of_likes(**settings):
        given = {"uip_item_text": "{title}", "uip_facets": facets, **settings}
        return key(given, section={"facets": ["likes"]})

    assert of_likes(**{"uip_facets.company.rank": 1}) == of_likes()
    assert of_likes(**{"uip_facets.likes.prompt": "x"}) != of_likes()


def test_benchmark_files_are_known_by_their_size(written, data):
    def of_size(size):
        for part in ("one", "two", "three"):
            (data / "tiny" / f"tiny.{part}.inter").write_text("x" * size)
        return run_of(written(benchmark_filename=["one", "two", "three"]), "uip").key

    assert of_size(10) != of_size(11)
    assert of_size(10) == of_size(10)


@pytest.mark.parametrize(
    ("setting", "file"),
    [("uip_lm_adapter", "adapter_model.safetensors"), ("uip_lm", "model.safetensors")],
)
def test_an_lm_on_this_machine_is_known_by_its_content(written, tmp_path, setting, file):
    facets = {"likes": {"weight": "positive", "codes": 2, "rank": 1}}
    folder = tmp_path / "files"
    folder.mkdir()

    def of(content):
        (folder / file).write_bytes(content)
        plan = {"arms": {"uip": {"facets": ["likes"]}}}
        settings = {"uip_facets": facets, setting: str(folder), "uip_cache": str(tmp_path)}
        return run_of(written(plan, **settings), "uip").key

    first = of(b"one")
    assert of(b"two") != first
    assert of(b"one") == first


def test_every_key_of_ours_is_probed():
    from recbole_uip.settings import _KEYS

    probed = {name.split(".")[0] for name in (*PROFILE, *NOTHING, *UNREAD)}
    # The gradient posterior is refused without a facet that it tunes.
    assert set(_KEYS) - probed == {"uip_arms", "uip_posterior"}


@pytest.mark.parametrize(
    "section",
    [
        {"facets": ["company"]}, {"facets": "all"}, {"user_id": "keep"}, {"control": "random"},
        {"control": "shuffled"}, {"values": "means"},
    ],
)  # fmt: skip
def test_what_an_arm_is_makes_another_run(key, section):
    assert key(section=section) != key()


def test_the_same_said_otherwise_is_the_same_run(key, written):
    assert key(section={"facets": ["company", "leniency"]}) == key()
    assert key({"uip_facets.company.half_life": ["inf"], "uip_codebook.method": "em"}) == key()
    assert key({"uip_refresh": "0m"}) == key()
    assert key({"uip_refresh": "1h"}) == key({"uip_refresh": "60m"})
    assert key(model="LR") != key()
    first = run_of(written(name="one"))
    other = run_of(
        written({"title": "Another", "arms": {"x": ARMS["uip"], "plain": ARMS["plain"]}}, "two"),
        "x",
    )
    assert first.key == other.key and first.group == other.group


@pytest.mark.parametrize("source", ["lm", "prefix"])
def test_the_order_of_what_the_lm_scores_shapes_the_prompt(key, source):
    a, b, c = ({"source": source, "prompt": word, "rank": 2, "codes": 2} for word in "abc")
    abc, acb = {"a": a, "b": b, "c": c}, {"a": a, "c": c, "b": b}
    for facets in (["a", "b", "c"], ["a"], ["b", "c"]):
        section = {"facets": facets}
        keys = [key({"uip_facets": each}, section=section) for each in (abc, acb)]
        assert keys[0] != keys[1], facets
    # Another facet's prompt is in the one prompt of all.
    other = {**abc, "c": {**c, "prompt": "d"}}
    assert key({"uip_facets": abc}, section={"facets": ["a"]}) != key(
        {"uip_facets": other}, section={"facets": ["a"]}
    )
    # Words and embeddings have no prompt, and scores of embeddings and of prefixes one each.
    prompted = {"lm": "prefix", "prefix": "lm"}[source]
    for other in ("words", "embedding", prompted):
        facet = {"source": other, "rank": 2, "codes": 2}
        keys = {
            key({"uip_facets": {"a": facet, **rest}}, section={"facets": ["a"]})
            for rest in ({}, {"b": b}, {"c": c, "b": b})
        }
        assert len(keys) == 1
    worded = {"a": {"source": "words", "rank": 2, "codes": 2}}
    one, two = (
        key({"uip_facets": worded, "uip_item_text": text}, section={"facets": ["a"]})
        for text in ("{title}", "{title}!")
    )
    assert one != two


@pytest.mark.parametrize("model", ["DIN", "DIEN"])
def test_runs_of_sequences_know_their_history_and_no_facets(key, model):
    base = key(arm="history", model=model)
    for name in ("uip_history", "uip_refresh", "MAX_ITEM_LIST_LENGTH", "learning_rate"):
        value = {**PROFILE, **RECBOLE}[name]
        assert key({name: value}, "history", model) != base, name
    for name in ("uip_facets", "uip_codebook", "uip_folds", "uip_empty", "uip_facets.company.rank"):
        assert key({name: PROFILE[name]}, "history", model) == base, name


def test_models_of_sequences_do_not_share_rows(written):
    """DIEN's rows have negatives beside the events, and DIN's have none."""
    experiment = written(
        {"models": ["FM", "LR", "DIN", "DIEN"], "arms": {**ARMS, "h": {"models": ["DIN", "DIEN"]}}},
        uip_facets={"leniency": FACETS["leniency"], "company": FACETS["company"]},
    )
    groups = {key[:2]: run.group for key, run in runs_of(experiment).items()}
    assert len({groups["FM", "plain"], groups["FM", "uip"], groups["LR", "uip"]}) == 1
    assert len(set(groups.values())) == 3


def test_other_data_of_the_same_name_make_another_run(key, data, written):
    path = data / "tiny" / "tiny.inter"
    before, text = key(arm="plain"), path.read_text()
    path.write_text(text + "u0\ti0\t5\t1\n")
    assert key(arm="plain") != before
    path.write_text(text)
    assert key(arm="plain") == before


def test_a_hash_of_equal_values():
    assert key_of({"a": 1, "b": [1.5, None]}) == key_of({"b": [1.5, None], "a": 1})
    assert key_of({"half_life": [5, math.inf]}) == key_of({"half_life": [5, "inf"]})
    assert key_of({"a": 1}) != key_of({"a": "1"}) and key_of({"a": [1, 2]}) != key_of({"a": [2, 1]})


# What is kept.


def test_a_store_keeps_whole_runs(tmp_path):
    store = RunStore(tmp_path / "runs")
    assert "k" not in store
    for read in (store.read, store.predictions):
        with pytest.raises(KeyError, match="k"):
            read("k")
    store.write("k", {"auc": 0.5}, {"valid_row": np.arange(3)})
    assert "k" in store and store.read("k") == {"key": "k", "auc": 0.5}
    np.testing.assert_array_equal(store.predictions("k")["valid_row"], np.arange(3))
    store.write("k", {"auc": 0.75}, {})
    assert store.read("k")["auc"] == 0.75 and store.predictions("k") == {}


def test_a_run_that_was_not_written_whole_is_not_finished(tmp_path, monkeypatch):
    store = RunStore(tmp_path / "runs")
    with pytest.raises(ValueError, match="JSON"):
        store.write("k", {"auc": float("nan")}, {"row": np.arange(3)})
    assert "k" not in store
    assert [path.name for path in store.folder.iterdir()] == ["k.npz"]

    def dies(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", dies)
    with pytest.raises(KeyboardInterrupt):
        store.write("other", {}, {})
    assert [path.name for path in store.folder.iterdir()] == ["k.npz"]


# Carrying it out.


def counted(monkeypatch):
    """Arms that are trained, as they are."""
    trained, train_arm = [], experiment_module.train_arm

    def counting(config, dataset, arm, checkpoints):
        trained.append((config["model"], arm.name, config["seed"]))
        return train_arm(config, dataset, arm, checkpoints)

    monkeypatch.setattr(experiment_module, "train_arm", counting)
    return trained


def results(folder):
    plan = json.loads((folder / "experiment.json").read_text())
    store = RunStore(folder / plan["runs"])
    return {
        (case["model"], case["arm"], str(case["variant"]), int(seed)): store.read(key)
        for case in plan["cases"]
        for seed, key in case["seeds"].items()
    }


def test_parts_of_an_experiment_are_planned_together(written, tmp_path, monkeypatch):
    whole = written({"seeds": [1, 2]})
    monkeypatch.setattr(experiment_module, "_make", lambda *_: None)

    def planned(whole, **part):
        folder = run_experiment(
            whole.only(**part), tmp_path / "out", whole=whole, command=f"run {part}"
        )
        plan = json.loads((folder / "experiment.json").read_text())
        return plan, {case["arm"]: sorted(case["seeds"]) for case in plan["cases"]}

    assert planned(whole, arms=["uip"], seeds=[2])[1] == {"uip": ["2"]}
    plan, cases = planned(whole, arms=["plain", "uip"], seeds=[1])
    assert cases == {"uip": ["1", "2"], "plain": ["1"]}
    assert plan["baseline"] == "plain" and len(plan["commands"]) == 2
    # What was planned of another experiment, or with other settings, is not mixed in.
    other = written({"seeds": [1, 2]}, epochs=7)
    assert planned(other, arms=["plain"])[1] == {"plain": ["1", "2"]}
    (tmp_path / "out" / "asked" / "experiment.json").write_text("{")
    assert planned(other, arms=["plain"], seeds=[1])[1] == {"plain": ["1"]}
    # Nor what was planned where the same settings gave other results.
    monkeypatch.setattr(experiment_module, "RESULTS", -1)
    assert planned(other, arms=["uip"], seeds=[2])[1] == {"uip": ["2"]}


def test_another_plan_in_the_same_place_is_said(written, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(experiment_module, "_make", lambda *_: None)
    run_experiment(written(), tmp_path / "out", command="the first")
    run_experiment(written(arguments=["--uip_cache=elsewhere"]), tmp_path / "out")
    assert "is replaced" not in caplog.text
    run_experiment(written(arguments=["--epochs=7"]), tmp_path / "out")
    assert "experiment.json is replaced: it was of other settings, by the first" in caplog.text


def test_a_run_that_cannot_be_made_does_not_stop_the_others(written, tmp_path, monkeypatch):
    arms = {**ARMS, "wild": {"facets": [], "settings": {"learning_rate": 1e30}}}
    experiment = written({"arms": arms, "seeds": [1, 2]}, epochs=4)
    with pytest.raises(
        SettingsError,
        match="2 of 6 runs cannot be made, all others are: tiny FM wild seed 1: .*NaN",
    ):
        run_experiment(experiment, tmp_path / "out")
    trained = counted(monkeypatch)
    with pytest.raises(SettingsError, match="2 of 2 runs cannot be made"):
        run_experiment(experiment, tmp_path / "out")
    assert set(trained) == {("FM", "wild", 1), ("FM", "wild", 2)}
    # Nor does data that cannot be loaded.
    lost = {"datasets": ["tiny"], "arms": {**ARMS, "no": {"settings": {"uip_folds": 1000}}}}
    with pytest.raises(SettingsError, match="1 of 3 runs cannot be made.*uip_folds=1000"):
        run_experiment(written(lost, "lost", seed=3), tmp_path / "lost")


def test_settings_of_the_data_are_not_shared(written):
    arms = {
        "plain": {"facets": []},
        "numbers": {"facets": [], "settings": {"numerical_features": ["timestamp"]}},
        "buckets": {
            "facets": [],
            "settings": {
                "numerical_features": ["timestamp"],
                "discretization": {"timestamp": {"method": "ED", "bucket": 3}},
            },
        },
    }
    experiment = written({"arms": arms})
    assert len({run_of(experiment, arm).group for arm in arms}) == 3


def test_values_that_are_lists_or_mappings_can_vary(written, tmp_path):
    varied = [
        {"mlp_hidden_size": [[4], [2, 2]]},
        {"uip_codebook": [{"method": "em", "sample": 100}, {"method": "fsq", "sample": 100}]},
        {"uip_facets.leniency.half_life": [["inf"], [5, "inf"]]},
    ]
    experiment = written({"vary": varied, "arms": {"uip": ARMS["uip"]}})
    folder = run_experiment(experiment, tmp_path / "out")
    html, _ = write_report(folder, resamples=20)
    assert "half_life" in html.read_text()
    assert len(results(folder)) == 6


def test_an_experiment_is_resumed_where_it_stopped(written, tmp_path, monkeypatch):
    experiment = written({"seeds": [1, 2]})
    trained = counted(monkeypatch)
    write = RunStore.write

    def killed(self, key, record, predictions):
        if len(trained) == 3:
            with atomic_write(self._path(key, "npz")) as file:
                np.savez_compressed(file, **predictions)
            raise KeyboardInterrupt
        write(self, key, record, predictions)

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, tmp_path / "out")
    assert trained == [("FM", "plain", 1), ("FM", "uip", 1), ("FM", "plain", 2)]
    # It can be looked at already.
    plan = json.loads((tmp_path / "out" / "asked" / "experiment.json").read_text())
    assert len(plan["cases"]) == 2 and plan["baseline"] == "plain"
    trained.clear()
    folder = run_experiment(experiment, tmp_path / "out")
    assert trained == [("FM", "plain", 2), ("FM", "uip", 2)]
    trained.clear()
    run_experiment(experiment, tmp_path / "out")
    assert trained == []
    # The plain runs are there for another experiment too, and the file's place says nothing.
    other = written({"arms": {"p": ARMS["plain"], "l": {"facets": ["leniency"]}}}, "other")
    run_experiment(other, tmp_path / "out")
    assert trained == [("FM", "l", 1)]
    found = results(folder)
    assert set(found) == {("FM", arm, "{}", seed) for arm in ARMS for seed in (1, 2)}
    for (_, arm, _, seed), record in found.items():
        assert (record["arm"], record["seed"], record["dataset"]) == (arm, seed, "tiny")
        assert record["config"]["seed"] == seed and record["epochs"] == 1
        assert record["protocol"]["history"] == "observed"
        assert ("bytes_per_user" in record["cost"]) == (arm == "uip")
    with pytest.raises(SettingsError, match="--workers=0 must be at least 1"):
        run_experiment(experiment, tmp_path / "out", workers=0)


def test_what_is_kept_of_a_run(written, tmp_path):
    experiment = written()
    folder = run_experiment(experiment, tmp_path / "out")
    run = run_of(experiment, "uip")
    store = RunStore(folder / "../runs")
    columns, record = store.predictions(run.key), store.read(run.key)
    from recbole_uip.bridge.preparation import create_dataset, data_preparation

    dataset = create_dataset(run.config)
    data_preparation(run.config, dataset)
    behaviours = dataset.behaviours
    for number, split in enumerate(("valid", "test"), start=1):
        rows = columns[f"{split}_row"]
        np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(behaviours.split == number))
        for name in ("user", "item"):
            np.testing.assert_array_equal(
                columns[f"{split}_{name}"], getattr(behaviours, name)[rows]
            )
        np.testing.assert_array_equal(columns[f"{split}_label"], behaviours.liked[rows])
        train = behaviours.split == TRAIN
        for row, history, known, popular in zip(
            rows,
            *(columns[f"{split}_{name}"] for name in ("history", "user_rows", "item_rows")),
            strict=True,
        ):
            mine = behaviours.user == behaviours.user[row]
            assert history == (mine & (behaviours.time < behaviours.time[row])).sum()
            assert known == (mine & train).sum()
            assert popular == ((behaviours.item == behaviours.item[row]) & train).sum()
    from sklearn.metrics import roc_auc_score

    auc = roc_auc_score(columns["test_label"], columns["test_score"])
    np.testing.assert_allclose(record["test"]["auc"], auc, atol=1e-6)


def test_history_is_the_same_whatever_the_banks_lag(written, tmp_path):
    """One plain run serves all lags, so what it says of a row must not depend on them."""
    columns = []
    for number, settings in enumerate(({}, {"uip_refresh": "1d"}, {"uip_time": "static"})):
        experiment = written({"arms": {"plain": ARMS["plain"]}}, **settings)
        folder = run_experiment(experiment, tmp_path / str(number))
        columns.append(RunStore(folder / "../runs").predictions(run_of(experiment, "plain").key))
    assert columns[0]["test_history"].max() > 0
    for other in columns[1:]:
        for name, values in columns[0].items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_the_best_point_of_the_grid_by_validation_is_run(written, tmp_path, monkeypatch):
    grid = {"learning_rate": [0.001, 0.1], "embedding_size": [3, 4]}
    experiment = written({"seeds": [1, 2], "tune": {"seed": 1, "grid": grid}})
    trained = counted(monkeypatch)
    folder = run_experiment(experiment, tmp_path / "out")
    # Four points of each arm; of the chosen one only the other seed is left to run.
    assert sorted(trained) == sorted(
        [("FM", arm, 1) for arm in ARMS] * 4 + [("FM", arm, 2) for arm in ARMS]
    )
    plan = json.loads((folder / "experiment.json").read_text())
    store = RunStore(folder / plan["runs"])
    assert {each["arm"] for each in plan["tuning"]} == set(ARMS)
    for tuned in plan["tuning"]:
        assert [each["settings"] for each in tuned["grid"]] == experiment.tune.points()
        aucs = [store.read(each["key"])["valid"]["auc"] for each in tuned["grid"]]
        assert len(set(aucs)) > 1
        best = int(np.argmax(aucs))
        assert tuned["chosen"] == tuned["grid"][best]["settings"]
        (case,) = [case for case in plan["cases"] if case["arm"] == tuned["arm"]]
        assert case["seeds"]["1"] == tuned["grid"][best]["key"]
        other = store.read(case["seeds"]["2"])["config"]
        assert {name: other[name] for name in grid} == tuned["chosen"]


def test_no_seed_is_tuned_on_the_test_rows_of_another(written, tmp_path):
    tune = {"tune": {"seed": 1, "grid": {"learning_rate": [0.01]}}}
    apart = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": None, "mode": "labeled"}
    with pytest.raises(SettingsError, match="tune.seed=1 would be tuned on rows that other seeds"):
        run_experiment(written({"seeds": [1, 2], **tune}, eval_args=apart), tmp_path / "out")
    run_experiment(written({"seeds": [1], **tune}, eval_args=apart), tmp_path / "out")


def test_verdicts_are_corrected_for_what_the_file_asks(written, tmp_path):
    arms = {**ARMS, "again": {"facets": [], "user_id": "drop"}}
    experiment = written({"arms": arms, "compare": [["uip", "again"]]})
    folder = run_experiment(experiment.only(arms=["plain", "uip"]), tmp_path, whole=experiment)
    outcomes = load(folder)
    (comparison,) = compare(outcomes, measure([outcomes]))
    assert comparison.n_tests == 3


def test_a_point_without_auc_is_not_chosen(written, tmp_path, monkeypatch):
    experiment = written(
        {"arms": {"plain": ARMS["plain"]}, "tune": {"seed": 1, "grid": {"epochs": [1, 2, 3]}}}
    )
    keys = [experiment.run(next(experiment.cases()), 1, p).key for p in experiment.tune.points()]
    store = RunStore(tmp_path / "out" / "runs")
    for key, auc in zip(keys, (None, 0.6, 0.5), strict=True):
        store.write(key, {"valid": {"auc": auc}}, {})
    folder = run_experiment(experiment, tmp_path / "out")
    (tuned,) = json.loads((folder / "experiment.json").read_text())["tuning"]
    assert tuned["chosen"] == {"epochs": 2}


RANDOM = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": None, "mode": "labeled"}


def test_the_seed_alone_says_how_rows_are_split(written, tmp_path):
    """Whatever was run before, and in whichever process, arms meet the same rows."""
    experiment = written({"seeds": [1, 2]}, eval_args=RANDOM)
    stores = []
    for number, part in enumerate((experiment, experiment.only(seeds=[2], arms=["uip"]))):
        folder = run_experiment(part, tmp_path / str(number))
        stores.append(RunStore(folder / "../runs"))
    rows = {
        (arm, seed): stores[0].predictions(run.key)["test_row"]
        for (_, arm, _, seed), run in runs_of(experiment).items()
    }
    for seed in (1, 2):
        assert set(rows["plain", seed]) == set(rows["uip", seed])
    assert set(rows["uip", 1]) != set(rows["uip", 2])
    key = runs_of(experiment)["FM", "uip", (), 2].key
    np.testing.assert_array_equal(stores[1].predictions(key)["test_row"], rows["uip", 2])
    assert stores[1].read(key)["test"] == stores[0].read(key)["test"]


def test_two_workers_find_what_one_finds(written, tmp_path):
    plan = {
        "models": ["FM", "DIN", "DIEN"],
        "arms": {"uip": ARMS["uip"], "history": {"models": ["DIN", "DIEN"]}},
    }
    experiment = written(plan, eval_args=RANDOM, uip_history="observed")
    one, two = (
        results(run_experiment(experiment, tmp_path / str(workers), workers=workers))
        for workers in (1, 2)
    )
    assert one.keys() == two.keys() and len(one) == 3
    for name, record in one.items():
        assert record["key"] == two[name]["key"]
        for split in ("valid", "test"):
            for metric in ("auc", "logloss"):
                np.testing.assert_allclose(
                    record[split][metric], two[name][split][metric], atol=1e-5, err_msg=str(name)
                )


# The command.


def test_the_list_has_a_line_each(capsys):
    assert cli.main(["experiment", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == experiment_names()
    assert all(len(line.partition(": ")[2]) > 10 for line in lines)


def test_the_command_is_silent_but_for_its_bar_and_a_line_a_run(
    written, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    written({"models": ["FM", "DIN"], "arms": {**ARMS, "history": {"models": ["DIN"]}}})
    line = ["experiment", "asked.yaml", "--output", "out", "--arms=plain,history", "--epochs=2"]
    assert cli.main(line) == 0
    said = capsys.readouterr()
    folder = tmp_path / "out" / "asked"
    assert said.out.splitlines() == [
        f"experiment: {folder.relative_to(tmp_path) / 'experiment.json'}",
        f"report it by: recbole-uip report {folder.relative_to(tmp_path)}",
    ]
    lines = [part for part in re.split(r"[\r\n]+", said.err) if part.strip()]
    bars = [part for part in lines if part.startswith("asked:")]
    runs = [part for part in lines if "valid AUC" in part]
    assert "0/2" in bars[0] and "2/2" in bars[-1]
    assert len(runs) == 2 and all("2 epochs" in part for part in runs)
    assert [
        part for part in lines if part not in bars + runs and "2 runs to make" not in part
    ] == []
    plan = json.loads((folder / "experiment.json").read_text())
    assert plan["commands"][-1].endswith(" ".join(line))
    assert set(results(folder)) == {("FM", "plain", "{}", 1), ("DIN", "history", "{}", 1)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no name is given; --list names them"),
        (["nothing"], "there is none named 'nothing'"),
        (["asked.yaml", "--seeds=x"], "--seeds=x must be whole numbers"),
        (["asked.yaml", "--arms=none"], "--arms=none: experiment asked has plain, uip"),
        (["asked.yaml", "--workers=0"], "--workers=0 must be at least 1"),
        (["asked.yaml", "--uip_refesh=1h"], "unknown setting 'uip_refesh'"),
    ],
)
def test_bad_commands_exit_with_2_and_one_line(
    written, tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    written()
    assert cli.main(["experiment", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_config_of_sequences_is_made_for_models_of_sequences(written):
    experiment = written({"models": ["FM", "DIN"], "arms": {**ARMS, "h": {"models": ["DIN"]}}})
    kinds = {key[0]: type(run.config) for key, run in runs_of(experiment).items()}
    assert kinds == {"FM": UIPConfig, "DIN": SequenceConfig}
