"""Run `hpo run` as if on another machine, with a short lease: only the lease then says whether this driver is dead.

    uv run python -m benchmarks.driver HOST LEASE_SECONDS SPACE [OPTIONS]

Drivers with the same HOST recognize each other's deaths by the PID, as on one machine.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from storage import lease


def main() -> NoReturn:
    """Change the identity and the lease of this process, then run the command line of hpo."""
    _, host, seconds, *arguments = sys.argv
    setattr(lease, "host_id", lambda: host)  # noqa: B010 # mypy forbids to assign a function
    lease.LEASE_SECONDS = float(seconds)
    sys.argv[1:] = arguments
    from hpo.run import main as run_hpo  # only now: storage.run and storage.studies import these names

    run_hpo(["run"])


if __name__ == "__main__":
    main()
