"""optuna-dashboard on the storage of this service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo.errors import SettingError

if TYPE_CHECKING:
    from storage.database import Database


def serve(database: Database, port: int) -> None:
    """Serve the dashboard on 127.0.0.1 until interrupted. It has no authentication: whoever reaches it can delete studies.

    Raises:
        SettingError: the port is taken.
    """
    from optuna_dashboard import run_server

    try:
        run_server(database.optuna, host="127.0.0.1", port=port)
    except OSError as error:
        raise SettingError(f"cannot listen on 127.0.0.1:{port}: {error.strerror}; name another --port") from None


if __name__ == "__main__":
    from hpo.run import main

    main(["dashboard"])
