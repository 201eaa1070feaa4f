"""The feature bank: profiles by user token, kept fresh without a language model.

``store`` (files, commits, the one writer), ``model`` (what is fitted, and the item catalogue),
``tokens`` (an index of user tokens), ``users`` (users as rows), ``bank`` (look up, match, update),
``refit`` (new codebooks), ``events`` and ``build`` (banks from event files of any size), ``spark``
(from a DataFrame), ``export_*`` (to other systems), ``service`` and ``limits`` (HTTP),
``transformer`` (scikit-learn's interface). Nothing here knows RecBole.
"""

from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.refit import RefitReport
from recbole_uip.bank.store import BankError

__all__ = ["BankError", "FeatureBank", "RefitReport"]
