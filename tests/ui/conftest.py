"""A server with the shipped deployments, a worker, and Debian's Chromium.

`--screenshots FOLDER` keeps pictures of what the tests see: docs/images has those that docs/ui.md shows.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.services import JOINING, environment, prefect_server, prefect_worker, prefsieve
from tests.tinyworld_fixture import tinyworld  # noqa: F401

Picture = Callable[[str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="FOLDER", help="Keep pictures of what the tests see there.")


@pytest.fixture(scope="session")
def ui(tmp_path_factory: pytest.TempPathFactory, tinyworld: Path) -> Iterator[str]:  # noqa: F811
    """The URL of the server's UI; runs are done by a worker in the repository."""
    folder = tmp_path_factory.mktemp("ui")
    with prefect_server(folder / "server") as api:
        done = prefsieve("deploy", env=environment(PREFECT_API_URL=api, PREFECT_HOME=str(folder / "deployer")))
        assert done.returncode == 0, done.stderr
        store = str(folder / "store")
        with prefect_worker(api, "prefsieve", folder / "worker", PREFSIEVE_STORE=store, **JOINING):
            yield api.removesuffix("/api")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    assert executable, "no `chromium` on PATH; on Debian: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser, ui: str) -> Iterator[Page]:
    """The UI's first page, in light colours, for somebody who has never been there."""
    with chromium.new_context(base_url=ui, viewport={"width": 1280, "height": 900}, locale="en-US") as context:
        context.add_init_script(
            "localStorage.getItem('color-scheme') ?? localStorage.setItem('color-scheme', '\"light\"')"
        )
        context.set_default_timeout(60_000)  # milliseconds; the machine may be busy
        page = context.new_page()
        page.goto("/")
        yield page


@pytest.fixture
def picture(page: Page, request: pytest.FixtureRequest) -> Picture:
    """Keeps what the page shows, under a name, where that is asked for; in few colours, so that it is small."""
    folder = request.config.getoption("--screenshots")

    def keep(name: str) -> None:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            shown = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
            shown.quantize(64).save(Path(folder) / f"{name}.png", optimize=True)

    return keep
