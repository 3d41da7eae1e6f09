"""The report of a study: what is read, the tables, the figures, the page in a real browser."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from playwright.sync_api import Browser
from rich.console import Console

from benchmarks.report import fill
from hpo import figures, run
from hpo.report import failures, report_folder, trial_table, write_report
from hpo.report.results import Results, match_published, read_published, read_results
from storage.database import Database, StorageError, open_database
from storage.run import Run
from storage.studies import DUPLICATE, Study, find_study, open_study

GRID = {
    "sampler": {"name": "grid"},
    "trainable": "hpo.train:train",
    "metric": "val_accuracy",
    "max_epochs": 4,
    "data": {"dataset": "fashion_mnist", "train_samples": None, "val_samples": 5000},
    "seed": 0,
}
CHOICES = {"batch_size": CategoricalDistribution([64, 256, 512, 1024]), "lr": CategoricalDistribution([0.01])}
EVIL = "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>|*a*"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_database(f"sqlite:///{tmp_path}/hpo.db") as opened:
        yield opened


def epoch_metrics(params: Mapping[str, Any], epoch: int) -> dict[str, float]:
    worth = 1.0 / params["batch_size"] + epoch / 10
    return {
        "train_loss": 1 / worth,
        "train_accuracy": 0.5 + worth / 4,
        "val_loss": 1.1 / worth,
        "val_accuracy": 0.4 + worth / 4,
        "train_seconds": 2.0,
        "epoch_seconds": 2.5,
        "images_per_second": 1000.0,
    }


def train_grid(database: Database, settings: Mapping[str, Any] = GRID, gpu: float = 1.0) -> Study:
    """A search over batch sizes, finished, as a run leaves it."""
    study = open_study(database, "grid", direction="maximize", fingerprint="f", settings=settings)
    with Run(study, config_key=repr, provenance={"command": "hpo run grid", "packages": {"torch": "2"}}) as driver:
        driver.enqueue([{"batch_size": size, "lr": 0.01} for size in (64, 256, 512)], CHOICES)
        while claim := driver.claim():
            driver.record(claim, {}, {"device": "cuda", "device_name": "a GPU", "gpu": gpu})
            for epoch in range(1, settings["max_epochs"] + 1):
                metrics = epoch_metrics(claim.params, epoch)
                if epoch == settings["max_epochs"]:
                    metrics |= {"test_accuracy": metrics["val_accuracy"] - 0.01, "test_loss": 1.0}
                driver.report(claim, epoch, metrics, metrics["val_accuracy"])
            driver.complete(claim, metrics["val_accuracy"])
    return study


def add(study: optuna.Study, state: str, values: list[float] | None = None, **options: Any) -> None:
    """Add a trial through Optuna, past everything of ours."""
    params = options.pop("params", {"x": len(study.trials) / 10, "kind": "ab"[len(study.trials) % 2]})
    distributions = {
        name: FloatDistribution(0, 100) if isinstance(value, float) else CategoricalDistribution(["a", "b", EVIL])
        for name, value in params.items()
    }
    study.add_trial(
        create_trial(state=TrialState[state], values=values, params=params, distributions=distributions, **options)
    )


def plain(database: Database, name: str = "plain", directions: tuple[str, ...] = ("minimize",)) -> optuna.Study:
    return optuna.create_study(study_name=name, storage=database.optuna_storage, directions=list(directions))


def read(database: Database, name: str) -> Results:
    study = find_study(database, name)
    assert study is not None
    return read_results(study)


def written(results: Results, folder: Path) -> tuple[str, str]:
    """The page without the library in it, and the Markdown file."""
    page = write_report(results, folder)
    text = page.read_text()
    assert "plotly.js v" in text
    library = max(re.findall(r"<script>(.*?)</script>", text, re.DOTALL), key=len)
    return text.replace(library, ""), (page.parent / "report.md").read_text()


# --- what is read -------------------------------------------------------------------------------------------------


def test_the_results_of_a_grid(database: Database) -> None:
    results = read_results(train_grid(database))
    assert results.objectives == [("val_accuracy", True)]
    assert results.varying == ["batch_size"]
    assert [trial.params["batch_size"] for trial in results.ranked] == [64, 256, 512]
    assert results.best is results.ranked[0]
    assert results.label(results.ranked[1]) == "#1 batch_size 256"
    assert results.curve_families == {
        "accuracy": ["val_accuracy", "train_accuracy"],
        "loss": ["val_loss", "train_loss"],
    }
    first = results.trials[0]
    assert first.curve("val_loss")[0] == [1, 2, 3, 4]
    assert first.last["test_accuracy"] == first.last["val_accuracy"] - 0.01
    assert first.seconds == 4 * 2.5
    assert first.images == 4 * 2.0 * 1000
    assert results.gpu_hours == pytest.approx(3 * 10 / 3600)
    assert results.devices == {"a GPU": 3}


def test_a_shared_gpu_costs_its_share(database: Database) -> None:
    results = read_results(train_grid(database, gpu=0.25))
    assert results.gpu_hours == pytest.approx(3 * 10 / 3600 / 4)


def test_a_pruned_trial_is_never_before_a_completed_one_and_nan_is_last(database: Database) -> None:
    study = plain(database, directions=("maximize",))
    add(study, "PRUNED", intermediate_values={1: 0.99})
    add(study, "COMPLETE", [0.2])
    add(study, "FAIL")
    add(study, "COMPLETE", [0.7])
    assert [trial.number for trial in read(database, "plain").ranked] == [3, 1, 0, 2]


def test_what_was_never_run_is_no_trial_of_the_report(database: Database) -> None:
    study = train_grid(database)
    study.optuna_study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"fail_reason": DUPLICATE}))
    results = read_results(study)
    assert results.counts == {"COMPLETE": 3}


def test_the_end_of_a_run_reads_storage_once(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = train_grid(database)
    monkeypatch.chdir(tmp_path)
    calls: list[str] = []

    def counted(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(name), real(*a, **k))[1])

    counted(Study, "trials")
    counted(records, "read_metrics")
    counted(records, "read_provenances")
    counted(records, "read_runs")
    arguments = argparse.Namespace(storage=run.DEFAULT_STORAGE)
    assert run._conclude(Console(file=io.StringIO(), width=140), study, arguments) == 0
    assert sorted(calls) == ["read_metrics", "read_provenances", "read_runs", "trials"]


# --- the published numbers ----------------------------------------------------------------------------------------


def test_the_published_numbers_are_the_documented_ones() -> None:
    published = read_published()
    found = {key: (round(trial.test_accuracy, 4), round(trial.seconds)) for key, trial in published.items()}
    assert found == {(64, 0.01): (0.9231, 1719), (256, 0.01): (0.9090, 1129), (512, 0.01): (0.9147, 1083)}
    for trial in published.values():
        assert list(trial.epochs) == list(range(1, 51))
        assert 0.7 < trial.epochs[1]["train_accuracy"] < trial.epochs[50]["train_accuracy"] < 1


def test_the_documented_grid_stands_beside_the_published_numbers(database: Database, tmp_path: Path) -> None:
    page, markdown = written(read_results(train_grid(database)), tmp_path)
    theirs = read_published()[(512, 0.01)].epochs[4]
    for text in (page, markdown):
        assert "Beside the published numbers" in text
        assert f"{theirs['train_loss']:.4f}" in text
        assert f"{theirs['train_accuracy']:.4f}" in text
        assert "0.9147" not in text, "the published test accuracy is that after 50 epochs, not after 4"
    assert page.count('"name":"published"') == 2 * 3


def test_after_all_50_epochs_test_accuracy_and_seconds_stand_beside_too(database: Database, tmp_path: Path) -> None:
    page, markdown = written(read_results(train_grid(database, {**GRID, "max_epochs": 50})), tmp_path)
    for text in (page, markdown):
        assert {"0.9231", "0.9090", "0.9147", "1719", "1129", "1083"} <= set(re.findall(r"[\d.]+", text))


@pytest.mark.parametrize(
    "settings",
    [
        {**GRID, "data": {**GRID["data"], "dataset": "fashion_mnist_sample"}},  # type: ignore[dict-item]
        {**GRID, "data": {**GRID["data"], "train_samples": 2048}},  # type: ignore[dict-item]
        {**GRID, "trainable": "mine:train"},
    ],
)
def test_another_search_does_not(database: Database, settings: dict[str, Any]) -> None:
    assert match_published(read_results(train_grid(database, settings))) == {}


def test_other_parameters_do_not_either(database: Database, tmp_path: Path) -> None:
    study = train_grid(database)
    params = {"batch_size": 64, "lr": 0.01, "optimizer": "sgd"}
    distributions = CHOICES | {"optimizer": CategoricalDistribution(["sgd"])}
    study.optuna_study.add_trial(create_trial(state=TrialState.FAIL, params=params, distributions=distributions))
    results = read_results(study)
    assert match_published(results) == {}
    page, markdown = written(results, tmp_path)
    assert "published" not in (page + markdown).lower()


# --- the files ----------------------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_the_markdown_names_figures_that_are_there(
    database: Database, tmp_path: Path
) -> None:
    results = read_results(train_grid(database))
    page, markdown = written(results, tmp_path / "reports")
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)[^"']""", page)
    assert "//cdn" not in page
    folder = tmp_path / "reports/grid"
    images = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert images == ["accuracy.png", "loss.png", "parallel_coordinates.png"]
    for image in images:
        assert (folder / image).read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in folder.iterdir()) == sorted([*images, "index.html", "report.md"])
    for text in (page, markdown):
        for said in ("hpo run grid", "hpo replay grid NUMBER", "torch 2", "GPU-hours", "24,000", "a GPU"):
            assert said in text
        assert "needs 20 completed trials" in text, "importances of three trials mean nothing"


def test_a_second_report_takes_the_place_of_the_first(database: Database, tmp_path: Path) -> None:
    study = train_grid(database)
    first = write_report(read_results(study), tmp_path)
    add(study.optuna_study, "FAIL", user_attrs={"fail_reason": "a new reason"})
    assert write_report(read_results(study), tmp_path) == first
    assert "a new reason" in first.read_text()
    assert not [file for file in first.parent.iterdir() if file.suffix not in {".html", ".md", ".png"}]


@pytest.mark.parametrize("name", ["../../etc", "a/b", "..", "", "ä b", "grid@2", ".hidden", "x" * 500])
def test_a_study_of_any_name_gets_a_folder_inside_the_reports(tmp_path: Path, name: str) -> None:
    folder = report_folder(tmp_path, name)
    assert folder.parent == tmp_path
    assert folder.name not in {"", ".", ".."}
    folder.mkdir()


def test_importances_and_parallel_coordinates_where_they_mean_something(database: Database, tmp_path: Path) -> None:
    study = plain(database)
    for i in range(30):
        add(study, "COMPLETE", [i / 30.0])
    page, markdown = written(read(database, "plain"), tmp_path)
    assert "is left out" not in page.replace("<strong>Curves over epochs</strong> is left out", "")
    for name in ("parallel_coordinates", "importances"):
        assert f'id="{name}"' in page
        assert f"({name}.png)" in markdown


def test_several_objectives_have_a_pareto_front(database: Database, tmp_path: Path) -> None:
    study = plain(database, directions=("maximize", "minimize"))
    for accuracy, seconds in ((0.9, 10.0), (0.8, 5.0), (0.7, 7.0)):
        add(study, "COMPLETE", [accuracy, seconds])
    results = read(database, "plain")
    assert results.front == {0, 1}
    assert {trial.number for trial in results.ranked[:2]} == {0, 1}
    page, markdown = written(results, tmp_path)
    assert 'id="pareto_front"' in page
    assert "(pareto_front.png)" in markdown
    front = figures.plot_optuna(results, "plot_pareto_front")
    colours = {trace.marker.color: list(trace.x) for trace in front.data}
    assert colours == {figures.GREY: [0.7], figures.RANKS[-1]: [0.9, 0.8]}
    shown = io.StringIO()
    Console(file=shown, width=140).print(trial_table(results))
    assert "0.7000" in shown.getvalue()
    assert "7.0000" in shown.getvalue()


def test_a_study_without_trials_has_a_report(database: Database, tmp_path: Path) -> None:
    plain(database)
    page, markdown = written(read(database, "plain"), tmp_path)
    for text in (page, markdown):
        assert "No trial has been made yet." in text
        assert "no epoch has been reported yet" in text


def test_trials_in_every_state_with_values_of_every_kind(database: Database, tmp_path: Path) -> None:
    study = plain(database)
    add(study, "COMPLETE", [math.inf], intermediate_values={1: math.nan, 2: math.inf})
    add(study, "COMPLETE", [1e-9], intermediate_values={1: 5.0, 3: 1e-9})
    add(study, "PRUNED", intermediate_values={1: math.nan})
    add(study, "RUNNING", intermediate_values={1: 3.0})
    add(study, "WAITING")
    add(study, "FAIL", intermediate_values={1: -math.inf})
    add(study, "FAIL", params={}, user_attrs={"fail_reason": "its own reason", "traceback": "line 1\nline 2"})
    results = read(database, "plain")
    page, markdown = written(results, tmp_path)
    for text in (page, markdown):
        for said in ("1e-09", "PRUNED", "RUNNING", "WAITING", "its own reason", "for an unknown reason"):
            assert said in text, said
    assert "line 1\nline 2" in page
    for figure in re.findall(r"data-plot=.*?>(.*?)</script>", page):
        json.loads(figure, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    Console(file=io.StringIO(), width=140).print(trial_table(results))


def test_a_search_that_is_still_running_has_a_report(database: Database, tmp_path: Path) -> None:
    study = open_study(database, "grid", direction="maximize", fingerprint="f", settings=GRID)
    with Run(study, config_key=repr, provenance={}) as driver:
        driver.enqueue([{"batch_size": size, "lr": 0.01} for size in (64, 256)], CHOICES)
        claim = driver.claim()
        assert claim is not None
        metrics = epoch_metrics(claim.params, 1)
        driver.report(claim, 1, metrics, metrics["val_accuracy"])
        driver.flush()
        page, _ = written(read_results(study), tmp_path)
    assert 'class="badge running"' in page
    assert f"{metrics['val_accuracy']:.4f}" in page


def test_a_curve_that_went_astray_does_not_press_the_others_flat(database: Database) -> None:
    study = plain(database)
    add(study, "COMPLETE", [1.0], intermediate_values={epoch: 1 / epoch for epoch in range(1, 20)})
    add(study, "COMPLETE", [1e6], intermediate_values={epoch: 10.0**epoch for epoch in range(1, 7)})
    results = read(database, "plain")
    figure = figures.plot_curves(results, ["value"], figures.select_trials(results), {})
    assert figure.layout.yaxis.type == "log"


def test_metrics_and_parameters_of_any_name_are_drawn(database: Database, tmp_path: Path) -> None:
    study = open_study(database, "s", direction="minimize", fingerprint="f", settings={"metric": "published_cost"})
    params = {"kind": "$\\frac$ _x_ %{y} \n {{ 7 * 7 }}"}
    with Run(study, config_key=repr, provenance={}) as driver:
        driver.enqueue([params, {"kind": "b"}], {"kind": CategoricalDistribution([params["kind"], "b"])})
        while claim := driver.claim():
            for epoch in (1, 2):
                metrics = {"published_cost": epoch / 2, "a/b $x$": 1.0 * epoch, "epoch_seconds": 1.0}
                metrics |= {f"metric {sign}": 1.0 for sign in "+-*/?!<>"}
                driver.report(claim, epoch, metrics, metrics["published_cost"])
            driver.complete(claim, 1.0)
    page, markdown = written(read_results(study), tmp_path)
    assert "{{ 7 * 7 }}" in page
    images = re.findall(r"!\[.*\]\((curves_.*)\)", markdown)
    assert len(set(images)) == 8
    assert all((tmp_path / "s" / image).exists() for image in images)
    assert "of 10 metrics, those of 8 are drawn" in page


# --- the end of a run -----------------------------------------------------------------------------------------------


def test_a_report_that_cannot_be_written_never_fails_a_finished_search(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = train_grid(database)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/reports").write_text("a file in its place")
    shown = io.StringIO()
    arguments = argparse.Namespace(storage=run.DEFAULT_STORAGE)
    assert run._conclude(Console(file=shown, width=140), study, arguments) == 0
    assert "No report: cannot write the report to runs/reports/grid" in shown.getvalue()
    assert "Try `python -m hpo.report grid`" in shown.getvalue()
    monkeypatch.setattr("hpo.report.figures.plot_curves", lambda *_: 1 / 0)
    (tmp_path / "runs/reports").unlink()
    assert run._conclude(Console(file=shown, width=140), study, arguments) == 0
    assert "No report: ZeroDivisionError" in shown.getvalue()


# --- hpo list -----------------------------------------------------------------------------------------------------


def listed(capsys: pytest.CaptureFixture[str], url: str, *, json: bool = False) -> str:
    assert run._list(argparse.Namespace(storage=url, password=None, json=json)) == 0
    return capsys.readouterr().out


def test_list_shows_each_study_in_a_line_and_as_json(
    database: Database, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train_grid(database)
    add(plain(database, "theirs [/bold]"), "COMPLETE", [0.25])
    url = f"sqlite:///{tmp_path}/hpo.db"
    text = listed(capsys, url)
    assert re.search(r"grid +finished +3 .* val_accuracy +\d+s ago", text)
    assert re.search(r"theirs \[/bold\] +another program's +1 +0\.2500", text)
    first, second = json.loads(listed(capsys, url, json=True))
    assert (first["name"], first["state"], first["counts"]) == ("grid", "finished", {"COMPLETE": 3})
    assert first["best"] == pytest.approx(0.4 + (1 / 64 + 0.4) / 4)
    assert abs(first["last_activity"] - time.time()) < 60
    assert abs(second["last_activity"] - time.time()) < 60, "Optuna's local time is read as such"


def test_list_of_an_empty_storage_says_so(
    database: Database, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "has no studies yet" in listed(capsys, f"sqlite:///{tmp_path}/hpo.db")
    assert json.loads(listed(capsys, f"sqlite:///{tmp_path}/hpo.db", json=True)) == []


def test_who_only_reads_creates_no_storage(tmp_path: Path) -> None:
    arguments = argparse.Namespace(storage=f"sqlite:///{tmp_path}/no/hpo.db", password=None, json=False, study="grid")
    for verb in (run._list, run._report):
        with pytest.raises(StorageError, match=r"there is no database sqlite:.*hpo run SPACE"):
            verb(arguments)
    assert list(tmp_path.iterdir()) == []


# --- many trials ----------------------------------------------------------------------------------------------------


def test_a_thousand_trials_are_reported_fast_in_a_page_that_opens(
    database: Database, browser: Browser, tmp_path: Path
) -> None:
    """The full size is `python -m benchmarks.report --trials 5000 --epochs 50`."""
    study = fill(database, "large", trials=1000, epochs=50)
    started = time.process_time()
    results = read_results(study)
    page = write_report(results, tmp_path)
    assert time.process_time() - started < 15
    assert page.stat().st_size < 8e6
    selection = figures.select_trials(results)
    assert (len(selection.coloured), len(selection.grey), selection.total) == (10, 90, 1000)
    tab = browser.new_page()
    started = time.monotonic()
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn == 4")
    assert time.monotonic() - started < 30
    lines = failures(results)
    assert len(lines) == 20
    assert len(failures(Results(study, results.objectives, [results.trials[49]] * 60, {}, []))) == 51
    assert "The best 10 of 1,000 trials" in tab.inner_text("main")
    assert "The best 200; 800 more" in tab.inner_text("main")
    tab.close()


# --- in a real browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it: the documented grid, a failed trial, and names that mean harm."""
    folder = tmp_path_factory.mktemp("page")
    with open_database(f"sqlite:///{folder}/hpo.db") as database:
        study = train_grid(database, {**GRID, "description": EVIL})
        study.optuna_study.add_trial(
            create_trial(
                state=TrialState.FAIL,
                params={"batch_size": 1024, "lr": 0.01},
                distributions=CHOICES,
                intermediate_values={1: 0.5},
                user_attrs={"fail_reason": f"ValueError: {EVIL} " + "x" * 300, "traceback": EVIL + "y" * 3000},
            )
        )
        return write_report(read_results(study), folder)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(browser: Browser, page: Path, width: int, scheme: Any) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn == 3")
    # Validation and training of three trials, their published twins' training; the failed trial has one value.
    for figure, curves in (("accuracy", 3 * 3), ("loss", 3 * 3)):
        lines = tab.locator(f"#{figure} .scatterlayer .trace path.js-line")
        assert lines.count() == curves
        for i in range(curves):
            line = lines.nth(i).bounding_box()
            assert line is not None
            assert line["width"] > 0.5 * width / 3, "from the first epoch to the last"
            assert line["height"] > 5
        box = tab.locator(f"#{figure} .plot-container").bounding_box()
        assert box is not None
        assert 250 < box["width"] <= width
        assert box["height"] > 300
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for details in tab.locator("details").all():
        details.evaluate("each => each.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "not with all details open either"
    assert tab.evaluate("window.hacked") is None
    assert EVIL in tab.inner_text("#failed")
    assert EVIL in tab.inner_text("header")
    button = tab.locator("section:has(#accuracy) .legend button").first
    assert button.inner_text() == "#0 batch_size 64"
    button.click()
    tab.wait_for_function("document.querySelectorAll('#accuracy .scatterlayer .trace path.js-line').length == 6")
    assert said == []
    assert asked == [page.as_uri()], "nothing is fetched"
    tab.close()


def test_what_others_have_written_is_text_and_nothing_else(
    database: Database, browser: Browser, tmp_path: Path
) -> None:
    study = plain(database, name=EVIL)
    for i in range(12):
        params = {EVIL: float(i), "kind": EVIL if i % 2 else "a"}
        add(study, "COMPLETE", [i / 9], params=params, intermediate_values={1: 0.1, 2: i / 9})
    page = write_report(read(database, EVIL), tmp_path)
    tab = browser.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn == 2")
    tab.locator("#curves_value .js-line").first.hover(force=True)
    for place in ("h1", "#trials", ".legend", "#parallel_coordinates"):
        assert "window.hacked=1" in tab.locator(place).first.text_content()
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img, .legend script, #trials script").count() == 0
    assert said == []
    tab.close()
    markdown = (page.parent / "report.md").read_text()
    assert "<script>" not in markdown.replace("\\<script\\>", "")


def test_a_resized_window_is_filled_again(browser: Browser, page: Path) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn == 3")
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.wait_for_function("document.querySelector('#accuracy .main-svg').getBoundingClientRect().width < 390")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.close()
