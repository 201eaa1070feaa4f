"""The frozen language model: where it comes from, how it is prompted, what it scores.

:func:`score` is the way in: texts to log-likelihoods and score vectors, cached. The modules:
``backbone`` (find and load a frozen LM), ``prompt`` (facets, soft tokens, block mask, and the
differentiable likelihood), ``scoring`` (batches and cache), ``llama`` (the fast path),
``likelihood`` (behaviours under tuned soft tokens, and gradients in these), ``forward``
(log-likelihoods of texts at any soft tokens, forward only), ``embedding`` (mean embeddings, the
control for scores), ``adapt`` (adapters to a catalogue's texts), ``store`` (scores on disk).
Nothing here knows RecBole.
"""

from recbole_uip.lm.backbone import Backbone, ModelError, ModelSource, load, resolve
from recbole_uip.lm.embedding import Embeddings, embed
from recbole_uip.lm.forward import likelihoods
from recbole_uip.lm.prompt import Prompt, build, feedback_logit, log_likelihood
from recbole_uip.lm.scoring import Scores, score

__all__ = [
    "Backbone",
    "Embeddings",
    "ModelError",
    "ModelSource",
    "Prompt",
    "Scores",
    "build",
    "embed",
    "feedback_logit",
    "likelihoods",
    "load",
    "log_likelihood",
    "resolve",
    "score",
]
