"""The sampler `cmaes`: Optuna's, with an optimizer that the database keeps as numbers, not as a pickle.

Whoever can write to a database chooses what is read from it. A pickle would let them run code, and so would an array whose
elements are addresses. Stored are the numbers that a generation changes. Everything else, such as bounds and the size of
a generation, comes from the search space.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.samplers import CmaEsSampler

if TYPE_CHECKING:
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial

    Numbers = np.ndarray[Any, np.dtype[np.float64]]

_LARGEST = 1e32  # cmaes' own limit of its means and step sizes; nothing in a usable state is larger
_MAX_GENERATION = 2**31


class StoredCmaEsSampler(CmaEsSampler):
    """Optuna's CmaEsSampler, which draws the same points, but stores and restores its optimizer as JSON.

    A state that is not as this class writes it is not used, and neither is the pickle of an earlier version: the optimizer
    then starts over, and learns one generation of the stored results with each trial.
    """

    _stored: str | None = None
    _optimizer: Any = None

    @property
    def _attr_key_optimizer(self) -> str:
        return f"{self._attr_prefix}state"  # another one than Optuna's, whose value is a pickle

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> None:
        """Find the newest state. Optuna then calls `_init_optimizer`, which knows the search space."""
        self._stored = None
        for trial in reversed(completed_trials):
            parts = {key: each for key, each in trial.system_attrs.items() if key.startswith(self._attr_key_optimizer)}
            if parts:
                texts = [parts.get(f"{self._attr_key_optimizer}:{part}") for part in range(len(parts))]
                self._stored = "".join(each for each in texts if isinstance(each, str))
                return

    def _init_optimizer(self, trans: Any, direction: StudyDirection) -> Any:
        random_state = self._cma_rng.rng.get_state()
        self._optimizer = optimizer = super()._init_optimizer(trans, direction)
        if self._stored is not None and _restore(optimizer, self._stored):
            self._cma_rng.rng.set_state(random_state)  # Optuna draws a seed for a new optimizer only
        return optimizer

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        """Return the attributes that hold the optimizer, instead of the pickle that Optuna passes."""
        return super()._split_optimizer_str(_state_of(self._optimizer))

    def _get_solution_trials(self, trials: list[FrozenTrial], generation: int) -> list[FrozenTrial]:
        found = super()._get_solution_trials(trials, generation)
        if not self._with_margin or self._optimizer is None:
            return found
        shape = (self._optimizer.dim,)
        return [trial for trial in found if _numbers(trial.system_attrs.get("x_for_tell"), shape) is not None]


def _state_of(optimizer: Any) -> str:
    """Return the numbers that the results of a generation change in an optimizer, as JSON."""
    cma = getattr(optimizer, "_cma", optimizer)  # CMAwM contains a CMA
    state = {
        "generation": cma._g,
        "sigma": float(cma._sigma),
        "mean": cma._mean.tolist(),
        "p_sigma": cma._p_sigma.tolist(),
        "pc": cma._pc.tolist(),
        "C": cma._C[np.triu_indices(cma.dim)].tolist(),  # it is symmetric
    }
    if hasattr(optimizer, "_A"):  # of CMAwM, if a parameter has steps
        state["A"] = optimizer._A.tolist()
    return json.dumps(state)


def _restore(optimizer: Any, text: str) -> bool:
    """Set the state of a new optimizer; return False, and leave it as it is, for a text that cannot be its state."""
    cma = getattr(optimizer, "_cma", optimizer)
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(state, dict):
        return False
    rows, columns = np.triu_indices(cma.dim)
    shapes = {"sigma": (), "mean": (cma.dim,), "p_sigma": (cma.dim,), "pc": (cma.dim,), "C": rows.shape}
    if hasattr(optimizer, "_A"):
        shapes["A"] = (cma.dim,)
    found: dict[str, Any] = {name: _numbers(state.get(name), shape) for name, shape in shapes.items()}
    generation = state.get("generation")
    if (
        type(generation) is not int
        or not 0 < generation < _MAX_GENERATION
        or any(each is None for each in found.values())
    ):
        return False
    covariance = np.zeros((cma.dim, cma.dim))
    covariance[rows, columns] = covariance[columns, rows] = found["C"]
    # With a length of zero, or close to it, what is drawn would be no number.
    if any(
        np.any(each < 1 / _LARGEST) for each in (np.linalg.eigvalsh(covariance), found["sigma"], found.get("A", 1.0))
    ):
        return False
    cma._g, cma._sigma, cma._C = generation, float(found["sigma"]), covariance
    cma._mean, cma._p_sigma, cma._pc = found["mean"], found["p_sigma"], found["pc"]
    if "A" in found:
        optimizer._A = found["A"]
    return True


def _numbers(value: object, shape: tuple[int, ...]) -> Numbers | None:
    """Return a value of the database as an array of finite numbers; None if it is anything else, or has another shape."""
    try:
        array = np.array(value)
    except (ValueError, RecursionError):  # lists of different lengths, or too deep
        return None
    if array.shape != shape or array.dtype.kind not in "if":
        return None
    array = array.astype(np.float64)
    return array if np.all(np.abs(array) < _LARGEST) else None  # not for NaN
