"""The dashboard in a real browser, in a wide and in a narrow window."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, ViewportSize, expect

from hpo.dashboard.publishing import publish
from hpo.dashboard.server import build_app
from hpo.paths import RunsDir
from storage.database import open_database
from tests.dashboard.builders import CHECKPOINT, POINTS, make_study, serving

WIDE: ViewportSize = {"width": 1280, "height": 900}
NARROW: ViewportSize = {"width": 390, "height": 900}
PAGE_WIDTH = "document.documentElement.scrollWidth"

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a dashboard with two equal studies: 1 is published, 2 is not."""
    runs_dir = RunsDir(tmp_path_factory.mktemp("dashboard"))
    with open_database(runs_dir.default_storage) as database:
        publish(make_study(database, runs_dir), runs_dir)
        make_study(database, runs_dir, "bare")
        with serving(build_app(database, runs_dir=runs_dir)) as port:
            yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """One context for all pages: the dashboard's JavaScript is downloaded once."""
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page in a wide window. The test fails if the page logs an error or a request fails."""
    page = context.new_page()
    page.set_viewport_size(WIDE)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("response", lambda answer: errors.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    yield page
    page.close()
    assert errors == []


def test_the_curves_are_plots_of_the_study(site: str, page: Page) -> None:
    page.goto(f"{site}/dashboard/studies/1")
    for title in ("Accuracy over epochs", "Loss over epochs"):
        plot = page.locator(".js-plotly-plot", has=page.locator(".gtitle", has_text=title))
        expect(plot).to_have_count(1)
        # Trial 4 failed after its first epoch: a point, not a line.
        expect(plot.locator(".scatterlayer .trace path.js-line")).to_have_count(2 * (len(POINTS) - 1))
        expect(plot.locator(".scatterlayer .trace path.point")).to_have_count(2)
        for i in range(len(POINTS)):
            expect(plot.locator(".legendtext", has_text=f"#{i} lr 0.{i + 1}").first).to_be_attached()
        box, card = plot.locator(".nsewdrag").bounding_box(), plot.bounding_box()
        assert box is not None
        assert card is not None
        assert box["width"] > 0.4 * card["width"], "the legend leaves no room for the curves"
    image = page.locator('img[src^="/artifacts/1/"]')
    expect(image).to_have_count(1)
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 500
    assert page.evaluate(PAGE_WIDTH) <= WIDE["width"]


def test_a_trial_has_its_note_and_its_artifacts(site: str, page: Page) -> None:
    url = f"{site}/dashboard/studies/1/trials?numbers="
    download = "link => fetch(link.href).then(response => response.text())"
    page.goto(url + "2")
    for text in (
        "COMPLETE after 5 of 5 epochs",
        "NVIDIA H200 (cuda)",
        "10.0 s, 2.00 s per epoch",
        "hpo replay search 2",
    ):
        expect(page.get_by_text(text)).to_be_visible()
    expect(page.get_by_text("epoch-000005.pt")).to_have_count(1)
    assert page.locator('a[href^="/artifacts/1/3/"]').first.evaluate(download) == CHECKPOINT.decode()
    page.get_by_role("link", name="trial 0").click()
    expect(page.get_by_text("hpo replay search 0")).to_be_visible()
    expect(page.get_by_text("epoch-000005.pt")).to_have_count(0)
    assert page.evaluate(PAGE_WIDTH) <= WIDE["width"]
    page.goto(url + "4")
    expect(page.get_by_text("FAIL after 1 of 5 epochs")).to_be_visible()
    expect(page.get_by_text("ValueError: <b>no</b> `such` path").first).to_be_visible()
    expect(page.get_by_text("log.txt")).to_have_count(1)
    assert "printed by the script" in page.locator('a[href^="/artifacts/1/5/"]').first.evaluate(download)


@pytest.mark.parametrize(
    ("path", "content"),
    [("", "Accuracy over epochs"), ("/trials?numbers=4", "FAIL after 1 of 5 epochs")],
    ids=["curves", "failed trial"],
)
def test_a_narrow_window_needs_no_more_scrolling_than_without_published_content(
    site: str, page: Page, path: str, content: str
) -> None:
    page.set_viewport_size(NARROW)
    page.goto(f"{site}/dashboard/studies/1{path}")
    expect(page.get_by_text(content).first).to_be_visible()
    width = page.evaluate(PAGE_WIDTH)
    if width > NARROW["width"]:  # the pages of optuna-dashboard itself are too wide
        page.goto(f"{site}/dashboard/studies/2{path}")
        page.wait_for_function(f"{PAGE_WIDTH} >= {width}")
