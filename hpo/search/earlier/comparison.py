"""Compares the trials of an earlier study with a search: which results stand, and from which its sampler can learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.space.model import Space
from hpo.space.parameters import Params, Scalar
from hpo.space.translation import Translation, TranslationError, translate
from storage.imports import ImportedTrial, Origin
from storage.records import REPLACES

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from storage.study import Study

# Optuna's other samplers that learn read only trials that they have drawn themselves.
LEARN_FROM_OTHERS = {"tpe", "gp"}


class RefusalError(Exception):
    """A trial cannot be taken over. The message says why, in words that fit several trials."""


class Comparison:
    """Compares the trials of one earlier study with a search.

    Args:
        space: the search.
        before: the search of the earlier study.
        earlier: the earlier study.
        despite: see `Source`.
    """

    def __init__(self, space: Space, before: Space, earlier: Study, despite: frozenset[str]) -> None:
        self._space = space
        self._before = before
        self._earlier = earlier
        self._despite = despite
        self._is_same_code = _code_of(space) == _code_of(before)
        self._trainings = space.is_default_trainable and before.is_default_trainable
        self._defaults = _default_params() if self._trainings else {}
        self._epochs: dict[int, dict[int, dict[str, float]]] | None = None
        self._distributions = space.distributions()

    def take_over(self, trial: FrozenTrial) -> ImportedTrial:
        """Return a trial as one of the search.

        Raises:
            RefusalError: its value cannot be compared.
            TranslationError: the search has no such configuration.
        """
        from optuna.trial import TrialState

        self._check_history(trial)
        self._check("data", self._space.data == self._before.data, "it had other data")
        self._check("trainable", self._is_same_code, "it ran other code")
        params = self._params_of(trial)
        translation = translate(self._space, params, defaults=self._defaults)
        state, values, is_exact = self._cut(trial, params)
        origin = Origin.of_training(self._earlier, trial)
        is_reused = is_exact and state == "COMPLETE" and self._is_trained_the_same_way(translation)
        sampler = self._space.sampler.name
        if not is_reused and sampler not in LEARN_FROM_OTHERS:
            raise RefusalError(f"sampler {sampler} uses only results that stand")
        key = self._space.config_key(translation.params) if is_reused else None
        last = max(values)
        # Optuna's TPE ranks pruned trials by one objective.
        if state == "PRUNED" and self._space.objectives is not None:
            raise RefusalError("it was stopped early, and a search with several objectives has no use for it")
        return ImportedTrial(
            origin,
            translation.params,
            {name: self._distributions[name] for name in translation.params},
            TrialState[state],
            values[last],
            key,
            values if is_reused else {last: values[last]} if state == "PRUNED" else {},
            attrs=self._attrs(trial, translation, is_reused=is_reused),
            started=trial.datetime_start,
            completed=trial.datetime_complete,
            other_values=self._other_values(trial, last),
        )

    def same_configuration(self, trial: FrozenTrial) -> Params | None:
        """Return the configuration of a trial if the search would train it in the same way for as many epochs; else None."""
        try:
            self._check_history(trial)
            translation = translate(self._space, self._params_of(trial), defaults=self._defaults)
        except (RefusalError, TranslationError):
            return None
        return translation.params if self._is_trained_the_same_way(translation) else None

    def depends_on_horizon(self, trial: FrozenTrial) -> bool:
        """Return whether the training of a trial is known to depend on max_epochs."""
        return self._trainings and self._depends_on_horizon(self._params_of(trial))

    def complete(self, taken: Mapping[int, ImportedTrial]) -> list[ImportedTrial]:
        """Return the same trials; those whose results stand with all of their metrics, and what is needed to replay them.

        Args:
            taken: {trial_id in the earlier study: as `take_over` returned it}.
        """
        stands = [trial_id for trial_id, trial in taken.items() if trial.key is not None]
        metrics = self._earlier.metrics_of(stands)
        provenances = self._earlier.whole_provenances() if stands else {}

        def with_metrics(trial_id: int, trial: ImportedTrial) -> ImportedTrial:
            epochs = metrics[trial_id]
            return dataclasses.replace(
                trial,
                metrics={epoch: found for epoch, found in epochs.items() if epoch <= self._space.max_epochs},
                provenance=provenances.get(trial_id, {}),
            )

        return [with_metrics(each, trial) if each in metrics else trial for each, trial in taken.items()]

    def _params_of(self, trial: FrozenTrial) -> Params:
        """Return what a trial was trained with, derived values included."""
        derived = trial.user_attrs.get("derived")
        return trial.params | (derived if isinstance(derived, dict) else {})

    @staticmethod
    def _check_history(trial: FrozenTrial) -> None:
        if REPLACES in trial.user_attrs:
            raise RefusalError("its hyperparameters changed while it was trained")

    def _check(self, what: str, is_same: bool, reason: str) -> None:
        if not is_same and what not in self._despite:
            helps = self._space.sampler.name in LEARN_FROM_OTHERS  # others use only results that stand
            raise RefusalError(f"{reason} (despite: [{what}] takes it)" if helps else reason)

    def _cut(self, trial: FrozenTrial, params: Mapping[str, Scalar]) -> tuple[str, dict[int, float], bool]:
        """Return a trial as it was after the search's number of epochs.

        Returns:
            Its state, {epoch: finite objective}, and whether these are what the search would measure.
        """
        (values, is_metric), state = self._values(trial), trial.state.name
        if not values:
            raise RefusalError("it has no finite value")
        epochs, wanted = self._before.max_epochs, self._space.max_epochs
        if state == "COMPLETE" and epochs == wanted and wanted not in values:
            raise RefusalError(f"it has no value after epoch {wanted}")
        if epochs == wanted:
            return state, values, is_metric
        if epochs > wanted and not self._depends_on_horizon(params):
            state = "COMPLETE" if wanted in values else state
            if state == "COMPLETE" and wanted not in values:
                raise RefusalError(f"it has no value after epoch {wanted}")
            return state, {epoch: value for epoch, value in values.items() if epoch <= wanted}, is_metric
        self._check("max_epochs", False, f"it was trained for {epochs} epochs, not {wanted}")
        return state, values, False

    def _values(self, trial: FrozenTrial) -> tuple[dict[int, float], bool]:
        """Return {epoch: value}, without values that are not finite, and whether they are of the search's metric.

        Without a finite value after its last epoch, it is of no use: then there are no values.
        """
        is_metric = True
        if self._space.metric == self._before.metric:
            values = dict(trial.intermediate_values)
            if not values and trial.state.name == "COMPLETE" and trial.values:
                values = {self._before.max_epochs: trial.values[0]}
        else:
            values = {
                epoch: found[self._space.metric]
                for epoch, found in self._metrics_of(trial).items()
                if self._space.metric in found
            }
            if not values:
                self._check("metric", False, f"it has no {self._space.metric}")
                if self._space.direction != self._before.direction:  # the worst one would count as the best
                    raise RefusalError(
                        f"it has no {self._space.metric}, and {self._before.metric}, to {self._before.direction}, cannot "
                        f"stand in for a metric to {self._space.direction}"
                    )
                values, is_metric = dict(trial.intermediate_values), False
        last = max(values, default=0)
        if last and not math.isfinite(values[last]):
            return {}, is_metric
        return {epoch: value for epoch, value in values.items() if math.isfinite(value)}, is_metric

    def _other_values(self, trial: FrozenTrial, epoch: int) -> tuple[float, ...]:
        """Return the values of the search's objectives but for the first one, after an epoch.

        Raises:
            RefusalError: one is missing, or not finite. No option takes the trial then: nothing can stand in for a value.
        """
        metrics = self._metrics_of(trial).get(epoch, {}) if self._space.objectives else {}
        if epoch == self._before.max_epochs and trial.state.name == "COMPLETE":
            # One that was itself taken over to learn from has values, and no metrics.
            names = [each.metric for each in self._before.all_objectives]
            metrics = dict(zip(names, trial.values or (), strict=False)) | metrics
        found = []
        for each in self._space.all_objectives[1:]:
            if each.metric not in metrics:
                raise RefusalError(f"it has no {each.metric}")
            if not math.isfinite(metrics[each.metric]):
                raise RefusalError("it has no finite value")
            found.append(metrics[each.metric])
        return tuple(found)

    def _metrics_of(self, trial: FrozenTrial) -> dict[int, dict[str, float]]:
        from storage.optuna_internals import trial_id

        if self._epochs is None:
            ended = [trial_id(each) for each in self._earlier.trained_trials()]
            self._epochs = self._earlier.metrics_of(ended)
        return self._epochs.get(trial_id(trial), {})

    def _depends_on_horizon(self, params: Mapping[str, Scalar]) -> bool:
        """Whether a longer training is not the continuation of a shorter one; True if this is not known."""
        if not self._trainings:
            return True
        from hpo.train.params import HORIZON_SCHEDULES, TrainParams

        return params.get("schedule", TrainParams.schedule) in HORIZON_SCHEDULES

    def _is_trained_the_same_way(self, translation: Translation) -> bool:
        return (
            translation.is_same
            and self._is_same_code
            and self._space.data == self._before.data
            and (self._space.seed, self._space.replicates) == (self._before.seed, self._before.replicates)
        )

    def _attrs(self, trial: FrozenTrial, translation: Translation, *, is_reused: bool) -> dict[str, Any]:
        derived = self._space.derive(translation.params)
        attrs: dict[str, Any] = {"derived": derived} if derived else {}
        if is_reused and self._before.max_epochs == self._space.max_epochs:
            attrs |= {name: value for name, value in trial.user_attrs.items() if name.startswith("test_")}
        return attrs


def _code_of(space: Space) -> tuple[Any, ...]:
    return space.trainable, space.command, space.report


def _default_params() -> dict[str, Scalar]:
    from hpo.train.params import TrainParams

    return dataclasses.asdict(TrainParams())
