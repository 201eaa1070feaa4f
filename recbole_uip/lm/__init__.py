"""The frozen language model: where it comes from, how it is prompted, what it scores.

:func:`score` is the way in: texts to log-likelihoods and score vectors, cached. The modules:
``backbone`` (find and load a frozen LM), ``prompt`` (facets, soft tokens, block mask, and the
differentiable likelihood), ``scoring`` (batches and cache), ``likelihood`` (behaviours under
tuned soft tokens, and gradients in these), ``forward`` (log-likelihoods of texts at any soft
tokens, forward only), ``prefix`` (soft tokens in the last layers, and their scores), ``llama`` (the
fast path for scores), ``soft_llama`` and ``prefix_llama`` (that for tuned soft tokens, embeddings
or in the last layers), ``llama_stages`` (what a layer does), ``embedding`` (mean embeddings, the
control for scores), ``vectors`` (batches and cache of embeddings and prefix scores), ``adapt``
(adapters to a catalogue's texts), ``store`` (scores on disk).
Nothing here knows RecBole.
"""

from recbole_uip.lm.backbone import Backbone, ModelError, ModelSource, load, resolve
from recbole_uip.lm.embedding import embed, holds_embeddings
from recbole_uip.lm.forward import likelihoods, prefix_likelihoods
from recbole_uip.lm.prefix import Prefix, holds_prefix_scores, score_prefix
from recbole_uip.lm.prompt import Prompt, build, feedback_logit, log_likelihood
from recbole_uip.lm.scoring import Scores, holds_scores, score
from recbole_uip.lm.vectors import Vectors

__all__ = [
    "Backbone",
    "ModelError",
    "ModelSource",
    "Prefix",
    "Prompt",
    "Scores",
    "Vectors",
    "build",
    "embed",
    "feedback_logit",
    "holds_embeddings",
    "holds_prefix_scores",
    "holds_scores",
    "likelihoods",
    "load",
    "log_likelihood",
    "prefix_likelihoods",
    "resolve",
    "score",
    "score_prefix",
]
