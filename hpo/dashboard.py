"""optuna-dashboard on the storage of this service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo.errors import SettingError

if TYPE_CHECKING:
    from storage.database import Database


def serve(database: Database, host: str, port: int) -> None:
    """Serve the dashboard until interrupted. It has no authentication: whoever reaches it can delete studies.

    Raises:
        SettingError: the port is taken.
    """
    from optuna_dashboard import run_server

    try:
        run_server(database.optuna, host=host, port=port)
    except OSError as error:
        raise SettingError(f"cannot listen on {host}:{port}: {error.strerror}; name another --port") from None


if __name__ == "__main__":
    from hpo.run import main

    main(["dashboard"])
