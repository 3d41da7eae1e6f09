"""`benchmarks.toy:noop` in a worker that imports torch, as the workers of most searches do."""

import torch  # noqa: F401

from benchmarks.toy import noop

__all__ = ["noop"]
