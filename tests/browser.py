"""A real Chromium, also in front of a real MLflow server, of which it makes README's screenshots:

python -m tests.browser sqlite:////home/you/brainray/mlflow.db EXPERIMENT docs
"""

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.tracking_server import free_port, mlflow_server

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

_PAGE_LOADS_MS = 60_000
_WINDOW = (1400, 900)  # pixels
# A panel that opens by itself over a third of the window, unless it was closed once.
_CLOSE_ASSISTANT = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""

_FRAME = """
<!doctype html><body>
<iframe src="acted.html" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
addEventListener("message", event => {{
  const line = document.createElement("p"); line.id = "state"; line.textContent = event.data;
  document.body.append(line);
}});
</script>
"""
# A window of Chromium is 500 pixels wide at least.


def state_after(actions: str, page: Path, width: int) -> dict[str, Any]:
    """What a script at the end of a page tells in a window of that width, without any error."""
    acted = page.with_name("acted.html")
    acted.write_text(page.read_text().replace("</body>", actions + "</body>"))
    framed = page.with_name(f"framed-{width}.html")
    framed.write_text(_FRAME.format(width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader"]
    options += ["--window-size=1400,1000", "--virtual-time-budget=8000", "--dump-dom"]
    finished = subprocess.run(
        [str(CHROMIUM), *options, "--enable-logging=stderr", framed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in console if "Error" in line]
    found = re.search(r'<p id="state">(.*?)</p>', finished.stdout)
    assert found is not None
    state: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return state


class MLflowUI:
    """The pages of a tracking server that people open after a sweep."""

    def __init__(self, page: "Page", address: str) -> None:
        self.page = page
        self.address = address
        self.errors: list[str] = []
        page.set_default_timeout(_PAGE_LOADS_MS)
        page.add_init_script(_CLOSE_ASSISTANT)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open_experiment(self, experiment_id: str, parent: str) -> list[str]:
        """The experiment's table, a run of it unfolded; the names of the runs shown."""
        self.page.goto(f"{self.address}/#/experiments/{experiment_id}/runs")
        links = self.page.locator(".ag-row a[href*='/runs/']")
        links.first.wait_for()
        num_folded = links.count()
        row = self.page.locator(".ag-row", has=self.page.get_by_text(parent, exact=True))
        row.locator("button[data-component-id*='runnamecellrenderer']").first.click()
        links.nth(num_folded).wait_for()
        names: list[str] = links.all_inner_texts()
        return names

    def open_comparison(self, experiment_id: str, run_ids: Sequence[str]) -> list[str]:
        """The comparison of some runs; the names of its parallel coordinates' axes."""
        runs, experiments = json.dumps(list(run_ids)), json.dumps([experiment_id])
        self.page.goto(f"{self.address}/#/compare-runs?runs={runs}&experiments={experiments}")
        self.page.locator(".parcoords .axis-title").first.wait_for()
        axes: list[str] = self.page.locator(".parcoords .axis-title").all_text_contents()
        return axes

    def compare_by(self, metric: str) -> None:
        """Choose the metric of the comparison that is open."""
        chosen = self.page.locator("xpath=//div[text()='Metrics:']/following-sibling::div[1]")
        chosen.click()
        self.page.keyboard.type(metric)
        self.page.locator(f"[class*='item-option'][title='{metric}']").click()
        self.page.keyboard.press("Escape")
        others = chosen.locator("[class*='selection-item']", has_not_text=metric)
        others.locator("[class*='item-remove']").first.click()
        self.page.locator(".parcoords .axis-title", has_text=metric).wait_for()

    def open_figure(self, experiment_id: str, run_id: str, path: str) -> int:
        """A run's figure among its artifacts; the width of the picture that is shown, in pixels."""
        self.page.goto(
            f"{self.address}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path}"
        )
        picture = self.page.locator(f"img[alt='{path}']")
        picture.wait_for()
        width: int = picture.evaluate(
            "image => image.decode().then(() => image.naturalWidth, () => 0)"
        )
        return width


@contextmanager
def mlflow_ui(tracking_uri: str) -> Iterator[MLflowUI]:
    """A server of that store on a free port of loopback, and a browser; both end with the block."""
    from playwright.sync_api import sync_playwright

    with mlflow_server(tracking_uri, free_port()) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        width, height = _WINDOW
        page = browser.new_page(viewport={"width": width, "height": height})
        yield MLflowUI(page, address)
        browser.close()


def take_screenshots(tracking_uri: str, experiment: str, folder: Path) -> None:
    """The sweep's nested runs, the comparison of its trials, and a figure of the sweep."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise SystemExit(f"no experiment {experiment!r} in {tracking_uri}")
    runs = client.search_runs([found.experiment_id])
    trials = [run.info.run_id for run in runs if "mlflow.parentRunId" in run.data.tags]
    parent = next(run.info.run_id for run in runs if run.info.run_name == experiment)
    with mlflow_ui(tracking_uri) as ui:
        ui.open_experiment(found.experiment_id, experiment)
        ui.page.screenshot(path=folder / "mlflow_sweep.png")
        ui.open_comparison(found.experiment_id, trials)
        ui.compare_by("validation/score")
        ui.page.wait_for_timeout(1000)  # the lines are drawn after the axes
        ui.page.screenshot(path=folder / "mlflow_compare.png")
        ui.open_figure(found.experiment_id, parent, "figures/parallel_coordinates.png")
        ui.page.screenshot(path=folder / "mlflow_figure.png")


if __name__ == "__main__":
    take_screenshots(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
