"""Hyperparameter search: a YAML search space, trials scheduled by Ray Tune, results in Optuna storage."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.api import (
        PlannedSearch,
        SearchResult,
        Space,
        export_model,
        list_studies,
        load_space,
        plan_search,
        read_results,
        replay_trial,
        run_search,
        serve_dashboard,
        space_schema,
        write_report,
    )

__all__ = [
    "PlannedSearch",
    "SearchResult",
    "Space",
    "export_model",
    "list_studies",
    "load_space",
    "plan_search",
    "read_results",
    "replay_trial",
    "run_search",
    "serve_dashboard",
    "space_schema",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # On first use: every import of a submodule passes through here, and `hpo --help` answers at once.
    if name in __all__:
        from hpo import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
