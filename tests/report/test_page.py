"""The report: its files, what they say, and the page in a real browser."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState, create_trial
from playwright.sync_api import Browser

from benchmarks.report import fill
from hpo.paths import RunsDir
from hpo.report.page import write_report
from hpo.report.published import read_published
from hpo.report.reading import read_results
from hpo.report.results import Results
from hpo.search.earlier.warm_start import find_trials, take_over_trials
from hpo.service import try_to_report
from storage.database import Database, open_database
from storage.imports import TakenOver
from storage.optuna_tables import write_attrs
from storage.parents import Parent
from storage.run import Run
from storage.studies import open_study
from tests.factories import RecordingListener
from tests.report.studies import (
    HOSTILE,
    add_trial,
    epoch_metrics,
    finish_grid,
    finish_grid_in,
    grid_space,
    optuna_study,
    read,
)


def written(results: Results, folder: Path) -> tuple[str, str]:
    """Return the page without plotly.js, and the Markdown file."""
    page = write_report(results, RunsDir(folder))
    text = page.read_text()
    assert "plotly.js v" in text
    library = max(re.findall(r"<script nonce=[^>]*>(.*?)</script>", text, re.DOTALL), key=len)
    return text.replace(library, ""), (page.parent / "report.md").read_text()


@pytest.fixture(scope="module")
def grid_report(grid_results: Results, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """The page and the Markdown file of the documented grid after 4 epochs, and their folder."""
    folder = tmp_path_factory.mktemp("report")
    page, markdown = written(grid_results, folder)
    return page, markdown, folder / "reports/grid"


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_the_markdown_has_its_figures(grid_report: tuple[str, str, Path]) -> None:
    page, markdown, folder = grid_report
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)[^"']""", page)
    assert "//cdn" not in page
    images = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert images == ["accuracy.png", "loss.png", "parallel_coordinates.png"]
    for image in images:
        assert (folder / image).read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in folder.iterdir()) == sorted([*images, "index.html", "report.md"])


def test_the_report_says_what_is_needed_to_repeat_the_study(grid_report: tuple[str, str, Path]) -> None:
    page, markdown, _ = grid_report
    for text in (page, markdown):
        for said in ("hpo run grid", "hpo replay grid NUMBER", "torch 2", "GPU-hours", "24,000", "a GPU", "seed"):
            assert said in text
        assert "needs 20 completed trials" in text, "importances of three trials mean nothing"
    assert "batch_size:" in page, "the search space as YAML"


def test_the_documented_grid_is_compared_with_the_published_results(grid_report: tuple[str, str, Path]) -> None:
    page, markdown, _ = grid_report
    theirs = read_published()[(512, 0.01)].epochs[4]
    for text in (page, markdown):
        assert "Compared with the published results" in text
        assert "trains on 55,000 of these images and holds out 5,000 for validation" in text
        assert f"{theirs['train_loss']:.4f}" in text
        assert f"{theirs['train_accuracy']:.4f}" in text
        assert "0.9147" not in text, "the published test accuracy is that after 50 epochs, not after 4"
    assert page.count('"name":"published"') == 2 * 3


@pytest.mark.usefixtures("undrawn_png")
def test_after_50_epochs_test_accuracy_and_seconds_are_compared_too(grid_results: Results, tmp_path: Path) -> None:
    trials = [
        replace(trial, epochs={epoch: epoch_metrics(trial.params, epoch) for epoch in range(1, 51)})
        for trial in grid_results.trials
    ]
    page, markdown = written(replace(grid_results, trials=trials), tmp_path)
    for text in (page, markdown):
        assert {"0.9231", "0.9090", "0.9147", "1719", "1129", "1083"} <= set(re.findall(r"[\d.]+", text))


@pytest.mark.usefixtures("undrawn_png")
def test_a_study_on_all_images_differs_in_nothing_from_the_published_one(grid_results: Results, tmp_path: Path) -> None:
    space = grid_space(data={"val_samples": 0}, metric="train_accuracy")
    assert grid_results.space is not None
    for text in written(replace(grid_results, space=space), tmp_path):
        assert "all 60,000 training images" in text
        assert "holds out" not in text
        assert "of these images" not in text


def test_a_second_report_replaces_the_first(database: Database, tmp_path: Path) -> None:
    study = optuna_study(database)
    first = write_report(read(database), RunsDir(tmp_path))
    add_trial(study, "FAIL", user_attrs={"fail_reason": "a new reason"})
    assert write_report(read(database), RunsDir(tmp_path)) == first
    assert "a new reason" in first.read_text()
    assert {file.suffix for file in first.parent.iterdir()} == {".html", ".md"}


# --- studies of every kind --------------------------------------------------------------------------------------------


def test_a_study_without_trials_has_a_report(database: Database, tmp_path: Path) -> None:
    optuna_study(database)
    for text in written(read(database), tmp_path):
        assert "There are no trials yet." in text
        assert "no epoch has been reported yet" in text
        assert "published" not in text.lower()


def test_trials_in_every_state_with_values_of_every_kind(database: Database, tmp_path: Path) -> None:
    study = optuna_study(database)
    add_trial(study, "COMPLETE", [math.inf], intermediate_values={1: math.nan, 2: math.inf})
    add_trial(study, "COMPLETE", [1e-9], intermediate_values={1: 5.0, 3: 1e-9})
    add_trial(study, "PRUNED", intermediate_values={1: math.nan})
    add_trial(study, "RUNNING", intermediate_values={1: 3.0})
    add_trial(study, "WAITING")
    add_trial(study, "FAIL", intermediate_values={1: -math.inf})
    add_trial(study, "FAIL", params={}, user_attrs={"fail_reason": "its own reason", "traceback": "line 1\nline 2"})
    page, markdown = written(read(database), tmp_path)
    for text in (page, markdown):
        for said in ("1e-09", "PRUNED", "RUNNING", "WAITING", "its own reason", "for an unknown reason"):
            assert said in text, said
    assert "line 1\nline 2" in page
    for figure in re.findall(r"data-plot=.*?>(.*?)</script>", page):
        json.loads(figure, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_several_objectives_have_a_pareto_front(database: Database, tmp_path: Path) -> None:
    study = optuna_study(database, directions=("maximize", "minimize"))
    for accuracy, seconds in ((0.9, 10.0), (0.8, 5.0), (0.7, 7.0)):
        add_trial(study, "COMPLETE", [accuracy, seconds])
    page, markdown = written(read(database), tmp_path)
    assert 'id="pareto_front"' in page
    assert "(pareto_front.png)" in markdown
    assert "on the Pareto front" in page


@pytest.mark.usefixtures("undrawn_png")
def test_a_running_search_has_a_report(database: Database, tmp_path: Path) -> None:
    space = grid_space()
    study = open_study(database, **space.study_options)
    with Run(study, config_key=space.config_key, provenance={}) as run:
        run.enqueue(space.grid_points(), space.distributions())
        claim = run.claim()
        assert claim is not None
        metrics = epoch_metrics(claim.params, 1)
        run.report(claim, 1, metrics, metrics["val_accuracy"])
        run.flush()
        page, _ = written(read_results(study), tmp_path)
    assert 'class="badge running"' in page
    assert f"{metrics['val_accuracy']:.4f}" in page


@pytest.mark.slow  # eight figures
def test_metrics_and_parameters_of_any_name_are_drawn(database: Database, tmp_path: Path) -> None:
    # The settings are not those of a Space, as if another version had written them.
    study = open_study(database, "s", direction="minimize", fingerprint="f", settings={"metric": "published_cost"})
    params = {"kind": "$\\frac$ _x_ %{y} \n {{ 7 * 7 }}"}
    with Run(study, config_key=repr, provenance={}) as run:
        run.enqueue([params, {"kind": "b"}], {"kind": CategoricalDistribution([params["kind"], "b"])})
        while claim := run.claim():
            for epoch in (1, 2):
                metrics = {"published_cost": epoch / 2, "a/b $x$": 1.0 * epoch, "epoch_seconds": 1.0}
                metrics |= {f"metric {sign}": 1.0 for sign in "+-*/?!<>"}
                run.report(claim, epoch, metrics, metrics["published_cost"])
            run.complete(claim, 1.0)
    page, markdown = written(read_results(study), tmp_path)
    assert "{{ 7 * 7 }}" in page
    images = re.findall(r"!\[.*\]\((curves_.*)\)", markdown)
    assert len(set(images)) == 8
    assert all((tmp_path / "reports/s" / image).exists() for image in images)
    assert "8 of 10 metrics are drawn" in page


@pytest.mark.slow  # Optuna's importances import scikit-learn where it is installed
def test_a_study_of_thirty_trials_has_importances_and_parallel_coordinates(database: Database, tmp_path: Path) -> None:
    study = optuna_study(database)
    for i in range(30):
        add_trial(study, "COMPLETE", [i / 30.0])
    page, markdown = written(read(database), tmp_path)
    assert page.count("not drawn") == 1, "the curves alone: no epoch was reported"
    for name in ("parallel_coordinates", "importances"):
        assert f'id="{name}"' in page
        assert f"({name}.png)" in markdown


# --- the end of a search ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn_png")
def test_report_that_cannot_be_written_is_a_remark(
    grid_results: Results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs, listener = RunsDir(tmp_path), RecordingListener()
    (tmp_path / "reports").write_text("a file instead of a folder")
    assert try_to_report(grid_results, runs, listener) is None
    ((kind, text),) = listener.events
    assert kind == "note"
    assert text.startswith(f"no report: cannot write the report to {tmp_path}/reports/grid")
    assert re.search(r"`.*report grid`", text), "the remedy"

    monkeypatch.setattr("hpo.report.curves.build_figure", lambda *_: 1 / 0)
    (tmp_path / "reports").unlink()
    assert try_to_report(grid_results, runs, listener) is None
    assert listener.events[-1] == ("note", "no report: ZeroDivisionError: division by zero")


@pytest.mark.slow
def test_preload_leaves_little_to_import(tmp_path: Path) -> None:
    finish_grid_in(tmp_path)
    script = f"""
import sys
from pathlib import Path
from hpo.paths import RunsDir
from hpo.report.page import preload, write_report
from hpo.report.reading import read_results
from storage.database import open_database
from storage.studies import find_study
with open_database("sqlite:///{tmp_path}/hpo.db") as database:
    results = read_results(find_study(database, "grid"))
    preload()
    before = set(sys.modules)
    write_report(results, RunsDir(Path("{tmp_path}")))
    print(*(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) < 10, done.stdout


# --- earlier studies ---------------------------------------------------------------------------------------------------


def test_results_of_earlier_studies_are_marked_and_cost_nothing(database: Database, tmp_path: Path) -> None:
    finish_grid(database)
    space = grid_space(parameters={"batch_size": [64, 128, 256], "lr": 0.01})
    study = open_study(database, **space.study_options)
    take_over_trials(space, study, find_trials(space, study, database))
    results = read_results(study)
    assert [trial.reused_from for trial in results.trials] == ["grid #0", "grid #1"]
    assert results.trained == []
    assert (results.gpu_hours, sum(results.devices.values()), results.wall_seconds) == (0.0, 0, 0.0)
    (source,) = results.sources
    assert (source.study, source.reused, source.learned) == ("grid@1", 2, 0)
    assert source.refused == {"batch_size 512 is not in this search": 1}
    for text in written(results, tmp_path):
        assert "Earlier studies" in text
        assert "batch_size 512 is not in this search (1)" in text.replace("\\", "")
        assert "reused from" in text
        assert "grid #1" in text.replace("\\", "")


def test_a_trial_that_continues_another_one_is_marked(database: Database, tmp_path: Path) -> None:
    study = finish_grid(database)
    parent = Parent("grid@1", 7, "0123456789ab", 3, "grid-0123456789ab", "key")
    with database.engine.begin() as connection:
        write_attrs(connection, [(1, {"continued_from": parent.attribute})])
        write_attrs(connection, [(2, {"continued_from": replace(parent, epoch=0).attribute})])
    sources = [TakenOver("grid@1", refused={"other": 2}), TakenOver("grid@1", "sqlite:///other.db")]
    study.optuna_study.set_user_attr("hpo:sources", [each.attribute for each in sources])
    results = read_results(study)
    assert [trial.continued_from for trial in results.trials] == ["grid@1 #7", "", ""], (
        "a parent may have had no checkpoint"
    )
    assert [trial.seconds for trial in results.trials] == [2.5, 10.0, 10.0], "of its own epochs"
    for text in written(results, tmp_path):
        assert "continued from" in text
        assert "grid@1 #7" in text.replace("\\", "")
        _, _, earlier = text.replace("\\", "").partition("Earlier studies")
        words = " ".join(re.sub(r"<[^>]*>|\|", " ", earlier).split())
        assert "grid@1 0 0 1 other (2) " in words, "reused, learned from, continued, left out"
        assert "grid@1 in sqlite:///other.db 0 0 0 " in words


def test_the_report_says_what_was_spent(database: Database, tmp_path: Path) -> None:
    budget = {"gpu_hours": 0.25, "cost": {"gpu_hour": 100, "limit": 40}}
    for text in written(read_results(finish_grid(database, budget=budget)), tmp_path):
        assert "GPU-hours" in text
        assert "0.01 of 0.25 device-hours, cost 1.00 of 40" in text.replace("\\", "")


def test_whatever_the_database_says_of_earlier_studies_is_text(database: Database, tmp_path: Path) -> None:
    study = finish_grid(database)
    stored = [{"study": HOSTILE, "storage": HOSTILE, "refused": {HOSTILE: 3}}, {"refused": HOSTILE, "reused": "x"}, 7]
    study.optuna_study.set_user_attr("hpo:sources", stored)
    page, markdown = written(read_results(study), tmp_path)
    assert page.count("&lt;script&gt;window.hacked=1") >= 3
    assert HOSTILE not in page.partition("<h2>Earlier studies</h2>")[2].partition("</div>")[0]
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    study.optuna_study.set_user_attr("hpo:sources", "nothing")
    assert read_results(study).sources == []


# --- in a real browser ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.browser
def test_a_large_study_is_reported_fast_in_a_page_that_opens(
    database: Database, browser: Browser, tmp_path: Path
) -> None:
    """The full size is `python -m benchmarks.report --trials 5000 --epochs 50`."""
    study = fill(database, "large", trials=600, epochs=20)
    started = time.process_time()
    results = read_results(study)
    page = write_report(results, RunsDir(tmp_path))
    assert time.process_time() - started < 20  # 4 s; some machines are four times slower and do other work too
    assert page.stat().st_size < 8e6
    tab = browser.new_page(bypass_csp=True)
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn == 4", timeout=60_000)
    text = tab.inner_text("main")
    assert "The best 10 of 600 trials are coloured" in text
    assert "300 of 588 are drawn" in text
    assert "The best 200 trials; storage holds 400 more" in text
    tab.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it: the documented grid, a failed trial, and hostile texts."""
    folder = tmp_path_factory.mktemp("page")
    with open_database(f"sqlite:///{folder}/hpo.db") as database:
        study = finish_grid(database, description=HOSTILE)
        distributions = grid_space().distributions()
        study.optuna_study.add_trial(
            create_trial(
                state=TrialState.FAIL,
                params={"batch_size": 512, "lr": 0.01},
                distributions=distributions,
                intermediate_values={1: 0.5},
                user_attrs={"fail_reason": f"ValueError: {HOSTILE} " + "x" * 300, "traceback": HOSTILE + "y" * 3000},
            )
        )
        return write_report(read_results(study), RunsDir(folder))


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(browser: Browser, page: Path, width: int, scheme: Any) -> None:
    tab = browser.new_page(bypass_csp=True, viewport={"width": width, "height": 800}, color_scheme=scheme)
    messages: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn == 3")
    # Validation, training and published training of three trials, and published training of the failed one, whose own
    # single value is a marker.
    curves = 3 * 3 + 1
    for figure in ("accuracy", "loss"):
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
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "also with all details open"
    assert tab.evaluate("window.hacked") is None
    assert HOSTILE in tab.inner_text("#failed")
    assert HOSTILE in tab.inner_text("header")
    button = tab.locator("section:has(#accuracy) .legend button").first
    assert button.inner_text() == "#0 batch_size 64"
    button.click()
    tab.wait_for_function("document.querySelectorAll('#accuracy .scatterlayer .trace path.js-line').length == 7")
    assert messages == []
    assert requests == [page.as_uri()], "nothing is fetched"
    tab.close()


@pytest.mark.slow
@pytest.mark.browser
def test_names_from_a_database_are_text_and_never_markup(database: Database, browser: Browser, tmp_path: Path) -> None:
    study = optuna_study(database, name=HOSTILE)
    for i in range(12):
        params = {HOSTILE: float(i), "kind": HOSTILE if i % 2 else "a"}
        add_trial(study, "COMPLETE", [i / 9], params=params, intermediate_values={1: 0.1, 2: i / 9})
    page = write_report(read(database, HOSTILE), RunsDir(tmp_path))
    tab = browser.new_page(bypass_csp=True)
    messages: list[str] = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn == 2")
    tab.locator("#curves_value .js-line").first.hover(force=True)
    for place in ("h1", "#trials", ".legend", "#parallel_coordinates"):
        assert "window.hacked=1" in (tab.locator(place).first.text_content() or "")
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img, .legend script, #trials script").count() == 0
    assert messages == []
    tab.close()
    markdown = (page.parent / "report.md").read_text()
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    assert "`hpo report '" in markdown, "a command to copy is quoted"


@pytest.mark.slow
@pytest.mark.browser
def test_names_of_objectives_and_choices_are_text(database: Database, browser: Browser, tmp_path: Path) -> None:
    study = optuna_study(database, directions=("maximize", "minimize"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([HOSTILE, f"b{HOSTILE}"])
    study.set_user_attr("hpo:settings", {"name": HOSTILE, "description": HOSTILE, "metric": HOSTILE})
    for i in range(30):
        params = {HOSTILE: float(i), "kind": HOSTILE if i % 2 else "a"}
        attrs = {"fail_reason": HOSTILE} if i > 26 else {HOSTILE: HOSTILE}
        values = [i / 9, (i * 7 % 30) / 9]
        state = "FAIL" if i > 26 else "COMPLETE"
        add_trial(study, state, None if state == "FAIL" else values, params=params, user_attrs=attrs)
    page = write_report(read(database), RunsDir(tmp_path))
    tab = browser.new_page()
    messages: list[str] = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.goto(page.as_uri())
    tab.wait_for_selector("body[data-drawn]")
    for place in ("#pareto_front", "#parallel_coordinates", "#trials", "#failed"):
        assert HOSTILE[:20] in (tab.locator(place).first.text_content() or ""), place
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img, section script:not([type='application/json'])").count() == 0
    # Even markup that got into the page would run nothing.
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.hacked") is None
    assert any("Content Security Policy" in message for message in messages)
    tab.close()


@pytest.mark.slow
@pytest.mark.browser
def test_figures_fill_a_resized_window(browser: Browser, page: Path) -> None:
    # Playwright polls with eval, which the page's own policy forbids.
    tab = browser.new_page(bypass_csp=True, viewport={"width": 1280, "height": 800})
    tab.goto(page.as_uri())
    tab.wait_for_function("document.body.dataset.drawn == 3")
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.wait_for_function("document.querySelector('#accuracy .main-svg').getBoundingClientRect().width < 390")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.close()
