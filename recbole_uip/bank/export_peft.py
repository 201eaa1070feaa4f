r"""A code as a soft prompt that PEFT loads, so that the LM can speak for it.

The LM was scored at the soft tokens :math:`\theta^0`, and a facet's vector of item i is

.. math:: v_i = P^\top (x_i - \bar x), \quad x_i = [\nabla_\theta \log p(\mathrm{text}_i);\;
          \nabla_\theta \log p(\mathrm{loved}_i) / p(\mathrm{hated}_i)],

with P the map ``lm_map.<facet>`` (whitening, then the basis). A profile :math:`\delta` lifts an
item by :math:`v_i^\top \delta`, of which the item's text has the part
:math:`\nabla_\theta \log p(\mathrm{text}_i)^\top P_{\mathrm{text}}\, \delta` and a constant, with
P_text the rows of P that belong to text scores. That is the first-order change of
log p(text_i) when the soft tokens go from :math:`\theta^0` to

.. math:: \theta = \theta^0 + s\, P_{\mathrm{text}}\, \delta_k, \quad \delta_k = e_k - \mu,

the soft prompt of code k: e_k is its codeword (the sum of the codewords of its levels), mu the
mean over users, s a scale. The posterior mean of a user is lambda / (lambda + noise) (y - mu);
a codeword is a mean of offsets with their noise taken out, as of a user with endless history,
for whom that factor is 1. P differs a little by fold of users; here it is the mean over folds,
which share one frame. All facets' soft tokens move, for scores were taken in all of them.

What it is not: the rows of P for feedback scores, so what a code says about *liking* an item
with its text given, do not enter (``soft_tokens(..., scores="feedback")`` takes those instead).
And the first order holds for short moves alone. With SmolLM2-135M (float32), ml-100k and ``source:
lm`` (``recbole-uip likelihood --users=40``), a code of ``interests`` moves soft tokens by
1.07 times their length at s = 1; what the first order predicts of held-out behaviours and true
changes of log p(text) correlate 1.00 at s = .001, .93 at .01, .32 at .03, .15 at .1 and .08 at 1.
Look at lengths before you choose s.

PEFT knows no block mask: later facets' names and soft tokens attend to earlier facets, which
they did not when the items were scored. With a single facet both are the same.

Of a facet with ``source: prefix`` the same holds in the LM's last layers: theta are the values of
soft tokens there, each facet's soft token follows the scores of that facet's own kind, and PEFT's
prefix tuning holds keys and values of the whole prompt, block mask and all. There the first order
reaches further (``--users=150``): correlations are 1.00 at s = .03, .97 at .1, .69 at .3 and -.08
at 1 for ``interests``, whose code moves soft tokens by 5 times their length at s = 1, and .93 at 1
for the feedback of ``taste``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.store import BankError, check_folder
from recbole_uip.em.codebook import unpack
from recbole_uip.em.kernels import CODE
from recbole_uip.files import atomic_write
from recbole_uip.settings import PROMPTED_SOURCES

if TYPE_CHECKING:
    from peft import PromptLearningConfig

    from recbole_uip.bank.bank import FeatureBank
    from recbole_uip.lm import Backbone

__all__ = ["soft_moves", "soft_prompts", "soft_tokens"]


def soft_tokens(
    model: ProfileModel,
    facet: str,
    code: int | Sequence[int],
    scale: float = 1.0,
    scores: str = "text",
) -> np.ndarray:
    """Soft tokens theta of a code, in the order of the prompt's facets.

    Parameters
    ----------
    model, code, scale, scores
        As for :func:`soft_moves`.
    facet : str
        One with ``source: lm``.

    Returns
    -------
    ndarray of float32, shape (n_facets, d)

    Raises
    ------
    BankError
        If there is no such facet or code, or no feedback score was taken.
    """
    moves = soft_moves(model, facet, code, scale, scores)
    if _source_of(model, _code_field(model, facet)[1]) != "lm":
        raise BankError(
            f"facet={facet!r} has source: prefix, and its soft tokens are values in the LM's "
            "layers: soft_prompts writes them, and soft_moves says how far a code takes them"
        )
    return (model.tables["lm_theta0"] + moves).astype(np.float32)


def soft_moves(
    model: ProfileModel,
    facet: str,
    code: int | Sequence[int],
    scale: float = 1.0,
    scores: str | None = "text",
) -> np.ndarray:
    """How far a code takes soft tokens from theta0, in the order of the prompt's facets.

    Parameters
    ----------
    model : ProfileModel
    facet : str
        A facet with ``source: lm`` or ``prefix``, and codes; or one of its fields, such as
        ``uip_taste_20``, where it has several half-lives.
    code : int or sequence of int
        As in the fields, from 1; 0, [PAD], says nothing and moves nothing. One for each level
        where the codebook has several; levels that are not given add nothing.
    scale : float
        The s above; see there how far the first order reaches.
    scores : {"text", "feedback"} or None
        ``feedback`` takes the rows of P for feedback scores in place of P_text: the move that
        lifts log p(loved) / p(hated) of the items whose liking the code speaks of. With ``source:
        prefix``, the soft tokens of facets of the other kind stay; None moves all.

    Returns
    -------
    ndarray of float64, shape (n_facets, D)
        D is the LM's width d, or of a prefix's facet what is moved of it in the last layers.

    Raises
    ------
    BankError
        If there is no such facet or code, no feedback score was taken, or the scale is no finite
        number.
    """
    if not math.isfinite(scale):
        raise BankError(f"scale={scale} must be a finite number")
    field, facet = _code_field(model, facet)
    codeword = _codeword(model, field, [code] if np.ndim(code) == 0 else list(code))
    source, settings = _source_of(model, facet), model.settings
    # The codebook's directions are the first of the facet's.
    directions = model.tables[f"{source}_map.{facet}"].mean(axis=0)[:, : len(codeword)]
    missing = BankError("scores='feedback': the catalogue was scored without uip_endings")
    if source == "lm":
        n_facets, n_text = len(settings.prompts), model.tables["lm_theta0"].size
        # Text scores are the first of the raw.
        chosen = slice(n_text, None) if scores == "feedback" else slice(n_text)
        if not len(directions[chosen]):
            raise missing
        moves = (directions[chosen].astype(np.float64) @ codeword).reshape(n_facets, -1)
    else:
        of_feedback = np.array(settings.prefix_prompt(model.endings)[1])
        if scores == "feedback" and not of_feedback.any():
            raise missing
        moves = (directions.astype(np.float64) @ codeword).reshape(len(of_feedback), -1)
        if scores is not None:
            moves[of_feedback != (scores == "feedback")] = 0.0
    return scale * moves


def soft_prompts(
    bank_or_model: FeatureBank | ProfileModel,
    folder: str | os.PathLike,
    facet: str,
    code: int | Sequence[int],
    *,
    scale: float = 1.0,
    backbone: Backbone | None = None,
    base: str | None = None,
) -> Path:
    """Write a code's prompt as a PEFT adapter: prompt tuning, or with a prefix prefix tuning.

    In prompt tuning, the virtual tokens are the embeddings of the whole prefix
    ``{name}[theta] {name}[theta] ...`` (with the tokens that the tokenizer puts before every text,
    so tokenize what follows with ``add_special_tokens=False``), soft tokens moved as
    :func:`soft_tokens` says. To use it::

        base = AutoModelForCausalLM.from_pretrained(...)
        model = PeftModel.from_pretrained(base, folder)
        model.generate(**tokenizer(" I like", return_tensors="pt"))

    In prefix tuning the virtual tokens are the keys and values of the same prefix, and a text that
    follows begins with the colon that scores were taken behind: ``": I like"``.

    If the LM had an adapter (``uip_lm_adapter``), merge it into ``base`` first.

    Parameters
    ----------
    bank_or_model : FeatureBank or ProfileModel
    folder : path-like
        Gets ``adapter_model.safetensors`` and ``adapter_config.json``.
    facet, code, scale
        As for :func:`soft_moves`.
    backbone : Backbone, optional
        The LM that scored the catalogue; loaded by the model's settings by default.
    base : str, optional
        What the adapter is to name as its base model; where the LM was loaded from by default.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    BankError
        If there is no such facet or code, the scale is no finite number, the LM is not the one
        that scored the catalogue, or ``folder`` can be no folder.
    """
    check_folder(folder)
    from safetensors.numpy import save

    from recbole_uip import lm

    model = bank_or_model if isinstance(bank_or_model, ProfileModel) else bank_or_model.model
    of_prefix = _source_of(model, _code_field(model, facet)[1]) == "prefix"
    moves = soft_moves(model, facet, code, scale, None if of_prefix else "text")
    if backbone is None:
        backbone = lm.load(model.settings.lm, model.settings.cache)
    if backbone.fingerprint != model.lm_fingerprint:
        raise BankError(
            f"the LM (fingerprint {backbone.fingerprint[:12]}) is not the one that scored this "
            f"bank's catalogue ({model.lm_fingerprint[:12]}): use the same LM, uip_lm="
            f"{model.settings.lm.name!r}"
        )
    made = _prefix_tuning if of_prefix else _prompt_tuning
    config, embeddings = made(model, backbone, moves)
    config.base_model_name_or_path = base or backbone.model.name_or_path or model.settings.lm.name
    config.inference_mode = True
    folder = Path(folder)
    with atomic_write(folder / "adapter_model.safetensors") as file:
        file.write(save({"prompt_embeddings": embeddings}, {"format": "pt"}))
    with atomic_write(folder / "adapter_config.json", "w") as file:
        json.dump(config.to_dict(), file, indent=2, sort_keys=True)
        file.write("\n")
    return folder


def _prompt_tuning(
    model: ProfileModel, backbone: Backbone, moves: np.ndarray
) -> tuple[PromptLearningConfig, np.ndarray]:
    """Config, and embeddings of the prompt's prefix, shape (P, d), float32."""
    import torch
    from peft import PromptTuningConfig, TaskType

    from recbole_uip.lm import prompt as prompts

    theta = (model.tables["lm_theta0"] + moves).astype(np.float32)
    prompt = prompts.build(backbone, model.settings.prompts)
    with torch.no_grad():
        arguments = prompts.inputs(backbone, prompt, torch.from_numpy(theta), [[]])
    # In the LM's own precision but for the soft tokens, which PEFT may keep in full.
    embeddings = arguments["inputs_embeds"][0].to("cpu", torch.float32).numpy().copy()
    embeddings[prompt.soft_positions.numpy()] = theta
    description = backbone.model.config
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=embeddings.shape[0],
        token_dim=embeddings.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=description.num_attention_heads,
        num_layers=description.num_hidden_layers,
    )
    return config, embeddings


def _prefix_tuning(
    model: ProfileModel, backbone: Backbone, moves: np.ndarray
) -> tuple[PromptLearningConfig, np.ndarray]:
    """Config, and keys and values of the prefix, shape (P, layers · 2 · kv width), float32."""
    import torch
    from peft import PrefixTuningConfig, TaskType

    from recbole_uip import lm

    names, _, endings = model.settings.prefix_prompt(model.endings)
    prefix = lm.Prefix(backbone, lm.build(backbone, names, endings))
    moved = prefix.theta0.float() + torch.from_numpy(moves).to(backbone.device, torch.float32)
    # PEFT has them virtual token by virtual token, and a layer's keys before its values
    states = [each[0] for pair in prefix.states(moved[None]) for each in pair]
    if len({each.shape for each in states}) > 1:
        raise BankError(
            f"{type(backbone.model).__name__} has layers of different widths, which PEFT's prefix "
            "tuning cannot hold: take source: lm"
        )
    kv_heads, n_virtual, head_dim = states[0].shape
    embeddings = torch.stack(states).permute(2, 0, 1, 3).flatten(1).to("cpu", torch.float32)
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=n_virtual,
        token_dim=kv_heads * head_dim,
        num_transformer_submodules=1,
        num_attention_heads=kv_heads,
        num_layers=len(states) // 2,
        encoder_hidden_size=kv_heads * head_dim,
    )
    return config, embeddings.contiguous().numpy()


def _source_of(model: ProfileModel, facet: str) -> str:
    return next(each.source for each in model.settings.facets if each.name == facet)


def _code_field(model: ProfileModel, facet: str) -> tuple[int, str]:
    """Number of a facet's code field among ``profile_fields``, and the facet's name."""
    fields = model.encoder.profile_fields
    # The first level of each code field, by its number.
    names = {
        model.profile_names[fields.column[f]]: int(f) for f in np.flatnonzero(fields.kind == CODE)
    }
    facet_of = {info.name: info.facet for info in model.encoder.fields}
    usable = {
        name: f
        for name, f in names.items()
        if _source_of(model, facet_of[name]) in PROMPTED_SOURCES
    }
    found = {name: f for name, f in usable.items() if facet in (name, facet_of[name])}
    if len(found) == 1:
        (name, number), *_ = found.items()
        return number, facet_of[name]
    if found:
        raise BankError(f"facet={facet!r} has several codebooks: name one of {', '.join(found)}")
    raise BankError(
        f"facet={facet!r} has no codes of a language model's scores (source: lm or prefix); those "
        f"that have them are {', '.join(usable) or 'none here'}"
    )


def _codeword(model: ProfileModel, field: int, codes: Sequence[int]) -> np.ndarray:
    """Deviation of a code's users from the average user, in units of the basis, shape (rank,)."""
    fields, kernels = model.encoder.profile_fields, model.kernels
    k, n_codes = fields.kernel[field], int(fields.size[field])
    rank, levels = int(kernels.rank[k]), int(fields.column[field + 1] - fields.column[field])
    if len(codes) > levels or any(not 0 <= code <= n_codes for code in codes):
        raise BankError(
            f"code={codes} of {model.profile_names[fields.column[field]]} must be from 1 to "
            f"{n_codes} (0 for none), and no more than {levels}"
        )
    if not any(codes):
        return np.zeros(rank)
    first, size = int(fields.first[field]), n_codes * (rank + 1) + rank
    packed = fields.numbers[first : first + levels * size]
    word = -kernels.priors[kernels.prior[k] :][:rank]
    for code, level in zip(codes, unpack(packed, n_codes, rank), strict=False):
        if code:
            word = word + level.codewords[code - 1]
    return word
