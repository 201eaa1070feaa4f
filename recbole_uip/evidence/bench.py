"""What the profile stage costs on this machine, each figure next to its floor.

A floor is what the figure cannot fall below on the same machine, measured in the same run: the
matrix products of the LM at the speed of a bare matrix product, reading the scores at the speed
of a plain read, moving the states at the speed of a memory copy.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recbole_uip import lm, profiles
from recbole_uip.em.encoder import Encoder
from recbole_uip.evidence.figures import Figure, machine, timed
from recbole_uip.evidence.task import Task, load_task, parse_config
from recbole_uip.lm import prompt as prompts
from recbole_uip.lm.backbone import resolve_dtype
from recbole_uip.lm.prefix import n_moved
from recbole_uip.lm.scoring import MAX_WORKERS
from recbole_uip.records import peak_memory, versions
from recbole_uip.settings import SettingsError

__all__ = [
    "Matrices",
    "bench_profiles",
    "matmul_ceiling",
    "matrices",
    "prefix_flops",
    "scoring_flops",
]

logger = logging.getLogger(__name__)

TIMED_FLOPS = 4e9  # products are timed together until they make this many FLOPs: some 10 ms

_NOTES = {
    "scoring": (
        "LM scoring: all distinct item texts, or the first --items of them; no score in the cache. "
        "The LM's files are resolved (fetched, dequantised) and the libraries imported beforehand; "
        "building the model, the prompt's Jacobian and writing the scores are in the figure."
    ),
    "flops": (
        "FLOPs: 2 per weight and token forward, and 2 backward for each gradient (text, feedback); "
        "the head forward and backward at predicted text tokens; the layers forward at prefix "
        "tokens. Not counted: attention, padding, applying the Jacobian. Floor: the best torch "
        "product of the LM's layer shapes, same type and threads, before or after scoring."
    ),
    "prefix": (
        "scores in the last layers (source: prefix): the same texts and facets. FLOPs as above, "
        "but backward through these layers alone, and with a colon before each text, which "
        "predicts its first token."
    ),
    "cached": (
        "scores from the cache: the same call again. Floor: a plain read of the same files; both "
        "find them in the system's page cache."
    ),
    "stage": (
        "profile stage: profiles.infer with cached scores, without RecBole's loading and "
        "splitting; median, and mean CPU time of all threads. Floor: the state of every row and "
        "field written once and read once, rows x width x 4 bytes x 2 passes, at the bandwidth of "
        "a memory copy (bytes read + written); the fits, which see training rows again, are not "
        "in it."
    ),
    "transform": "fields of a facet: of that, the fitted facet's transform of all rows; median.",
}


@dataclass(frozen=True)
class Matrices:
    """Shapes (out, in) of an LM's weights in matrix products.

    Attributes
    ----------
    layers : tuple of (int, int)
        All but the head.
    head : (int, int)
        The projection to the vocabulary.
    """

    layers: tuple[tuple[int, int], ...]
    head: tuple[int, int]

    @property
    def layer_weights(self) -> int:
        """Number of weights in the layers."""
        return sum(rows * columns for rows, columns in self.layers)

    @property
    def head_weights(self) -> int:
        """Number of weights in the head."""
        return self.head[0] * self.head[1]


# --- counts ----------------------------------------------------------------------------------


def matrices(model: torch.nn.Module) -> Matrices:
    """Weights of a causal LM that take part in matrix products; embeddings are looked up."""
    head = model.get_output_embeddings()
    layers = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        looked_up = module is head or isinstance(module, torch.nn.Embedding)
        if not looked_up and isinstance(weight, torch.Tensor) and weight.dim() == 2:
            layers.append(tuple(weight.shape))
    return Matrices(tuple(layers), tuple(head.weight.shape))


def scoring_flops(
    weights: Matrices,
    n_texts: int,
    text_tokens: int,
    ending_tokens: int | None = None,
    prefix_tokens: int = 0,
) -> int:
    """FLOPs of the matrix products with weights that scoring needs (see ``lm/scoring.py``).

    Parameters
    ----------
    weights : Matrices
    n_texts : int
    text_tokens : int
        Tokens of all texts together, at least one each. The first of each is predicted by the
        prefix, so the head meets ``text_tokens - n_texts``.
    ending_tokens : int, optional
        Tokens that the feedback endings share before the verb, which follow each text. None
        without endings: then the last token of a text predicts nothing, and is not run.
    prefix_tokens : int
        Tokens and tangents of the prefix, which go forward through the layers.
    """
    predicted = text_tokens - n_texts
    if ending_tokens is None:
        run, kinds = predicted, 1
    else:
        run, kinds = text_tokens + n_texts * ending_tokens, 2
    layers = 2 * weights.layer_weights * ((1 + kinds) * run + prefix_tokens)
    return layers + 2 * weights.head_weights * 2 * predicted


def prefix_flops(
    weights: Matrices, moved: float, n_texts: int, text_tokens: int, ending_tokens: int, kinds: int
) -> float:
    """FLOPs of the matrix products with weights that prefix scores need (see ``lm/prefix.py``).

    Parameters
    ----------
    weights : Matrices
    moved : float
        Share of the layers in which soft tokens are moved.
    n_texts, text_tokens, ending_tokens : int
        As in :func:`scoring_flops`.
    kinds : int
        Gradients of each text: of the text, of its feedback, or both.
    """
    run = text_tokens + n_texts * (1 + ending_tokens)
    layers = 2 * weights.layer_weights * run * (1 + moved * kinds)
    return layers + 2 * weights.head_weights * 2 * text_tokens


def _state_bytes(encoder: Encoder, n_rows: int) -> int:
    """Bytes of the states of all rows, written once and read once."""
    return 2 * n_rows * encoder.kernels.initial.nbytes


# --- floors ----------------------------------------------------------------------------------


def matmul_ceiling(
    shapes: Sequence[tuple[int, int]],
    rows: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    repeats: int = 5,
) -> float:
    """The fastest that torch multiplies ``rows`` rows with any of ``shapes``, in FLOP/s.

    Forward (x Wᵀ) and backward (d W); on CPU both with all threads at one product and with one
    product for each thread, as scoring has it. The best of all is what the machine can do, also
    where other work disturbs most of the measurements.

    Parameters
    ----------
    shapes : sequence of (out, in)
    rows : int
    dtype : torch.dtype
    device : torch.device
    repeats : int
        Measurements of each product.
    """
    device = torch.device(device)
    n_threads = torch.get_num_threads()
    ways = {1, min(n_threads, MAX_WORKERS)} if device.type == "cpu" else {1}
    best = 0.0
    try:
        for workers in sorted(ways):
            share = max(1, n_threads // workers)
            with ThreadPoolExecutor(workers, None, torch.set_num_threads, (share,)) as pool:
                for n_out, n_in in sorted(set(shapes)):
                    weight = torch.rand(n_out, n_in, device=device).to(dtype)
                    for matrix in (weight.T, weight):
                        rate = _product_rate(pool, workers, matrix, rows, repeats)
                        best = max(best, rate)
    finally:
        torch.set_num_threads(n_threads)  # part of the workers' setting is the process's
    return best


def _product_rate(
    pool: ThreadPoolExecutor, workers: int, matrix: torch.Tensor, rows: int, repeats: int
) -> float:
    """Best FLOP/s of ``workers`` concurrent products of ``rows`` rows with ``matrix``."""
    flops = 2 * rows * matrix.numel()
    times = max(1, int(TIMED_FLOPS / workers // flops))
    left = torch.rand(rows, len(matrix), device=matrix.device).to(matrix.dtype)

    @torch.no_grad()
    def work(_: int) -> None:
        for _ in range(times):
            left @ matrix
        if matrix.device.type == "cuda":
            torch.cuda.synchronize(matrix.device)

    list(pool.map(work, range(workers)))  # the first product sets things up
    seconds = timed(lambda: list(pool.map(work, range(workers))), repeats)
    return workers * times * flops / min(seconds)


# --- the figures -----------------------------------------------------------------------------


def bench_profiles(
    dataset: str | None = None,
    config_files: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    command_line: Sequence[str] = (),
    repeats: int = 3,
    items: int | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure LM scoring, reading the scores and the profile stage, each with its floor.

    Scores go to a temporary folder in the user's cache, whose ``models`` is the user's; what the
    user has cached is neither read (but with ``items``, see there) nor changed.

    Parameters
    ----------
    dataset : str, optional
        By default ``dataset`` of the settings, else ml-100k.
    config_files : sequence of path, optional
    config : mapping, optional
        Any RecBole or ``uip_*`` settings; stronger than the files.
    command_line : sequence of str, optional
        ``--key=value`` arguments; stronger than ``config``.
    repeats : int
        Runs of all but the LM scoring, which is measured once.
    items : int, optional
        Score only the first so many distinct texts. The profile stage then takes the scores from
        the user's cache if that holds all of them; else the other items count as without text.
    command : str, optional
        How this was started, for the record.

    Returns
    -------
    dict
        ``dataset``, ``items`` (or None), ``repeats``, ``machine``, ``figures`` (a list of
        :class:`Figure` as dicts), ``notes``, ``versions``, ``command``.

    Raises
    ------
    SettingsError
        If a setting cannot be used, or the dataset is missing.
    ModelError
        If the LM cannot be found or loaded.
    """
    for key, value in (("repeats", repeats), ("items", items)):
        if value is not None and value < 1:
            raise SettingsError(f"{key}={value} must be at least 1")
    name, parsed = parse_config(dataset, config_files, config, command_line)
    started = time.perf_counter()
    task = load_task(parsed)
    data_seconds = time.perf_counter() - started
    here = machine()
    figures: list[Figure] = []
    if task.settings.reads_lm:
        device, dtype = resolve_dtype(task.settings.lm)
        here |= {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
        if device.type == "cuda":
            here["gpu"] = torch.cuda.get_device_name(device)
        cache = task.settings.cache.expanduser().resolve()
        models = cache / "models"
        models.mkdir(parents=True, exist_ok=True)
        # In the user's cache, so that scores are read from the disk they would be read from.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".bench-") as folder:
            Path(folder, "models").symlink_to(models, target_is_directory=True)
            chosen = task.distinct[:items]
            if task.prompts:
                figures += _lm_figures(task, chosen, Path(folder), repeats)
            if len(chosen) == len(task.distinct):
                stage = task.using(Path(folder))
            elif _holds_scores(task):
                stage = task
            else:
                stage = task.using(Path(folder), chosen)
            figures += _stage_figures(stage, here["copy_bandwidth"], repeats)
    else:
        figures += _stage_figures(task, here["copy_bandwidth"], repeats)
    figures.append(Figure("memory", "peak memory of the process", peak_memory(), "B"))
    keys = {each.key for each in figures}
    return {
        "dataset": name,
        "items": items,
        "repeats": repeats,
        "data_seconds": data_seconds,
        "machine": here,
        "figures": [each.to_dict() for each in figures],
        "notes": [text for key, text in _NOTES.items() if key in keys],
        "versions": versions(),
        "command": command or f"bench_profiles({name!r})",
    }


def _lm_figures(task: Task, texts: list[str], cache: Path, repeats: int) -> list[Figure]:
    """Scoring ``texts`` into ``cache``, which has no scores, and reading them from there."""
    settings = task.settings
    # Once before: fetches and dequantises what is not there yet, and says what is multiplied.
    logger.info("resolving %s", settings.lm.name)
    backbone = lm.load(settings.lm, settings.cache)
    weights, device, dtype = matrices(backbone.model), backbone.device, backbone.dtype
    batch_tokens = backbone.batch_tokens
    ending = prompts.build(backbone, task.prompts, task.endings).ending
    ending_tokens = len(ending.common) if ending else None
    n_layers = backbone.model.config.get_text_config().num_hidden_layers
    del backbone
    gc.collect()

    def ceiling() -> float:
        return matmul_ceiling(weights.layers, batch_tokens, dtype, device)

    def score() -> lm.Scores:
        return lm.score(texts, task.prompts, task.endings, settings.lm, cache)

    logger.info("measuring the matrix products of %s", settings.lm.name)
    fastest = ceiling()
    logger.info("scoring %d texts", len(texts))
    started, cpu_started = time.perf_counter(), time.process_time()
    scores = score()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    fastest = max(fastest, ceiling())

    text_tokens = int(scores.n_tokens.sum())
    behaviour_tokens = text_tokens + len(texts) * (ending_tokens or 0)
    prefix_tokens = scores.lm_tokens - behaviour_tokens
    flops = scoring_flops(weights, len(texts), text_tokens, ending_tokens, prefix_tokens)
    counts = {
        "texts": len(texts),
        "lm_tokens": scores.lm_tokens,
        "text_tokens": text_tokens,
        "prefix_tokens": prefix_tokens,
        "tokens_per_second": scores.lm_tokens / seconds,
        "cpu_seconds": cpu_seconds,
        "flops": flops,
        "layer_weights": weights.layer_weights,
        "head_weights": weights.head_weights,
        "peak_memory_bytes": peak_memory(),
    }
    scoring = Figure(
        "scoring",
        f"LM scoring: {len(texts):,} texts, {scores.lm_tokens:,} tokens "
        f"({scores.lm_tokens / seconds:,.0f} tok/s; CPU {cpu_seconds:.3g} s)",
        seconds,
        "s",
        flops / fastest,
        counts,
    )
    rate = Figure("flops", f"  of {flops / 1e9:,.1f} GFLOP", flops / seconds, "FLOP/s", fastest)

    logger.info("scoring them in the last layers")
    prompt = settings.with_soft_tokens("prefix").prefix_prompt(task.endings)
    of_feedback = prompt[1]
    started = time.perf_counter()
    found = lm.score_prefix(texts, *prompt, settings.lm, cache)
    seconds = time.perf_counter() - started
    flops = prefix_flops(
        weights,
        n_moved(n_layers) / n_layers,
        len(texts),
        text_tokens,
        ending_tokens if any(of_feedback) else 0,
        len(set(of_feedback)),
    )
    prefix = Figure(
        "prefix",
        f"in its last layers: {found.lm_tokens:,} tokens, {flops / 1e9:,.1f} GFLOP",
        seconds,
        "s",
        flops / fastest,
        {"lm_tokens": found.lm_tokens, "flops": flops},
    )

    logger.info("reading the scores")
    cached = timed(score, repeats)
    files = [path for path in (cache / "scores").glob("*/*.safetensors") if path.stem != "prefix"]
    n_bytes = sum(path.stat().st_size for path in files)
    plain = timed(lambda: [path.read_bytes() for path in files], repeats)
    reading = Figure(
        "cached",
        f"scores from the cache: {n_bytes / 1e6:,.1f} MB",
        statistics.median(cached),
        "s",
        min(plain),
        {"seconds": cached, "bytes": n_bytes, "files": len(files)},
    )
    return [scoring, rate, prefix, reading]


def _holds_scores(task: Task) -> bool:
    """Whether the user's cache holds all that the LM makes of every text."""
    settings, texts = task.settings, task.distinct
    # Soft tokens that are tuned are the LM's as well, and are not asked for.
    given, held = (settings.lm, settings.cache), not settings.tuned_facets
    if settings.prompts:
        held = held and lm.holds_scores(texts, settings.prompts, task.endings, *given)
    if settings.prefix_facets:
        prompt = settings.prefix_prompt(task.endings)
        held = held and lm.holds_prefix_scores(texts, *prompt, *given)
    if any("embedding" in facet.text_sources for facet in settings.facets):
        held = held and lm.holds_embeddings(texts, *given)
    return held


def _stage_figures(task: Task, bandwidth: float, repeats: int) -> list[Figure]:
    """The profile stage with cached scores, and each facet's transform."""
    logger.info("inferring profiles, %d times", repeats)
    results: list[profiles.Profiles] = []

    def infer() -> None:
        results.clear()  # before the next: one run's memory, not two's
        results.append(profiles.infer(task.behaviours, task.texts, task.settings, task.fold))

    if task.settings.reads_lm:
        # What the LM makes of texts is cached then, also what the scoring above had no part in.
        infer()
    cpu_started = time.process_time()
    seconds = timed(infer, repeats)
    cpu_seconds = (time.process_time() - cpu_started) / repeats
    (result,) = results
    n_rows = len(task.behaviours)
    n_facets, n_fields = len(result.facets), len(result.fields)
    total = _state_bytes(result.encoder, n_rows)
    figures = [
        Figure(
            "stage",
            f"profile stage: {n_rows:,} rows, {n_facets} facets, {n_fields} fields "
            f"(min {min(seconds):.3g} s; CPU {cpu_seconds:.3g} s)",
            statistics.median(seconds),
            "s",
            total / bandwidth,
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "rows": n_rows,
                "facets": n_facets,
                "fields": n_fields,
                "state_bytes": total,
                "items_with_text": sum(map(bool, task.texts or ())),
                "cost": {key: float(value) for key, value in result.cost.items()},
                "peak_memory_bytes": peak_memory(),
            },
        )
    ]
    for name, facet in result.facets.items():
        encoder = Encoder.from_recipes({name: facet.fields()}, result.encoder.kernels.rate)
        each = timed(lambda e=encoder: e.transform(result.history, result.events), repeats)
        size = _state_bytes(encoder, n_rows)
        figures.append(
            Figure(
                "transform",
                f"  fields of {name}",
                statistics.median(each),
                "s",
                size / bandwidth,
                {"seconds": each, "facet": name, "state_bytes": size},
            )
        )
    return figures
