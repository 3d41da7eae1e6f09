"""Hyperparameter search: a YAML search space, trials scheduled by Ray Tune, results in Optuna storage."""

from hpo import working_folder

if working_folder.is_run_as_module():
    working_folder.leave()  # before any other import

# isort: split
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.api import (
        PlannedSearch,
        SearchResult,
        clean_runs,
        compare_studies,
        copy_study,
        delete_study,
        export_model,
        list_studies,
        migrate_database,
        plan_search,
        read_results,
        rename_study,
        replay_trial,
        retry_trials,
        run_search,
        serve_dashboard,
        write_comparison,
        write_report,
    )
    from hpo.space.model import Space, load_space, space_schema

__all__ = [
    "PlannedSearch",
    "SearchResult",
    "Space",
    "clean_runs",
    "compare_studies",
    "copy_study",
    "delete_study",
    "export_model",
    "list_studies",
    "load_space",
    "migrate_database",
    "plan_search",
    "read_results",
    "rename_study",
    "replay_trial",
    "retry_trials",
    "run_search",
    "serve_dashboard",
    "space_schema",
    "write_comparison",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: importing any submodule runs this file, and `hpo --help` must start fast.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    is_of_space = name in {"Space", "load_space", "space_schema"}
    return getattr(import_module("hpo.space.model" if is_of_space else "hpo.api"), name)
