"""What a worker gets to run a claimed trial, from the search space, the claim and the place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.paths import RunsDir
from hpo.search.adoption import parent_folder
from hpo.search.checkpoints.files import owner_key
from hpo.search.messages import TrialSpec
from hpo.search.population import trial_key
from hpo.search.slots import Slots
from hpo.space.model import Space

if TYPE_CHECKING:  # workers import modules around this one, and need no database
    from storage.ownership import ClaimedTrial
    from storage.parents import Parent


class SpecBuilder:
    """Builds the specs of a study's trials.

    Args:
        space: the search.
        unique_name: of the study.
        data: what the trainable gets as `data`.
        runs_dir: where checkpoints are stored.
    """

    def __init__(self, space: Space, unique_name: str, data: Mapping[str, Any], runs_dir: RunsDir) -> None:
        self._space = space
        self._unique_name = unique_name
        self._data = dict(data)
        self._runs_dir = runs_dir

    def folder(self, claim: ClaimedTrial) -> Path:
        """Return the folder of a trial."""
        return self._runs_dir.trial(self._unique_name, claim.number)

    def parent_of(self, claim: ClaimedTrial) -> Parent | None:
        """Return the trial that a trial continues; None if it has none, or if the parent's checkpoint was gone before."""
        from storage.parents import Parent

        parent = Parent.read(claim.continued_from)
        return parent if parent is not None and parent.epoch > 0 and self._space.saves_checkpoints else None

    def build(self, claim: ClaimedTrial, parent: Parent | None, derived: Mapping[str, Any], slots: Slots) -> TrialSpec:
        """Return the spec of a trial.

        Args:
            claim: the trial.
            parent: the trial that it continues, see `parent_of`.
            derived: derived values of its configuration.
            slots: what it gets of a machine.
        """
        space, scheduler, folder = self._space, self._space.scheduler, self.folder(claim)
        return TrialSpec(
            trainable=space.trainable,
            command=space.command,
            patterns=space.report,
            key=owner_key(trial_key(space, claim.params, claim.replaces), claim.attempt),
            token=claim.token,
            params={**claim.params, **derived},
            data=self._data,
            seed=space.seed,
            max_epochs=space.max_epochs,
            stored_epoch=claim.epoch,
            folder=str(folder),
            checkpoint_every=None if space.checkpoint_every == "auto" else space.checkpoint_every,
            device=slots.device,
            threads=slots.threads,
            timeout=space.trial_timeout,
            code_folder=str(Path.cwd()),
            parent_folder=str(parent_folder(self._runs_dir, folder, parent.files, parent.number)) if parent else "",
            parent_key=parent.key if parent else "",
            parent_epoch=parent.epoch if parent and scheduler.replaces_trials else 0,
            interval=scheduler.interval if scheduler.replaces_trials else 0,
            replicates=space.replicates,
            last_wait=space.last_wait,
            claimed_milliseconds=claim.claimed_milliseconds,
            bucket=self._bucket(self._unique_name, claim.number),
            parent_bucket=self._bucket(parent.files, parent.number) if parent else "",
        )

    def _bucket(self, files: str, number: int) -> str:
        """Return where in the bucket a trial is. The files of a script stay on its machine, and so do its checkpoints."""
        return "" if self._space.command is not None else self._runs_dir.bucket_trial(files, number)
