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
And the first order holds for short moves alone. With SmolLM2-135M (float32) on ml-100k
(``recbole-uip likelihood --dataset=ml-100k --users=40``), a code of ``interests`` moves the soft
tokens by 1.07 times their length at s = 1; what the first order predicts of held-out behaviours
and true changes of log p(text) correlate 1.00 at s = .001, .93 at .01, .32 at .03, .15 at .1 and
.08 at 1. Look at lengths before you choose s.

PEFT knows no block mask: later facets' names and soft tokens attend to earlier facets, which
they did not when the items were scored. With a single facet both are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recbole_uip.bank.model import ProfileModel
from recbole_uip.bank.store import BankError
from recbole_uip.em.codebook import unpack
from recbole_uip.em.kernels import CODE
from recbole_uip.files import atomic_write

if TYPE_CHECKING:
    from recbole_uip.bank.bank import FeatureBank
    from recbole_uip.lm import Backbone

__all__ = ["soft_prompts", "soft_tokens"]


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
    model : ProfileModel
    facet : str
        A facet with ``source: lm`` and codes; or one of its fields, such as ``uip_taste_20``,
        where it has several half-lives.
    code : int or sequence of int
        As in the fields, from 1; 0, [PAD], says nothing and gives theta0. One for each level
        where the codebook has several; levels that are not given add nothing.
    scale : float
        The s above; see there how far the first order reaches.
    scores : {"text", "feedback"}
        ``feedback`` takes the rows of P for feedback scores in place of P_text: the move that
        lifts log p(loved) / p(hated) of the items whose liking the code speaks of.

    Returns
    -------
    ndarray of float32, shape (n_facets, d)

    Raises
    ------
    BankError
        If there is no such facet or code, or no feedback score was taken.
    """
    field, facet = _code_field(model, facet)
    codeword = _codeword(model, field, [code] if np.ndim(code) == 0 else list(code))
    theta0 = model.tables["lm_theta0"]
    # The codebook's directions are the first of the facet's; text scores the first of the raw.
    directions = model.tables[f"lm_map.{facet}"].mean(axis=0)
    if scores == "feedback":
        directions = directions[theta0.size :]
        if not len(directions):
            raise BankError("scores='feedback': the catalogue was scored without uip_endings")
    directions = directions[: theta0.size, : len(codeword)].astype(np.float64)
    theta = theta0 + scale * (directions @ codeword).reshape(theta0.shape)
    return theta.astype(np.float32)


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
    """Write a code's prompt as a PEFT prompt-tuning adapter.

    The virtual tokens are the embeddings of the whole prefix ``{name}[theta] {name}[theta] ...``
    (with the tokens that the tokenizer puts before every text, so tokenize what follows with
    ``add_special_tokens=False``), soft tokens moved as :func:`soft_tokens` says. To use it::

        base = AutoModelForCausalLM.from_pretrained(...)
        model = PeftModel.from_pretrained(base, folder)
        model.generate(**tokenizer(" I like", return_tensors="pt"))

    If the LM had an adapter (``uip_lm_adapter``), merge it into ``base`` first.

    Parameters
    ----------
    bank_or_model : FeatureBank or ProfileModel
    folder : path-like
        Gets ``adapter_model.safetensors`` and ``adapter_config.json``.
    facet, code, scale
        As for :func:`soft_tokens`.
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
        If there is no such facet or code, or the LM is not the one that scored the catalogue.
    """
    from peft import PromptTuningConfig, TaskType
    from safetensors.numpy import save

    from recbole_uip import lm

    model = bank_or_model if isinstance(bank_or_model, ProfileModel) else bank_or_model.model
    theta = soft_tokens(model, facet, code, scale)
    if backbone is None:
        backbone = lm.load(model.settings.lm, model.settings.cache)
    if backbone.fingerprint != model.lm_fingerprint:
        raise BankError(
            f"the LM (fingerprint {backbone.fingerprint[:12]}) is not the one that scored this "
            f"bank's catalogue ({model.lm_fingerprint[:12]}): use the same LM, uip_lm="
            f"{model.settings.lm.name!r}"
        )
    embeddings = _prefix(model, backbone, theta)
    description = backbone.model.config
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base or backbone.model.name_or_path or model.settings.lm.name,
        inference_mode=True,
        num_virtual_tokens=embeddings.shape[0],
        token_dim=embeddings.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=description.num_attention_heads,
        num_layers=description.num_hidden_layers,
    )
    folder = Path(folder)
    with atomic_write(folder / "adapter_model.safetensors") as file:
        file.write(save({"prompt_embeddings": embeddings}, {"format": "pt"}))
    with atomic_write(folder / "adapter_config.json", "w") as file:
        json.dump(config.to_dict(), file, indent=2, sort_keys=True)
        file.write("\n")
    return folder


def _prefix(model: ProfileModel, backbone: Backbone, theta: np.ndarray) -> np.ndarray:
    """Embeddings of the prompt's prefix with ``theta`` for soft tokens, shape (P, d), float32."""
    import torch

    from recbole_uip.lm import prompt as prompts

    names = model.settings.prompts
    prompt = prompts.build(backbone, names)
    with torch.no_grad():
        arguments = prompts.inputs(backbone, prompt, torch.from_numpy(theta), [[]])
    # In the LM's own precision but for the soft tokens, which PEFT may keep in full.
    embeddings = arguments["inputs_embeds"][0].to("cpu", torch.float32).numpy().copy()
    embeddings[prompt.soft_positions.numpy()] = theta
    return embeddings


def _code_field(model: ProfileModel, facet: str) -> tuple[int, str]:
    """Number of a facet's code field among ``profile_fields``, and the facet's name."""
    fields = model.encoder.profile_fields
    # The first level of each code field, by its number.
    names = {
        model.profile_names[fields.column[f]]: int(f) for f in np.flatnonzero(fields.kind == CODE)
    }
    facet_of = {info.name: info.facet for info in model.encoder.fields}
    found = {
        name: f
        for name, f in names.items()
        if facet in (name, facet_of[name]) and f"lm_map.{facet_of[name]}" in model.tables
    }
    if len(found) == 1:
        (name, number), *_ = found.items()
        return number, facet_of[name]
    if found:
        raise BankError(f"facet={facet!r} has several codebooks: name one of {', '.join(found)}")
    usable = [name for name in names if f"lm_map.{facet_of[name]}" in model.tables]
    raise BankError(
        f"facet={facet!r} has no codes of a language model's scores (source: lm); those that have "
        f"them are {', '.join(usable) or 'none here'}"
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
