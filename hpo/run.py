"""The command line: flags and environment variables in, text and exit codes out.

Exit codes: 0 finished; 1 finished, but no trial completed; 2 the user must change something; 130 stopped, resumable.
A search whose budget is spent is finished. One that stopped because nothing can be trained is not: 2.
`hpo.api` does the work. The verbs for whole studies are in `hpo.command_line.study_verbs`. Each verb imports what it
needs, so `hpo --help` is fast.
"""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import stat
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from hpo import working_folder
from hpo.command_line import study_verbs
from hpo.command_line.options import (
    checkpoints_option,
    data_option,
    exit_option,
    given_option,
    read_recipient,
    secret,
    space_arguments,
    storage_option,
)
from hpo.command_line.printing import hint, new_console, print_ending, print_report, print_results, say
from hpo.errors import SettingError, TrainedElsewhereError, exit_code_of, is_fixable, nearest, printable
from hpo.paths import RunsDir

if TYPE_CHECKING:
    from hpo.report.results import Results

COMPLETE_VARIABLE = "_HPO_COMPLETE"  # how a shell asks click for completions


def main(prefix: Sequence[str] = ()) -> NoReturn:
    """Run a verb of the command line and exit.

    Args:
        prefix: inserted before the arguments: `python -m hpo.run SPACE` is `hpo run SPACE`.
    """
    working_folder.leave()  # for what is imported later; `hpo/__init__.py` has done it where `python -m` put it there
    with nullcontext() if sys.stderr is None else redirect_stderr(_Stderr(sys.stderr)):  # None: it is closed
        _run(prefix)


def _run(prefix: Sequence[str]) -> NoReturn:
    words = [*prefix, *sys.argv[1:]]
    _keep_files_private()
    try:
        code = cli.main(
            words,
            prog_name="hpo",
            standalone_mode=False,
            complete_var=COMPLETE_VARIABLE,
            obj=shlex.join(["hpo", *words]),
        )
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 # printed here, while control characters are left out
        code = exit_code_of(error)
        if is_fixable(error):
            say(f"hpo: {error}", to=sys.stderr)
        elif code != 130:
            traceback.print_exc()
        sys.exit(code)


class _Stderr(io.TextIOBase):
    """stderr without control characters: tracebacks, and warnings of libraries, may quote what a database holds.

    It is no terminal, so that libraries write no colors.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def fileno(self) -> int:
        return self._stream.fileno()

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        # Called when this object is deleted, too. The stream belongs to the process, and may be closed by then.
        pass

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)


def _keep_files_private() -> None:
    """Let what is written be readable by this user only, unless others may enter the folder that it goes to."""
    with suppress(OSError):
        if RunsDir().root.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return
    os.umask(stat.S_IRWXG | stat.S_IRWXO)


class _Verbs(click.Group):
    """Lists the verbs in the order of this file."""

    def list_commands(self, _context: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        if self.get_command(context, args[0]) is None and not args[0].startswith("-"):
            context.fail(f"there is no verb {args[0]!r}: {nearest(args[0], self.commands)}")
        return super().resolve_command(context, args)


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="VERB [ARGUMENTS]...",
)
@click.version_option(package_name="hpo", prog_name="hpo")
def cli() -> None:
    """Hyperparameter search: Ray Tune schedules the trials, Optuna storage keeps every result.

    \b
    Start here:        hpo run quick
    Help for a verb:   hpo run --help
    """


# --- verbs ------------------------------------------------------------------------------------------------------------


@cli.command()
@space_arguments
@storage_option
@checkpoints_option
@data_option
@exit_option
@click.option("--plan", "only_plan", is_flag=True, help="Run nothing; show the output of `hpo plan`.")
@click.pass_context
def run(
    context: click.Context,
    space: str,
    overrides: Sequence[str],
    storage: str,
    checkpoints: str | None,
    data_dir: Path,
    exit_after: float | None,
    only_plan: bool,
) -> int:
    """Run a search, or resume it.

    SPACE is the name of a file in search_spaces/ without its ending, or a path to a YAML file. The same
    command again resumes the search. Ctrl-C finishes the epochs in flight; a second Ctrl-C stops at once.

    RAY_ADDRESS joins a running Ray cluster. PGPASSWORD is the password of a PostgreSQL URL without one. HPO_ON_FINISH
    is a command, or a URL that gets a POST of JSON, when the search ends: instead of on_finish of the file.

    The exit code is 0 if a trial completed, 1 if none did, 2 if you must change something, such as code with which
    all trials fail, and 130 if the search was stopped, or --exit-after is over.

    \b
    Example:  hpo run grid --set max_epochs=2 --set parameters.lr=0.02
    """
    if only_plan:
        return int(
            context.invoke(
                plan, space=space, overrides=overrides, storage=storage, checkpoints=checkpoints, data_dir=data_dir
            )
        )
    from hpo.space.model import load_space

    loaded = load_space(space, overrides)
    from hpo.api import run_search
    from hpo.report.progress import TerminalProgress

    console = new_console()
    with TerminalProgress(console) as progress:

        def show(results: Results) -> None:
            progress.close()
            print_results(console, results)

        result = run_search(
            loaded,
            storage=storage,
            password=secret("PGPASSWORD"),
            data_dir=data_dir,
            checkpoints=checkpoints,
            ray_address=os.environ.get("RAY_ADDRESS"),
            exit_after=exit_after,
            on_finish=read_recipient(overrides),
            listener=progress,
            on_results=show,
            command=context.obj,
        )
    print_ending(console, result, storage)
    if "torch" not in sys.modules:  # torch's extensions would report what is left at exit as leaks
        gc.freeze()  # skips the garbage collection at exit, which takes 0.6 s after a search
    return result.exit_code


@cli.command()
@space_arguments
@storage_option
@checkpoints_option
@data_option
def plan(space: str, overrides: Sequence[str], storage: str, checkpoints: str | None, data_dir: Path) -> int:
    """Show the trials, time and memory that a search needs.

    Some training steps are measured on this machine. A trainable of yours is imported, to check it.
    The database is only read: not even tables of an older version are migrated.

    \b
    Example:  hpo plan grid --set max_epochs=10
    """
    from hpo.space.model import load_space

    loaded = load_space(space, overrides)
    from hpo.api import plan_search
    from hpo.report.plan import configuration_table, plan_lines, speed_table
    from hpo.report.progress import TerminalProgress

    console = new_console()
    with TerminalProgress(console) as progress:
        progress.search_starting(loaded)
        planned = plan_search(
            loaded,
            storage=storage,
            password=secret("PGPASSWORD"),
            data_dir=data_dir,
            checkpoints=checkpoints,
            listener=progress,
        )
    console.print(configuration_table(planned.space, planned.states, planned.outlooks))
    if planned.trials_left == 0:
        console.print("Nothing is left to train.")
        return 0
    for line in plan_lines(loaded, planned.slots, planned.estimate, planned.device_seconds):
        console.print(line)
    if planned.spent:
        console.print(f"No trial starts: {planned.spent}.", style="yellow", soft_wrap=True)
    if planned.estimate is not None:
        console.print(speed_table(planned.estimate, loaded))
    else:
        console.print("No estimate: only steps of hpo.train:train can be measured, on the machine that has the device.")
    return 0


@cli.command()
@click.argument("study")
@storage_option
def report(study: str, storage: str) -> int:
    """Print the table of a study, and write its report.

    The report is runs/reports/STUDY/index.html, and report.md with the figures as PNG.

    \b
    Example:  hpo report grid
    """
    from hpo.api import read_results, write_report

    console, results = new_console(), read_results(study, storage=storage, password=secret("PGPASSWORD"))
    print_results(console, results)
    print_report(console, write_report(results))
    return 0


@cli.command("list")
@storage_option
@checkpoints_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(storage: str, checkpoints: str | None, as_json: bool) -> int:
    """List the studies of a database.

    It shows the state of each study, its number of trials, its best value, and the size of its checkpoints and logs
    in runs/checkpoints.

    A study is finished when all trials of its grid or of budget.trials have ended. One that another limit of the budget
    ended, such as time, patience or gpu_hours, is resumable: with a larger limit, `hpo run` resumes it.

    \b
    Example:  hpo list --json
    """
    from hpo.api import list_studies

    summaries = list_studies(storage=storage, password=secret("PGPASSWORD"), checkpoints=checkpoints)
    if as_json:
        print(json.dumps([vars(summary) for summary in summaries], indent=2))
    elif summaries:
        from hpo.report.tables import study_table

        new_console().print(study_table(summaries))
    else:
        from storage.urls import without_password

        say(f"{without_password(storage)} has no studies yet; `hpo run SPACE` creates one")
    return 0


@cli.command()
@click.argument("study")
@click.argument("numbers", nargs=-1, type=int, metavar="[NUMBER]...")
@click.option("--resume", is_flag=True, help="Resume from the last checkpoints instead of the first epoch.")
@storage_option
def retry(study: str, numbers: Sequence[int], resume: bool, storage: str) -> int:
    """Let failed trials run again, after you fixed the cause.

    Without a NUMBER, all failed trials of the study. They restart from the first epoch when `hpo run` is started
    again, or at once if it is still running.

    \b
    Example:  hpo retry grid 1 4
    """
    from hpo.api import retry_trials

    chosen = retry_trials(study, numbers, resume=resume, storage=storage, password=secret("PGPASSWORD"))
    if chosen:
        listed = ", ".join(map(str, chosen))
        say(f"{study}: waiting to run again: {listed}. The command that started the search runs them")
    else:
        say(f"{study}: no trial has failed")
    return 0


@cli.command()
@click.argument("study")
@click.argument("number", type=int)
@click.option("--yes", is_flag=True, help="Run the command or the trainable that the database names.")
@storage_option
@data_option
def replay(study: str, number: int, yes: bool, storage: str, data_dir: Path) -> int:
    """Train a trial again, and compare its metrics.

    The exit code is 0 if all metrics are equal to the last digit, else 1. Speeds are not compared. On a GPU, differences in
    the last digits are expected.

    Code that the database alone names, a command or a trainable that is not part of hpo, is run with --yes only.

    \b
    Example:  hpo replay grid 0
    """
    from hpo.api import replay_trial

    password = secret("PGPASSWORD")
    is_equal = replay_trial(
        study, number, storage=storage, password=password, data_dir=data_dir, show=say, run_stored_code=yes
    )
    return 0 if is_equal else 1


@cli.command()
@click.argument("study")
@click.option(
    "--trial", type=int, metavar="NUMBER", help="The trial; by default, the best one. Needed with several objectives."
)
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="By default, runs/exports/STUDY-NUMBER.")
@storage_option
@checkpoints_option
@data_option
def export(
    study: str, trial: int | None, output: Path | None, storage: str, checkpoints: str | None, data_dir: Path
) -> int:
    """Write the best model as files that load without hpo.

    The files are a torch.export program, safetensors, a script that classifies an image, and a model card.

    \b
    Example:  hpo export grid --trial 1
    """
    from hpo.api import export_model

    password = secret("PGPASSWORD")
    try:
        exported = export_model(
            study, trial, storage=storage, password=password, data_dir=data_dir, checkpoints=checkpoints, output=output
        )
    except TrainedElsewhereError as error:
        words = [error.study, "--trial", str(error.trial), *given_option("--data-dir")]
        command = hint("export", *words, storage=storage, other=error.storage)
        raise SettingError(f"{error}. This exports it: {command}") from None
    for remark in exported.remarks:
        say(f"note: {remark}")
    folder = exported.folder
    say(f"{folder}: README.md describes it; python {shlex.quote(str(folder / 'classify.py'))} IMAGE runs it")
    return 0


@cli.command()
@storage_option
def migrate(storage: str) -> int:
    """Create the tables of a database, or migrate those of an older version.

    `hpo run` and `hpo dashboard` do so, too. This is for databases where they run as users who may not.

    \b
    Example:  hpo migrate --storage postgresql://hpo_owner@database/hpo
    """
    from hpo.api import migrate_database
    from storage.urls import without_password

    migrate_database(storage=storage, password=secret("PGPASSWORD"))
    say(f"{without_password(storage)} is ready")
    return 0


@cli.command()
@storage_option
@checkpoints_option
@click.option("--yes", is_flag=True, help="Delete the files.")
def clean(storage: str, checkpoints: str | None, yes: bool) -> int:
    """List files that no search needs, or delete them.

    In runs/, these are checkpoints that `checkpoints.keep` of the search space does not keep, files and artifacts of deleted
    studies, damaged checkpoints, and what killed processes left.

    Reports, exports, copies of the database (hpo.db.version-N), the files of a study that is running, and those of
    studies that the database does not know are kept. So are those of a deleted study that another database has, if
    that database is in runs/, next to this one, or has trained trials there. Other copies are not seen. Kept, too, are
    trials of a deleted study that unfinished or failed trials of other studies continue.

    \b
    Example:  hpo clean --yes
    """
    from hpo.api import clean_runs
    from hpo.report.formatting import format_bytes
    from storage.urls import without_password

    cleaning = clean_runs(storage=storage, password=secret("PGPASSWORD"), checkpoints=checkpoints, delete=yes)
    for each in cleaning.garbage:
        say(f"{format_bytes(each.disk_bytes):>8}  {each.folder}: {each.what}")
    for folder, size in cleaning.unknown.items():
        say(f"kept: {folder} ({format_bytes(size)}), which is of no study in {without_password(storage)}")
    for folder, other in cleaning.shared.items():
        say(f"kept: {folder}, of a study that was deleted here, but that {other} has, or may have")
    for folder, name in cleaning.continued.items():
        say(f"kept: {folder}, of a study that was deleted, but from which a trial of {name} may still start")
    for name in cleaning.running:
        say(f"kept: the files of {name}, which is running")
    for problem in cleaning.problems:
        say(f"hpo: {problem}", to=sys.stderr)
    total = format_bytes(cleaning.disk_bytes)
    if not cleaning.garbage:
        say("Nothing to delete.")
    else:
        say(f"Freed {total}." if yes else f"{total} can be freed: {hint('clean', '--yes', storage=storage)}")
    return 2 if cleaning.problems else 0


@cli.command()
@storage_option
@checkpoints_option
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=int, default=8080, show_default=True, help="The port to listen on; 0 takes a free one.")
@click.option("--read-only", is_flag=True, help="Refuse all changes.")
@click.option(
    "--certfile", type=click.Path(path_type=Path), metavar="FILE", help="Serve HTTPS with this PEM certificate."
)
@click.option("--keyfile", type=click.Path(path_type=Path), metavar="FILE", help="Its key, if it is in another file.")
def dashboard(
    storage: str,
    checkpoints: str | None,
    host: str,
    port: int,
    read_only: bool,
    certfile: Path | None,
    keyfile: Path | None,
) -> int:
    """Serve optuna-dashboard until Ctrl-C.

    Open the link that it prints: it contains a token, which a cookie then remembers. With a password in the environment
    variable HPO_DASHBOARD_PASSWORD, browsers ask for it instead, with any user name. An address that other machines
    reach needs one. Who has the password in HPO_DASHBOARD_READER_PASSWORD may look, and change nothing.

    \b
    Example:  hpo dashboard --port 8081
    """
    from hpo.api import serve_dashboard

    if keyfile is not None and certfile is None:
        raise SettingError("--keyfile is the key of a certificate: give --certfile, too")
    serve_dashboard(
        storage=storage,
        password=secret("PGPASSWORD"),
        checkpoints=checkpoints,
        host=host,
        port=port,
        dashboard_password=secret("HPO_DASHBOARD_PASSWORD"),
        reader_password=secret("HPO_DASHBOARD_READER_PASSWORD"),
        read_only=read_only,
        certfile=certfile,
        keyfile=keyfile,
    )
    return 0


for verb in (study_verbs.compare, study_verbs.copy, study_verbs.rename, study_verbs.delete):
    cli.add_command(verb)


@cli.command()
def schema() -> int:
    """Print the JSON Schema of search spaces, for editors.

    \b
    Example:  hpo schema > schema.json
    """
    from hpo.space.model import space_schema

    print(json.dumps(space_schema(), indent=2))
    return 0


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print a completion script for a shell.

    It completes verbs, options and the names of search spaces. Load it in the file that your shell reads at start.

    \b
    Examples:  eval "$(hpo completion bash)"
               eval "$(hpo completion zsh)"
               hpo completion fish | source
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(cli, {}, "hpo", COMPLETE_VARIABLE).source())
    return 0


if __name__ == "__main__":
    main(["run"])
