import dataclasses
import json
import math

import pytest

from recbole_uip.settings import _PARSERS, SettingsError, UIPSettings, parse_duration

FACETS = {
    "interests": {"weight": "positive"},
    "taste": {"weight": "contrast", "match": {"rank": 8, "half_life": [20, "inf"]}},
    "leniency": {"source": "constant", "half_life": [5, "inf"]},
}
TEXT = "{title}"


def parse(**keys):
    return UIPSettings.from_dict({"uip_item_text": TEXT, "uip_facets": FACETS, **keys})


def test_facets_are_parsed():
    interests, taste, leniency = parse().facets
    assert interests.prompt == "interests" and interests.source == "prefix"
    assert taste.match.half_life == (20.0, math.inf) and taste.match.bins == 32
    assert leniency.half_life == (5.0, math.inf) and leniency.prompt == ""


def test_controls_of_the_lm_are_parsed():
    facets = {
        "embedded": {"source": "embedding", "directions": "fisher"},
        "worded": {"source": "words"},
        "prefixed": {"source": "prefix", "prompt": "habits"},
        "mood": {"source": "prefix"},
    }
    settings = parse(uip_facets=facets)
    embedded, worded, prefixed, mood = settings.facets
    assert (embedded.source, embedded.directions, embedded.prompt) == ("embedding", "fisher", "")
    assert (worded.source, worded.directions) == ("words", "between")
    # They read texts, but are no part of the prompt.
    assert settings.text_facets == list(facets) and settings.prompts == []
    assert settings.prefix_facets == (prefixed, mood)
    assert (prefixed.prompt, mood.prompt) == ("habits", "mood")
    assert parse().text_facets == ["interests", "taste"]


def test_default_arms_are_plain_and_uip():
    plain, uip = parse().arms
    assert (plain.name, plain.facets, plain.user_id) == ("plain", (), "keep")
    assert (uip.name, uip.user_id) == ("uip", "drop")
    assert uip.facets == ("interests", "taste", "leniency")


def test_arms_are_parsed():
    arms = parse(
        uip_arms={
            "plain": {"facets": []},
            "bare": {"facets": [], "user_id": "drop"},
            "some": {"facets": ["leniency"]},
            "all": None,
        }
    ).arms
    assert [arm.facets for arm in arms] == [
        (),
        (),
        ("leniency",),
        ("interests", "taste", "leniency"),
    ]
    # In place of the user ID there are profiles, if any.
    assert [arm.user_id for arm in arms] == ["keep", "drop", "drop", "drop"]


def test_other_keys_are_not_looked_at():
    assert parse(learning_rate=1, seed=7).seed == 7


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0s", 0), (90, 90), (1e-05, 1e-05), ("30m", 1800), ("1h", 3600), ("1.5d", 129600)],
)
def test_durations(value, seconds):
    assert parse_duration("uip_refresh", value) == seconds


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"uip_facet": {}}, "unknown setting 'uip_facet'; did you mean 'uip_facets'"),
        ({"uip_time": "sometimes"}, "uip_time='sometimes' must be one of"),
        ({"uip_refresh": "soon"}, "uip_refresh='soon' is not a duration"),
        ({"uip_refresh": "1e308w"}, "uip_refresh='1e308w' is too long"),
        ({"uip_facets": {"a": False}}, "uip_facets.a=False must be a mapping"),
        ({"uip_arms": {"a": []}}, r"uip_arms.a=\[\] must be a mapping"),
        ({"uip_arms": {"a": {"facets": 0}}}, "uip_arms.a.facets=0 must be all, or a list"),
        (
            {"uip_facets": {"a": {"source": "collaborative", "bins": 5}}},
            "uip_facets.a.bins=5 has no meaning.*set uip_facets.a.match.bins",
        ),
        (
            {"uip_facets": {"a": {"codes": 0, "half_life": [5, 20], "match": {}}}},
            "uip_facets.a.half_life=.* has no meaning.*set uip_facets.a.match.half_life",
        ),
        ({"uip_refresh": "1h", "uip_time": "static"}, "has no meaning with uip_time=static"),
        ({"uip_item_text": None}, r"uip_item_text is not set.*\['interests', 'taste'\]"),
        ({"uip_item_text": "no field"}, "must name at least one item field"),
        ({"uip_item_text": "{open"}, "is not a template"),
        ({"uip_endings": {"liked": "a"}}, "must have the two keys liked and disliked"),
        ({"uip_endings": {"liked": "a", "disliked": "a"}}, "liked and disliked are both 'a'"),
        ({"uip_folds": 1}, "uip_folds=1 must be an integer of at least 2"),
        ({"uip_facets": {"Big": {}}}, "uip_facets.Big: a facet's name is lower-case"),
        ({"uip_facets": {"taste_match": {}}}, "uip_facets.taste_match: match in a facet's name"),
        ({"uip_facets": {"a": {"rnak": 3}}}, "'uip_facets.a.rnak'; did you mean 'rank'"),
        ({"uip_facets": {"a": {"codes": "x"}}}, "uip_facets.a.codes='x' must be an integer"),
        ({"uip_facets": {"a": {"codes": True}}}, "uip_facets.a.codes=True must be an integer"),
        ({"uip_facets": {"a": {"half_life": -1}}}, "half_life=-1 must be a positive number"),
        ({"uip_facets": {"a": {"half_life": [1, 1]}}}, "each once"),
        ({"uip_facets": {"a": {"source": "magic"}}}, "source='magic' must be one of"),
        ({"uip_facets": {"a": {"codes": 0}}}, "gives no field"),
        ({"uip_facets": {"a": {"directions": "up"}}}, "directions='up' must be one of between"),
        (
            {"uip_facets": {"a": {"source": "constant", "directions": "fisher"}}},
            "directions=fisher has no meaning with source: constant",
        ),
        (
            {"uip_facets": {"a": {"source": "constant", "weight": "all"}}},
            "uip_facets.a.weight=all has no meaning with source: constant",
        ),
        (
            {"uip_item_text": None, "uip_facets": {"a": {"source": "words"}}},
            r"uip_item_text is not set.*\['a'\]",
        ),
        (
            {"uip_item_text": None, "uip_facets": {"a": {"source": "embedding"}}},
            r"uip_item_text is not set.*\['a'\]",
        ),
        (
            {"uip_facets": {"a": {"source": "embedding", "prompt": "x"}}},
            "prompt='x' has no meaning with source: embedding",
        ),
        (
            {"uip_facets": {"a": {"source": "constant", "prompt": "x"}}},
            "prompt='x' has no meaning with source: constant",
        ),
        (
            {"uip_facets": {"a": {"weight": "all", "match": {"posterior": "filter"}}}},
            "posterior=filter needs weight: contrast",
        ),
        ({"uip_facets": {"a": {"texts": ["lm"]}}}, "texts='lm' must be one of embedding, words"),
        ({"uip_facets": {"a": {"texts": ["words", "words"]}}}, "names a source twice"),
        (
            {"uip_facets": {"a": {"source": "words", "texts": "words", "match": {}}}},
            r"texts=\['words'\] needs source: collaborative",
        ),
        (
            {"uip_facets": {"a": {"source": "collaborative", "texts": "words"}}},
            r"texts=\['words'\] needs source: collaborative, weight: contrast and a match field",
        ),
        (
            {
                "uip_item_text": None,
                "uip_facets": {"a": {"source": "collaborative", "texts": "words", "match": {}}},
            },
            r"uip_item_text is not set.*\['a'\]",
        ),
        (
            {"uip_facets": {"row": {"source": "constant"}}},
            "the field uip_row, which is that of the n",
        ),
        (
            {"uip_facets": {"a": {"levels": 2}, "a_level2": {}}},
            "uip_facets.a_level2 gives the field uip_a_level2, which is that of uip_facets.a as",
        ),
        (
            {"uip_facets": {"a": {"source": "constant", "half_life": [1000000, 1000001]}}},
            "gives the field uip_a_1e[+]06, which is that of uip_facets.a as well",
        ),
        ({"uip_codebook": {"tol": -1}}, "uip_codebook.tol=-1.0 must be at least 0"),
        ({"uip_codebook": {"tol": "x"}}, "uip_codebook.tol='x' must be of type int or float"),
        ({"seed": "abc"}, "seed='abc' must be an integer of at least 0"),
        ({"uip_output": 2024}, "uip_output=2024 must be of type str or PathLike"),
        ({"uip_arms": {}}, "uip_arms={} must map arm names"),
        ({"uip_arms": {"x": "none"}}, "uip_arms.x='none' must be a mapping"),
        ({"uip_arms": {"x": {"facets": 3}}}, "uip_arms.x.facets=3 must be all, or a list"),
        ({"uip_arms": {"x": {"facets": "tast"}}}, "no facet 'tast'; did you mean 'taste'"),
        ({"uip_arms": {"x/y": {}}}, "uip_arms.x/y: an arm's name is part of file names"),
        ({"uip_arms": {"x": {"facets": ["tast"]}}}, "no facet 'tast'; did you mean 'taste'"),
        ({"uip_arms": {"x": {"user": 1}}}, "unknown setting 'uip_arms.x.user'"),
        ({"uip_lm_dtype": "int3"}, "uip_lm_dtype='int3' must be one of"),
        ({"uip_codebook": {"sample": 0}}, "uip_codebook.sample=0 must be an integer"),
        (
            {
                "uip_facets": {"a": {"source": "collaborative", "codes": 9}},
                "uip_codebook": {"sample": 8},
            },
            "uip_facets.a.codes=9 is more than the uip_codebook.sample=8 rows",
        ),
    ],
)
def test_bad_settings_name_key_value_and_way_out(keys, message):
    with pytest.raises(SettingsError, match=message):
        parse(**keys)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RECBOLE_UIP_CACHE", str(tmp_path))
    assert parse().cache == tmp_path
    monkeypatch.delenv("RECBOLE_UIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert parse().cache == tmp_path / "xdg" / "recbole_uip"


def test_settings_survive_a_round_trip_through_json():
    settings = UIPSettings.from_dict(
        {
            "uip_facets": {
                "interests": {"prompt": "tastes in films", "weight": "positive", "levels": 2},
                "leniency": {"source": "constant", "half_life": [5, "inf"], "match": {}},
                "company": {"source": "collaborative", "match": {"half_life": [20, "inf"]}},
                "worded": {"source": "words", "directions": "fisher"},
                "together": {"source": "collaborative", "texts": ["words"], "match": {}},
            },
            "uip_item_text": "{title}",
            "uip_endings": {"liked": " and loved it", "disliked": " and hated it"},
            "uip_refresh": "1h",
            "uip_empty": "prior",
            "uip_codebook": {"tol": 0.01},
            "seed": 7,
        }
    )
    assert UIPSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_the_gradient_posterior_is_parsed():
    facets = {"interests": {"weight": "positive"}, "leniency": {"source": "constant"}}
    given = {"snapshots": [20, 5, 20], "learning_rate": 0.01, "space": "token", "recompute": True}
    settings = parse(
        uip_facets=facets,
        uip_posterior="gradient",
        uip_likelihood="sequence",
        uip_gradient=given,
    )
    assert settings.gradient.snapshots == (5, 20)
    assert settings.gradient.learning_rate == 0.01 and settings.gradient.recompute is True
    assert settings.gradient.steps == 20 and settings.gradient.prior == "mixture"
    assert [facet.name for facet in settings.tuned_facets] == ["interests"]
    assert parse(uip_gradient={"learning_rate": "auto"}).gradient.learning_rate is None
    assert parse().tuned_facets == () and parse().posterior == "score"
    relinearized = parse(uip_gradient={"e_step": "relinearize", "rounds": 2})
    assert UIPSettings.from_dict(relinearized.to_dict()).gradient == relinearized.gradient
    plain = json.loads(json.dumps(settings.to_dict()))
    again = UIPSettings.from_dict(plain)
    assert again.gradient == settings.gradient and again.likelihood == "sequence"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"uip_posterior": "grad"}, "uip_posterior='grad' must be one of score, gradient"),
        ({"uip_likelihood": "sequence"}, "has no meaning with uip_posterior=score"),
        ({"uip_gradient": {"stpes": 3}}, "uip_gradient.stpes.*did you mean 'steps'"),
        ({"uip_gradient": {"steps": 0}}, "uip_gradient.steps=0 must be an integer of at least 1"),
        ({"uip_gradient": {"snapshots": [0]}}, "uip_gradient.snapshots=0"),
        ({"uip_gradient": {"learning_rate": -1}}, "must be positive and finite, or auto"),
        ({"uip_gradient": {"learning_rate": math.inf}}, "learning_rate=inf must be positive and"),
        ({"uip_gradient": {"held_out": 1}}, "uip_gradient.held_out=1.0 must be at least 0"),
        ({"uip_gradient": {"prior": "vq"}}, "uip_gradient.prior='vq' must be one of"),
        ({"uip_gradient": {"recompute": "yes"}}, "uip_gradient.recompute='yes'"),
        ({"uip_gradient": {"recompute": 1}}, "uip_gradient.recompute=1 must be one of"),
        ({"uip_gradient": 3}, "uip_gradient=3 must be a mapping"),
        ({"uip_gradient": {"e_step": "newton"}}, "uip_gradient.e_step='newton' must be one of"),
        (
            {"uip_gradient": {"e_step": "relinearize", "steps": 3}},
            "uip_gradient.steps=3 has no meaning with e_step: relinearize",
        ),
        (
            {"uip_posterior": "gradient", "uip_facets": {"l": {"source": "constant"}}},
            "uip_facets has none",
        ),
        (
            {"uip_posterior": "gradient", "uip_facets": {"a": {"half_life": 5}}},
            "uip_facets.a.half_life has no meaning",
        ),
        (
            {"uip_posterior": "gradient", "uip_facets": {"a": {"codes": 0, "match": {}}}},
            "gives no match field",
        ),
    ],
)
def test_gradient_settings_that_cannot_be_used(keys, message):
    with pytest.raises(SettingsError, match=message):
        parse(**keys)


@pytest.mark.parametrize("kind", _PARSERS)
def test_every_field_of_a_section_can_be_set(kind):
    names = {field.name for field in dataclasses.fields(kind)} - {"name"}
    assert set(_PARSERS[kind]) == names
