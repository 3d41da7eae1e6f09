"""The verbs for whole studies: compare, copy, rename, delete. `hpo.run` adds them to the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from hpo.command_line.options import checkpoints_option, secret, storage_option
from hpo.command_line.printing import hint, new_console, relative, say
from hpo.errors import SettingError

if TYPE_CHECKING:
    from hpo.api import DeletedStudy


@click.command()
@click.argument("studies", nargs=-1, metavar="STUDY...")
@click.option(
    "--other",
    "others",
    type=(str, str),
    multiple=True,
    metavar="STUDY URL",
    help="A study of another database. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and write no page.")
@storage_option
def compare(studies: Sequence[str], others: Sequence[tuple[str, str]], as_json: bool, storage: str) -> int:
    """Show studies side by side, and write a page with their curves.

    For each study: the best value, after how many trials and how much device time it was found, and what all trials took.
    The page, in runs/comparisons/, shows the best value so far over trials and over device time. What differs between the
    studies, such as the metric, the data or the number of epochs, is said. Databases are only read: `hpo migrate` brings one
    of an older version forward first.

    \b
    Example:  hpo compare grid extended
              hpo compare grid --other grid sqlite:///old/hpo.db
    """
    from hpo.api import compare_studies, write_comparison

    comparison = compare_studies(studies, others=others, storage=storage, password=secret("PGPASSWORD"))
    if as_json:
        print(json.dumps(comparison.to_json(), indent=2))
        return 0
    from hpo.report.comparison import comparison_remarks
    from hpo.report.tables import comparison_table

    console = new_console()
    console.print(comparison_table(comparison))
    for remark in comparison_remarks(comparison):
        console.print(remark, soft_wrap=True)
    console.print(f"Page: {relative(write_comparison(comparison))}", soft_wrap=True)
    return 0


@click.command()
@click.argument("study")
@click.argument("new_name", metavar="NEW")
@click.option("--to", metavar="URL", help="The database of the copy; by default, that of the study.")
@storage_option
@checkpoints_option
def copy(study: str, new_name: str, to: str | None, storage: str, checkpoints: str | None) -> int:
    """Copy a study, in its database or to another one.

    The copy has all of it: metrics, provenance, checkpoints, logs, artifacts. It is complete or does not exist: a command
    that was killed continues when it is started again. To continue the copy, copy the file of the search space, too: a study
    has the name of its file. If you change that file, the search is a revision of the copy.

    A search may run meanwhile: trials that it trains wait in the copy, to be resumed from their checkpoints.

    With --to, the study's own database is only read. That of the copy is created if it does not exist, and migrated if its
    tables are of an older version of hpo, which refuses it then.

    \b
    Example:  hpo copy grid wider
              hpo copy grid grid --to postgresql://hpo@database/hpo
    """
    from hpo.api import copy_study
    from hpo.report.formatting import format_bytes

    copied = copy_study(study, new_name, to=to, storage=storage, password=secret("PGPASSWORD"), checkpoints=checkpoints)
    for remark in copied.remarks:
        say(f"note: {remark}")
    say(f"{copied.source} is copied to {copied.name} in {copied.storage}")
    say(f"It has {_describe(copied.counts)}; checkpoints and logs: {format_bytes(copied.disk_bytes)}")
    say(f"To continue it, give a search space its name: search_spaces/{copied.name}.yaml")
    return 0


@click.command()
@click.argument("study")
@click.argument("new_name", metavar="NEW")
@storage_option
def rename(study: str, new_name: str, storage: str) -> int:
    """Give a study another name.

    Rename the file of its search space, too: a study has the name of its file. Checkpoints stay in the folder with the
    former name. A study that is running is refused.

    \b
    Example:  hpo rename grid first
    """
    from hpo.api import rename_study

    former = rename_study(study, new_name, storage=storage, password=secret("PGPASSWORD"))
    say(f"{former} is {new_name} now. To continue it, give a search space its name: search_spaces/{new_name}.yaml")
    return 0


@click.command()
@click.argument("study")
@click.option("--yes", is_flag=True, help="Delete it without asking.")
@storage_option
@checkpoints_option
def delete(study: str, yes: bool, storage: str, checkpoints: str | None) -> int:
    """Delete a study with its checkpoints, logs and artifacts, after a question.

    Its reports and exports stay, and so do the trials that other studies have taken over. A study that is running is
    refused. A name without a revision means the latest one; the others stay. With --yes, name the revision if there are
    several.

    The files of trials that unfinished ones of other studies continue are kept; `hpo clean` deletes them later. If the
    command is killed, the same one deletes the files that are left, and no other study.

    \b
    Example:  hpo delete grid@2
    """
    from hpo.api import delete_study
    from hpo.report.formatting import format_bytes

    def confirm(found: DeletedStudy) -> bool:
        size = format_bytes(found.disk_bytes)
        if found.has_rows:
            say(f"{found.name} in {found.storage} has {_describe(found.counts)}; checkpoints and logs: {size}")
        else:
            say(f"{found.name} is deleted in {found.storage}, but not its files: {size}")
        command = hint("delete", found.name if found.has_rows else study, "--yes", storage=storage)
        if yes and found.has_rows and "@" not in study and found.name != study:
            raise SettingError(
                f"nothing is deleted: {study} means {found.name} now, and another revision after that is deleted. With "
                f"--yes, name the revision: {command}"
            )
        if yes:
            return True
        if sys.stdin is None or not sys.stdin.isatty():
            raise SettingError(f"nothing is deleted: nobody can answer here. This deletes it: {command}")
        return click.confirm("Delete it? It cannot be undone", default=False)

    deleted = delete_study(
        study, confirm=confirm, storage=storage, password=secret("PGPASSWORD"), checkpoints=checkpoints
    )
    if deleted is None:
        say("Nothing is deleted.")
        return 0
    for problem in deleted.problems:
        say(f"hpo: {problem}", to=sys.stderr)
    say(f"{deleted.name} is deleted.")
    if deleted.remaining:
        command = hint("delete", deleted.remaining, storage=storage)
        say(
            f"Its deletion had been interrupted. {deleted.remaining} is another study, and stays. This deletes it: {command}"
        )
    return 2 if deleted.problems else 0


def _describe(counts: dict[str, int]) -> str:
    from storage.study import describe_counts

    return f"trials: {describe_counts(counts)}" if counts else "no trials"
