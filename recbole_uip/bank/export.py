"""Exports: what a run has inferred, in the forms that other systems read.

==================  ===========================================================================
:mod:`~.export_atomic`  RecBole's atomic files, which RecBole trains on without this package
:mod:`~.export_feast`   Parquet for a Feast feature store, exact at every point in time
:mod:`~.export_redis`   the codes of today in Redis, one key a user
:mod:`~.export_peft`    a code as a PEFT adapter, which the LM generates with
==================  ===========================================================================
"""

from recbole_uip.bank.export_atomic import atomic_files
from recbole_uip.bank.export_feast import feature_rows, feature_store_parquet, timestamps
from recbole_uip.bank.export_peft import soft_moves, soft_prompts, soft_tokens
from recbole_uip.bank.export_redis import RedisLookup, from_redis, to_redis

__all__ = [
    "RedisLookup",
    "atomic_files",
    "feature_rows",
    "feature_store_parquet",
    "from_redis",
    "soft_moves",
    "soft_prompts",
    "soft_tokens",
    "timestamps",
    "to_redis",
]
