"""Which trials of earlier studies a study continues. It stores the decision: earlier studies can be renamed or deleted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage import optuna_tables
from storage.errors import retry_while_down
from storage.ownership import lock_study
from storage.study import Study

CONTINUATION = "hpo:continuation"  # user attribute of a study


def settle_continuation(study: Study, seen: Any, decision: Mapping[str, Any]) -> Any:
    """Store a decision, unless another run has stored one meanwhile; return the one that is stored. Idempotent.

    Args:
        study: the study.
        seen: the stored decision when this one was made; None if there was none.
        decision: plain values.

    Raises:
        StorageError: the study was deleted, or the database cannot be used (after retries).
    """

    def write() -> Any:
        with study.database.transaction() as connection:
            lock_study(connection, study.database, study.key)
            stored = optuna_tables.read_study_user_attr(connection, study.study_id, CONTINUATION)
            if stored != seen:
                return stored
            optuna_tables.write_study_attrs(connection, study.study_id, {CONTINUATION: dict(decision)})
            return dict(decision)

    return retry_while_down(study.database, write)
