"""The gradient posterior as a whole, with a tiny random LM: fields, time, resuming, processes."""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pathlib
import signal
import socket
import warnings
from collections import Counter

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from recbole_uip import lm
from recbole_uip.bank.build import bank_of_profiles
from recbole_uip.em import collaborative
from recbole_uip.em.facet import Observations
from recbole_uip.em.snapshots import take_snapshots
from recbole_uip.em.states import index_history
from recbole_uip.lm.likelihood import PrefixLikelihood, SoftTokenLikelihood
from recbole_uip.passages import groups
from recbole_uip.profiles import Profiles, infer
from recbole_uip.settings import SettingsError, UIPSettings

from .em.conftest import make_world
from .lm.conftest import WORDS, save_lm

FACETS = {
    "interests": {"source": "lm", "weight": "positive", "codes": 3, "rank": 2},
    "taste": {"source": "lm", "weight": "contrast", "codes": 2, "rank": 2, "levels": 2},
    "leniency": {"source": "constant", "bins": 4},
}
GRADIENT = {"steps": 3, "rounds": 2, "snapshots": [4], "learning_rate": 0.05, "held_out": 0.2}
RELINEARIZE = {"e_step": "relinearize", "rounds": 2, "snapshots": [4], "held_out": 0.2}


@pytest.fixture(scope="module")
def world():
    return make_world(n_users=12, n_items=20, events_per_user=12)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(1)
    return [None, *(" ".join(rng.choice(WORDS[2:], rng.integers(1, 5))) for _ in range(19))]


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_lm(folder, max_position_embeddings=256)
    return folder


def settings_of(lm_folder, cache, **keys):
    return UIPSettings.from_dict(
        {
            "uip_facets": FACETS,
            "uip_item_text": "{title}",
            "uip_endings": {"liked": " and loved it", "disliked": " and hated it"},
            "uip_lm": str(lm_folder),
            "uip_lm_batch_tokens": 150,
            "uip_cache": str(cache),
            "uip_posterior": "gradient",
            "uip_gradient": GRADIENT,
            "uip_history": "observed",
            **keys,
        }
    )


@pytest.fixture
def make(lm_folder, tmp_path):
    return lambda cache=tmp_path / "cache", **keys: settings_of(lm_folder, cache, **keys)


@pytest.fixture(scope="module", params=[GRADIENT, RELINEARIZE], ids=["adam", "relinearize"])
def gradient(request):
    return request.param


@dataclasses.dataclass
class Whole:
    """A run from beginning to end, its cache, and how often it asked the LM."""

    profiles: Profiles
    cache: pathlib.Path
    calls: int


@pytest.fixture(scope="module")
def whole(world, texts, lm_folder, tmp_path_factory, gradient):
    cache = tmp_path_factory.mktemp("whole")
    settings = settings_of(lm_folder, cache, uip_gradient=gradient)
    with counted_calls() as calls:
        return Whole(run(world.behaviours, texts, settings), cache, calls())


@pytest.fixture
def inferred(whole):
    return whole.profiles


@contextlib.contextmanager
def counted_calls():
    """How often the LM has been asked since; a function that says so."""
    original, calls = SoftTokenLikelihood.value_and_gradient, []

    def counted(self, *arguments):
        calls.append(1)  # by several threads
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftTokenLikelihood, "value_and_gradient", counted)
        yield lambda: len(calls)


def run(behaviours, texts, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return infer(behaviours, texts, settings)


def numbers(profiles):
    """All that was fitted, and all that was inferred, of tuned facets."""
    out = {}
    for name, tuned in profiles.tuned.items():
        out[f"{name}.codebook"] = tuned.codebook.packed
        out[f"{name}.curvature"] = np.array([tuned.report["curvature"]])
        out[f"{name}.codes"], out[f"{name}.means"] = tuned.codes, tuned.means
    return out


def spawned(function, *arguments):
    """A process of its own: a fork of one with threads may wait forever for a lock of theirs."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    return process


def exit_code(process):
    process.join(300)
    if process.is_alive():
        process.kill()
        pytest.fail("the process does not come to an end")
    return process.exitcode


def run_until(limit, behaviours, texts, settings):
    """Killed by itself as it begins the evaluation of this number."""
    original, calls = SoftTokenLikelihood.value_and_gradient, 0

    def counted(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    SoftTokenLikelihood.value_and_gradient = counted
    run(behaviours, texts, settings)


def run_as(rank, port, behaviours, texts, settings, path):
    """One of two processes, as ``accelerate launch`` starts them."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    with counted_calls() as calls:
        fitted = numbers(run(behaviours, texts, settings))
    np.savez(path, calls=calls(), **fitted)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


def flipped(behaviours, rows):
    liked = behaviours.liked.copy()
    liked[rows] = 1 - liked[rows]
    return dataclasses.replace(behaviours, liked=liked)


def test_fields_stand_with_those_of_the_closed_form(inferred, world):
    fields = {each.name: each for each in inferred.fields}
    assert list(fields) == ["uip_interests", "uip_taste", "uip_taste_level2", "uip_leniency"]
    for name, size in (("uip_interests", 3), ("uip_taste", 2), ("uip_taste_level2", 2)):
        values = fields[name].values
        assert fields[name].size == size and values.shape == (len(world.behaviours),)
        assert values.min() == 0 and 1 <= values.max() <= size
    first = inferred.history.seen < 4
    assert first.any() and (fields["uip_taste"].values[first & world.behaviours.train] == 0).all()
    means = inferred.means()
    assert means["uip_interests"].shape == (len(world.behaviours), 2)
    assert (means["uip_interests"][fields["uip_interests"].values == 0] == 0).all()
    assert inferred.cost["lm_tokens"] > 0
    report = inferred.report["taste"]
    assert len(report["held_out_bounds"]) == report["rounds"] == 2
    # Codebooks are known by their field, so that no facet's hides another's.
    assert len(inferred.report["interests"]["uip_interests"]) == 1
    assert len(report["uip_taste"]) == 2
    (fingerprint,) = {each.fingerprint for each in inferred.tuned.values()}
    assert len(fingerprint) == 64


def test_sequences_and_free_tokens(world, texts, make):
    sequence = run(world.behaviours, texts, make(uip_likelihood="sequence"))
    free = run(
        world.behaviours,
        texts,
        make(uip_gradient={**GRADIENT, "space": "token", "prior": "none", "rounds": 1}),
    )
    assert sequence.tuned["taste"].means.shape[1] == 2
    assert free.tuned["taste"].means.shape[1] == 32
    for profiles in (sequence, free):
        for tuned in profiles.tuned.values():
            assert (tuned.codes >= 0).any() and (np.abs(tuned.means) > 0).any()


@pytest.mark.parametrize("likelihood", ["item", "sequence"])
def test_scores_recomputed_at_codewords(world, texts, make, likelihood):
    """Other codes than the closed form's, by fewer LM tokens than gradient steps take."""
    facets = {"interests": FACETS["interests"], "taste": {**FACETS["taste"], "levels": 1}}
    found = {}
    for e_step, rounds in (("relinearize", 1), ("relinearize", 3), ("adam", 3)):
        gradient = {"e_step": e_step, "rounds": rounds, "snapshots": [4], "tol": 0.0}
        keys = {"uip_facets": facets, "uip_gradient": gradient, "uip_likelihood": likelihood}
        found[e_step, rounds] = run(world.behaviours, texts, make(**keys))
    closed, ours, steps = found.values()
    for name in facets:
        assert (ours.tuned[name].codes >= 0).any()
        assert not np.allclose(ours.tuned[name].means, closed.tuned[name].means)
        assert len(ours.tuned[name].report["held_out_bounds"]) == 3
        tokens = [each.tuned[name].report["lm_tokens"] for each in (closed, ours, steps)]
        # at θ⁰ sequences have no cached scores
        assert (tokens[0] == 0) == (likelihood == "item")
        assert tokens[0] < tokens[1] < tokens[2]


@pytest.mark.parametrize("taste", ["lm", "prefix"])
def test_soft_tokens_in_the_last_layers(world, texts, make, gradient, taste, tmp_path):
    """They are tuned, with embeddings beside them or alone; rows know what they may know."""
    facets = {
        "interests": {**FACETS["interests"], "source": "prefix"},
        "taste": {**FACETS["taste"], "source": taste},
    }
    settings = make(uip_gradient=gradient, uip_facets=facets)
    behaviours = world.behaviours
    profiles = run(behaviours, texts, settings)
    assert list(profiles.tuned) == ["interests", "taste"]
    for tuned in profiles.tuned.values():
        assert (tuned.codes >= 0).any() and (np.abs(tuned.means) > 0).any()
    assert profiles.report["interests"]["lm_tokens"] > 0
    likelihoods = [type(group.likelihood) for group in _groups(behaviours, texts, settings)]
    expected = [PrefixLikelihood, SoftTokenLikelihood if taste == "lm" else PrefixLikelihood]
    assert likelihoods == expected
    again = make(tmp_path / "again", uip_gradient=gradient, uip_facets=facets)
    assert_same(numbers(profiles), numbers(run(behaviours, texts, again)))
    changed = np.flatnonzero(~behaviours.train)[::5]
    after = run(flipped(behaviours, changed), texts, settings)
    first = np.full(behaviours.n_users, np.inf)
    np.minimum.at(first, behaviours.user[changed], behaviours.time[changed])
    untouched = behaviours.time <= first[behaviours.user]
    for old, new in zip(profiles.fields, after.fields, strict=True):
        np.testing.assert_array_equal(old.values[untouched], new.values[untouched])
    for name in facets:
        np.testing.assert_array_equal(
            profiles.tuned[name].codebook.packed, after.tuned[name].codebook.packed
        )


def test_units_of_the_last_layers_are_what_the_lm_says_at_theta0(world, texts, make):
    """Cached scores and one forward pass are the values and gradients that steps begin with."""
    facets = {name: {**FACETS[name], "source": "prefix"} for name in ("interests", "taste")}
    for group in _groups(world.behaviours, texts, make(uip_facets=facets)):
        units = np.arange(len(group.units.passage))
        fold, active = group.fold[group.units.owner], group.units.active
        theta = group.frame.tokens(np.zeros((len(units), group.frame.size)), fold, active)
        value, gradient = group(units, theta)
        np.testing.assert_allclose(group.units.value, value, rtol=1e-4, atol=1e-5)
        pulled = group.frame.pull(gradient, fold, active)
        np.testing.assert_allclose(group.units.gradient, pulled, rtol=1e-3, atol=1e-4)
        assert np.abs(pulled).max() > 0.1


def _groups(behaviours, texts, settings):
    history = index_history(behaviours.user, behaviours.time, behaviours.train, behaviours.n_users)
    fold = collaborative.balanced_folds(behaviours.n_users, settings.user_folds, settings.seed)
    observed = Observations(behaviours, history, fold, settings.folds)
    snapshots = take_snapshots(history, (4,), behaviours.train)
    return groups(observed, texts, settings, snapshots, Counter())


def test_the_prior_stands_in_for_no_history(world, texts, make):
    settings = make(uip_empty="prior")
    profiles = run(world.behaviours, texts, settings)
    for each in profiles.fields:
        assert (each.values > 0).all()


def test_a_row_sees_neither_its_label_nor_later_events(inferred, world, texts, make, gradient):
    """With the fitted parameters held, labels change; only later rows may notice.

    A held-out label reaches no fitted parameter at all, so it is held-out labels that change.
    """
    behaviours, settings = world.behaviours, make(uip_gradient=gradient)
    before = inferred
    changed = np.flatnonzero(~behaviours.train)[::5]
    after = run(flipped(behaviours, changed), texts, settings)
    first = np.full(behaviours.n_users, np.inf)
    np.minimum.at(first, behaviours.user[changed], behaviours.time[changed])
    untouched = behaviours.time <= first[behaviours.user]
    for name in ("interests", "taste"):
        old, new = before.tuned[name], after.tuned[name]
        np.testing.assert_array_equal(old.codebook.packed, new.codebook.packed)
        assert old.report["curvature"] == new.report["curvature"]
    moved = 0
    for old, new in zip(before.fields, after.fields, strict=True):
        np.testing.assert_array_equal(old.values[untouched], new.values[untouched])
        moved += int((old.values != new.values).sum())
    assert moved > 0


def test_with_parameters_held_training_labels_move_later_rows_alone(inferred, world, texts, make):
    """The same for training rows: a profile is made of what the LM reads of its own events."""
    behaviours, settings = world.behaviours, make()
    rng = np.random.default_rng(0)
    changed = rng.choice(np.flatnonzero(behaviours.train), 6, replace=False)
    fold = collaborative.balanced_folds(behaviours.n_users, settings.user_folds, settings.seed)
    history = inferred.history
    snapshots = take_snapshots(history, settings.gradient.snapshots, behaviours.train)

    held = Observations(behaviours, history, fold, settings.folds)

    class Held(Observations):
        def rates(self, n_folds):
            return held.rates(n_folds)

    def groups_of(data):
        observed = Held(data, history, fold, settings.folds)
        return groups(observed, texts, settings, snapshots, Counter())

    moved = 0
    for before, after in zip(
        groups_of(behaviours), groups_of(flipped(behaviours, changed)), strict=True
    ):
        for profile in range(len(snapshots)):
            same = _read_of(before, profile) == _read_of(after, profile)
            touched = np.isin(changed, snapshots.events(history, profile)).any()
            assert same or touched
            moved += not same
    assert moved > 0
    # and a row's snapshot holds strictly earlier events alone
    for row in np.flatnonzero(snapshots.of_row >= 0)[::7]:
        events = snapshots.events(history, snapshots.of_row[row])
        assert (behaviours.time[events] < behaviours.time[row]).all() and row not in events


def test_no_move_makes_all_texts_likelier_or_liked(world, texts, make):
    """Directions are those of centred scores, as in the closed form: the rest is leniency."""
    behaviours, settings = world.behaviours, make()
    scores = lm.score(texts[1:], settings.prompts, settings.endings, settings.lm, settings.cache)
    counts = np.bincount(behaviours.item[behaviours.train], minlength=20)[1:]
    for group, gradients in zip(
        _groups(behaviours, texts, settings),
        (scores.text, scores.feedback),
        strict=True,
    ):
        number = [facet.name for facet in settings.tuned_facets].index(group.facets[0].name)
        mean = counts @ gradients[:, number].astype(float) / counts.sum()
        assert np.linalg.norm(mean) > 0
        for maps in group.frame.maps[0]:
            spread = np.linalg.norm(gradients[:, number].std(axis=0) @ np.abs(maps))
            assert np.linalg.norm(mean @ maps) < 1e-4 * spread


def _read_of(group, profile):
    """What the LM reads for a profile, and which facets it moves: all that it is made of."""
    mine = slice(group.units.first[profile], group.units.first[profile + 1])
    return group.passages[mine], group.units.active[mine].tolist()


def test_a_run_that_is_killed_goes_on_to_the_same_result(
    inferred, world, texts, make, gradient, tmp_path
):
    cut = make(tmp_path / "cut", uip_gradient=gradient)
    killed = spawned(run_until, 5, world.behaviours, texts, cut)
    assert exit_code(killed) == -signal.SIGKILL
    done = list((tmp_path / "cut" / "tuned").glob("*/*/*.npz"))
    assert done
    # a damaged file is as good as none
    done[0].write_bytes(done[0].read_bytes()[:100])
    with counted_calls() as calls:
        resumed = run(world.behaviours, texts, cut)
        assert calls() > 0
    assert_same(numbers(inferred), numbers(resumed))
    with counted_calls() as calls:
        again = run(world.behaviours, texts, cut)
        assert calls() == 0  # nothing is left to do
    assert_same(numbers(inferred), numbers(again))
    for old, new in zip(inferred.fields, again.fields, strict=True):
        np.testing.assert_array_equal(old.values, new.values)


def test_two_processes_give_the_codebook_of_one(whole, world, texts, make, gradient, tmp_path):
    alone = numbers(whole.profiles)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = make(tmp_path / "both", uip_gradient=gradient)
    processes = [
        spawned(run_as, rank, port, world.behaviours, texts, both, tmp_path / f"{rank}.npz")
        for rank in range(2)
    ]
    assert [exit_code(process) for process in processes] == [0, 0]
    calls = []
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            fitted = dict(found)
        calls.append(int(fitted.pop("calls")))
        # bit for bit: batches are the same, and so are the threads at each
        assert_same(alone, fitted)
    # each batch was done by one of them
    assert min(calls) > 0 and sum(calls) == whole.calls


def test_a_changed_setting_does_not_meet_old_results(whole, world, texts, make):
    changed = {**GRADIENT, "steps": 4, "rounds": 1}
    other = run(world.behaviours, texts, make(whole.cache, uip_gradient=changed))
    assert other.report["taste"]["lm_tokens"] > 0
    assert np.shape(other.report["taste"]["log_posterior"]) == (1, 5)


def test_a_bank_is_refused(inferred, world, make, tmp_path):
    with pytest.raises(SettingsError, match="cannot update soft tokens"):
        bank_of_profiles(tmp_path / "bank", inferred, world.behaviours, [], [], make())


def test_contrast_needs_endings(world, texts, make):
    with pytest.raises(SettingsError, match="uip_facets.taste: .* needs uip_endings"):
        run(world.behaviours, texts, make(uip_endings=None))
    implicit = dataclasses.replace(world.behaviours, liked=None)
    with pytest.raises(SettingsError, match="uip_facets.taste: .* this data has no labels"):
        facets = {name: FACETS[name] for name in ("interests", "taste")}
        run(implicit, texts, make(uip_facets=facets))


def test_sequences_that_are_too_long_are_said(world, texts, make):
    gradient = {**GRADIENT, "behaviours": 200}
    behaviours = dataclasses.replace(
        world.behaviours,
        user=world.behaviours.user % 6,
        liked=np.ones(len(world.behaviours)),
    )
    facets = {"everything": {"weight": "all", "codes": 2}}
    with pytest.raises(SettingsError, match="positions of the LM, which has 256: lower"):
        run(
            behaviours,
            [text and " ".join(9 * [text]) for text in texts],
            make(uip_likelihood="sequence", uip_gradient=gradient, uip_facets=facets),
        )


def test_a_single_user_is_said(world, texts, make):
    alone = dataclasses.replace(world.behaviours, user=np.zeros_like(world.behaviours.user))
    with pytest.raises(SettingsError, match="uip_facets.interests: only 1 users"):
        run(alone, texts, make(uip_facets={"interests": FACETS["interests"]}))


def test_match_fields_are_left_out_and_said_to_be(world, texts, make, caplog):
    facets = {"interests": {**FACETS["interests"], "match": {"rank": 2}}}
    with caplog.at_level(logging.WARNING):
        profiles = run(world.behaviours, texts, make(uip_facets=facets))
    assert [each.name for each in profiles.fields] == ["uip_interests"]
    assert "uip_interests_match is left out" in caplog.text


def test_more_codes_than_profiles_is_said(world, texts, make):
    facets = {"interests": {"weight": "positive", "codes": 500}}
    with pytest.raises(SettingsError, match="uip_facets.interests: n_codes=500"):
        run(world.behaviours, texts, make(uip_facets=facets))
