"""The command line: settings from flags and environment, exit codes. Nothing else reads the environment.

Exit codes: 0 finished; 1 finished, but no trial completed; 2 the user must change something; 130 stopped, resumable.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hpo.errors import HpoError, SettingError, TrainableError

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.plan import Plan, Slots
    from hpo.results import Results
    from hpo.search import Outcome
    from hpo.space import Space
    from storage.studies import Study

RUNS_DIR = Path("runs")
DEFAULT_STORAGE = f"sqlite:///{RUNS_DIR}/hpo.db"
PACKAGES = ("torch", "torchvision", "optuna", "sqlalchemy", "ray", "numpy")
LONG_SECONDS = 900.0  # a search on the CPU beyond this gets the advice to start with a shorter one


def main(prefix: Sequence[str] = ()) -> NoReturn:
    """Run a verb of the command line and exit.

    Args:
        prefix: put before the arguments, so that `python -m hpo.report STUDY` is `hpo report STUDY`.
    """
    # As with `python -m`: a trainable of the user's own is looked for in the folder that the command runs in.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    words = [*prefix, *sys.argv[1:]]
    arguments = _parser().parse_args(words)
    arguments.typed = shlex.join(["hpo", *words])
    _hide_password(arguments.storage)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        sys.exit(command(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, HpoError) or _is_storage_error(error):
            print(f"hpo: {error}", file=sys.stderr)
            sys.exit(2)
        raise


def _hide_password(url: str) -> None:
    """Start again with the storage URL in the environment, if it stands on the command line and holds a password.

    The command line is for everyone to read: `ps` shows it, and Ray keeps it as the name of its job.
    """
    given = [i for i, argument in enumerate(sys.orig_argv) if url in argument]
    if not given or "@" not in url or ":" not in url.partition("://")[2].partition("@")[0]:
        return
    place = given[0]
    start = place if sys.orig_argv[place].startswith("--storage=") else place - 1
    rest = [*sys.orig_argv[1:start], *sys.orig_argv[place + 1 :]]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *rest], os.environ | {"HPO_STORAGE": url})


def _is_storage_error(error: Exception) -> bool:
    # The command line starts in a moment because it imports the database late: if it never did, it is no such error.
    module = sys.modules.get("storage.database")
    return module is not None and isinstance(error, module.StorageError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hpo", description="Hyperparameter search: Ray Tune trials, Optuna storage.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    storage = argparse.ArgumentParser(add_help=False)
    # Taken out of the environment: Ray's processes, which inherit it, have no use for passwords.
    dashboard_password = os.environ.pop("HPO_DASHBOARD_PASSWORD", None)
    storage.set_defaults(password=os.environ.pop("PGPASSWORD", None))
    storage.add_argument(
        "--storage",
        default=os.environ.pop("HPO_STORAGE", DEFAULT_STORAGE),
        metavar="URL",
        help=f"an SQLAlchemy URL (HPO_STORAGE, else {DEFAULT_STORAGE})",
    )
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "--data-dir",
        default=os.environ.get("HPO_DATA_DIR", "data"),
        metavar="DIR",
        help="where the data sets lie or are downloaded to (HPO_DATA_DIR, else data)",
    )

    space = argparse.ArgumentParser(add_help=False)
    space.add_argument("space", metavar="SPACE", help="a file name in search_spaces/ without its ending, or a path")
    space.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key, for example max_epochs=1 or parameters.lr=0.02; may be repeated",
    )
    run = verbs.add_parser("run", parents=[space, storage, data], help="run a search, or go on with it")
    run.add_argument("--plan", action="store_true", help="only tell what it would take, as `hpo plan`")
    run.set_defaults(command=_run)

    plan = verbs.add_parser("plan", parents=[space, storage, data], help="tell what a search will take")
    plan.set_defaults(command=_plan)

    report = verbs.add_parser("report", parents=[storage], help="show a study: table, page, figures")
    report.add_argument("study", metavar="STUDY")
    report.set_defaults(command=_report)

    studies = verbs.add_parser("list", parents=[storage], help="show the studies of a storage")
    studies.add_argument("--json", action="store_true", help="for scripts")
    studies.set_defaults(command=_list)

    replay = verbs.add_parser("replay", parents=[storage, data], help="run a trial again and compare its metrics")
    replay.add_argument("study", metavar="STUDY")
    replay.add_argument("number", metavar="NUMBER", type=int)
    replay.set_defaults(command=_replay)

    schema = verbs.add_parser("schema", help="print the JSON Schema of search spaces, for editors")
    schema.set_defaults(command=_schema, storage="")

    export = verbs.add_parser("export", parents=[storage, data], help="write the best model as files that need no hpo")
    export.add_argument("study", metavar="STUDY")
    export.add_argument("--trial", type=int, metavar="NUMBER", help="of the study; the best one by default")
    export.add_argument("--output", type=Path, metavar="DIR", help=f"{RUNS_DIR}/exports/STUDY-NUMBER by default")
    export.set_defaults(command=_export)

    dashboard = verbs.add_parser("dashboard", parents=[storage], help="serve optuna-dashboard on the storage")
    dashboard.add_argument(
        "--host", default="127.0.0.1", help="127.0.0.1; any other address needs a password in HPO_DASHBOARD_PASSWORD"
    )
    dashboard.add_argument("--port", type=int, default=8080)
    dashboard.set_defaults(command=_dashboard, dashboard_password=dashboard_password)
    return parser


# --- hpo run --------------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    from hpo.space import load_space

    if arguments.plan:
        return _plan(arguments)
    space = load_space(arguments.space, arguments.overrides)  # before the slow imports: a typing mistake shows at once

    from storage.database import open_database
    from storage.studies import find_revision, open_study

    console = _console()
    runs_dir, data_dir = _make_runs_dir(), Path(arguments.data_dir).resolve()
    database = open_database(arguments.storage, arguments.password)
    study = find_revision(database, space.name, space.fingerprint)
    total = _total_trials(space)
    if study is not None and _trials_left(study, total) == 0:
        _announce(console, space, study)
        console.print("Nothing is left to do.")
        return _conclude(console, study, arguments)
    provenance = {"command": arguments.typed} | _provenance() | _check_trainable(space, data_dir)
    study = open_study(database, **space.study_options)
    _announce(console, space, study)

    from hpo import search
    from hpo.progress import Progress

    left = _trials_left(study, total)
    with search.cluster(os.environ.get("RAY_ADDRESS")):
        slots, plan = _share(console, space, left, data_dir, search.cluster_size())
        _announce_plan(console, space, slots, plan)
        with Progress(
            console,
            metric=space.metric,
            direction=space.direction,
            total=total,
            slots=slots.count,
            before=study.counts(),
        ) as view:
            logging.getLogger("hpo").addHandler(_Notes(view.note))
            outcome = search.search(
                space,
                study,
                slots,
                provenance=provenance,
                data_dir=data_dir,
                checkpoints=runs_dir / "checkpoints",
                view=view,
            )
    from hpo.dashboard import publish

    publish(study, runs_dir, always=True)
    return _conclude(console, study, arguments, outcome)


def _plan(arguments: argparse.Namespace) -> int:
    """Tell what a search will take, and what storage has of it already; nothing is written."""
    from hpo.space import load_space

    space, data_dir = load_space(arguments.space, arguments.overrides), Path(arguments.data_dir).resolve()

    from hpo import plan
    from storage.database import StorageError, open_database
    from storage.studies import find_revision

    console, total, study = _console(), _total_trials(space), None
    _check_trainable(space, data_dir)
    with suppress(StorageError):  # none there yet: nothing is stored, and a plan makes no database
        database = open_database(arguments.storage, arguments.password, create=False)
        study = find_revision(database, space.name, space.fingerprint)
    console.print(f"[bold]{space.name}[/]: {space.description or space.trainable}")
    console.print(plan.configurations(space, total, study))
    left = total if study is None else _trials_left(study, total)
    slots, measured = _share(console, space, left, data_dir, plan.machine_size())
    _announce_plan(console, space, slots, measured)
    if measured is not None:
        console.print(plan.speed_table(measured, space))
    elif left:
        console.print("No estimate: only steps of hpo.train:train can be measured, on the machine that has the device.")
    return 0


class _Notes(logging.Handler):
    """Shows the warnings of our own loggers in the view."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record.getMessage())


def _make_runs_dir() -> Path:
    try:
        RUNS_DIR.mkdir(exist_ok=True)
        probe = RUNS_DIR / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingError(
            f"cannot write to {RUNS_DIR.resolve()}: {error.strerror}. Everything a run writes lies there: make it a "
            "writable folder, or start from another one"
        ) from None
    return RUNS_DIR.resolve()


def _trials_left(study: Study, total: int | None) -> int | None:
    """Return how many of `total` trials have not ended; None where there is no end to count to."""
    return None if total is None else max(0, total - study.count_ended())


def _check_trainable(space: Space, data_dir: Path) -> dict[str, Any]:
    """Fail before anything is spent; for our own trainable fetch the data, and return its hash."""
    from hpo.command import check_program
    from hpo.space import load_trainable

    if space.command is not None:
        with space.blaming("command"):
            check_program(space.command)
        return {}
    with space.blaming("trainable"):
        load_trainable(space.trainable)
    if not space.is_default_trainable:
        return {}
    from hpo import train
    from hpo.data import load

    mistakes: dict[str, None] = {}
    for name, value in space.examples():
        try:
            with space.blaming("derived" if name in space.derived else "parameters", name):
                train.read_params({name: value})
        except TrainableError as error:
            mistakes[str(error)] = None
    if mistakes:
        raise TrainableError("\n".join(mistakes))
    return {"data_sha256": load(**_data_settings(space, data_dir)).sha256}


def _data_settings(space: Space, data_dir: Path) -> dict[str, Any]:
    return {**space.data.model_dump(), "data_dir": str(data_dir)}


def _total_trials(space: Space) -> int | None:
    if space.sampler.name != "grid":
        return space.budget.trials
    points = sum(1 for _ in space.grid())
    return points if space.budget.trials is None else min(points, space.budget.trials)


def _announce(console: Console, space: Space, study: Study) -> None:
    console.print(
        f"[bold]{study.name}[/]: {space.description or space.command or space.trainable}. Storage: {study.database.url}"
    )
    if study.name != space.name:
        console.print(f"The space is not the one of study {space.name}: its results go to the revision {study.name}.")
    states = ", ".join(f"{n} {state}" for state, n in sorted(study.counts().items()))
    if states:
        console.print(f"Going on with what storage holds: {states}.")


def _share(
    console: Console, space: Space, left: int | None, data_dir: Path, size: tuple[float, float]
) -> tuple[Slots, Plan | None]:
    """Divide (cores, GPUs) among trials; by measuring, where the trainable is ours and the device is here."""
    from hpo.plan import can_measure, measure_plan, plan_slots

    slots = plan_slots(space, left, *size)
    if left == 0 or not space.is_default_trainable or not can_measure(slots):
        return slots, None
    with console.status("measuring some training steps") if console.is_terminal else nullcontext():
        plan = measure_plan(space, slots, left, _data_settings(space, data_dir), size)
    return plan.slots, plan


def _announce_plan(console: Console, space: Space, slots: Slots, plan: Plan | None) -> None:
    from hpo.plan import describe_slots, describe_time

    console.print(describe_slots(slots, plan))
    if plan is None:
        return
    console.print(describe_time(plan))
    if slots.device == "cpu" and plan.seconds > LONG_SECONDS:
        console.print(
            "Shorter: `python -m hpo.run quick` (a small sample, about a minute), or\n"
            f"  python -m hpo.run {space.name} --set max_epochs=2 --set data.train_samples=2048"
        )


def _provenance() -> dict[str, Any]:
    """Return what is needed, beside a trial's own settings, to run it again."""
    code = metadata.version("hpo")
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "code": f"{code}+{described}" if described else code,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.node(),
    }


def _conclude(console: Console, study: Study, arguments: argparse.Namespace, outcome: Outcome | None = None) -> int:
    from hpo.results import read_results

    results = read_results(study)
    _print_results(console, results)
    if outcome is not None and outcome.stopped:
        remedy = "The same command" if outcome.interrupted else "With a larger budget.time, the same command"
        console.print(f"Stopped: {outcome.stopped}. {remedy} goes on where it stopped.", style="yellow")
    option = "" if arguments.storage == DEFAULT_STORAGE else " --storage URL"
    again = f"python -m hpo.report {shlex.quote(study.name)}{option}"
    try:
        _write_report(console, results)
    except Exception as error:  # noqa: BLE001 # the search is done: whatever keeps a page from being drawn is a remark
        reason = str(error) if isinstance(error, HpoError) else f"{type(error).__name__}: {error}"
        console.print(f"No report: {reason}. Try `{again}`", style="yellow", soft_wrap=True, markup=False)
    console.print(f"Watch it: python -m hpo.dashboard{option}    Again: {again}", markup=False)
    if outcome is not None and outcome.interrupted:
        return 130
    return 0 if results.counts["COMPLETE"] else 1


def _print_results(console: Console, results: Results) -> None:
    from hpo.report import failures, trial_table

    console.print(trial_table(results))
    for line in failures(results):
        console.print(line, style="red", soft_wrap=True, markup=False)


def _write_report(console: Console, results: Results) -> None:
    from hpo.report import write_report

    page = write_report(results, RUNS_DIR / "reports")
    console.print(f"Report: {page}  (report.md beside it has the same figures as PNG)", soft_wrap=True, markup=False)


def _console() -> Console:
    from rich.console import Console

    # A log file has no width of its own; 80 columns would fold the table.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


# --- the other verbs ------------------------------------------------------------------------------------------------


def _report(arguments: argparse.Namespace) -> int:
    from hpo.results import read_results

    console, results = _console(), read_results(_existing_study(arguments))
    _print_results(console, results)
    _write_report(console, results)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from hpo.report import study_table
    from storage.database import open_database
    from storage.studies import summarize

    with open_database(arguments.storage, arguments.password, create=False) as database:
        summaries = summarize(database)
        if arguments.json:
            print(json.dumps([vars(summary) for summary in summaries], indent=2))
        elif summaries:
            _console().print(study_table(summaries))
        else:
            print(f"{database.url} has no studies yet; `hpo run SPACE` makes one")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    """Run a trial again and compare; 0 if every metric is equal to the last digit, else 1."""
    from hpo.replay import replay

    study, data_dir = _existing_study(arguments), Path(arguments.data_dir).resolve()
    return 0 if replay(study, arguments.number, _console(), data_dir=data_dir, now=_provenance()) else 1


def _existing_study(arguments: argparse.Namespace) -> Study:
    from hpo.errors import nearest
    from storage.database import open_database
    from storage.studies import find_study, study_names

    database = open_database(arguments.storage, arguments.password, create=False)
    study = find_study(database, arguments.study)
    if study is None:
        names = study_names(database)
        hint = nearest(arguments.study, names) if names else "it has none yet"
        raise SettingError(f"there is no study {arguments.study!r} in {database.url}: {hint}")
    return study


def _schema(arguments: argparse.Namespace) -> int:
    import json

    from hpo.space import space_schema

    print(json.dumps(space_schema(), indent=2))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    study = _existing_study(arguments)
    from hpo.export import export

    folder, remarks = export(
        study,
        arguments.trial,
        runs_dir=RUNS_DIR.resolve(),
        data_dir=Path(arguments.data_dir).resolve(),
        output=arguments.output,
        versions=_provenance(),
    )
    for remark in remarks:
        print(f"note: {remark}")
    print(f"{folder}: README.md says what it is; python {shlex.quote(str(folder / 'classify.py'))} IMAGE runs it")
    return 0


def _dashboard(arguments: argparse.Namespace) -> int:
    from hpo.dashboard import serve
    from storage.database import open_database

    database = open_database(arguments.storage, arguments.password)
    password = arguments.dashboard_password or None
    serve(database, arguments.host, arguments.port, password=password, runs_dir=_make_runs_dir())
    return 0


if __name__ == "__main__":
    main(["run"])
