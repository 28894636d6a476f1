"""The interactive page: complete in itself, and working in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from brainray import layout
from brainray.config import EvaluationConfig
from brainray.report.page import write_page
from brainray.schema import PREDICTIONS, THUMBNAIL_SIDE
from brainray.storage import Folder

CLASSES = ["glioma", "notumor", "pituitary"]
NUM_SLICES = 24
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def predictions(epoch: int) -> pa.Table:
    """Slices of known brightness; every fourth is predicted wrongly."""
    rng = np.random.default_rng(epoch)
    rows = []
    for number in range(NUM_SLICES):
        label = number % 3
        predicted = (label + 1) % 3 if number % 4 == 0 else label
        probabilities = np.full(3, 0.1) + 0.7 * (np.arange(3) == predicted)
        rows.append(
            {
                "sample_id": f"{number:032x}",
                "path": f"Testing/<{CLASSES[label]}>/{number}.jpg",
                "frame": "",
                "label": CLASSES[label],
                "clean": number % 2 == 0,
                "strict": False,
                "head": CLASSES[predicted],
                "cluster_class": CLASSES[label],
                "cluster": label,
                "confidence": float(probabilities.max()),
                "probabilities": probabilities.tolist(),
                "responsibilities": (np.eye(3)[label] * 0.9 + 0.1 / 3).tolist(),
                "log_likelihood": float(rng.normal()),
                "embedding": (np.eye(3)[label] * 5 + rng.normal(size=3)).tolist(),
                "thumbnail": bytes([10 * number] * THUMBNAIL_SIDE**2),
            }
        )
    return pa.Table.from_pylist(rows, schema=PREDICTIONS)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "run"
    run = Folder(path)
    history = [{"epoch": float(n), "train/loss/total": 1 / n} for n in (1, 2)]
    run.write_json_lines(layout.METRICS, history)
    run.write_bytes(layout.CONFIG, b"name: run  # </script><script>alert(1)</script>\n")
    for epoch in (1, 2):
        run.write_table(layout.predictions_file(epoch), predictions(epoch))
    metrics = {"chosen_epoch": 2.0, "test/all/head/accuracy": 0.75}
    about = {"command": "python jobs/train.py --set name=<run>"}
    name = write_page(
        run, CLASSES, EvaluationConfig(tsne_epochs=(1, 2)), metrics, about, control=metrics
    )
    assert name == "report.html"
    return path / name


def test_the_page_needs_no_network_and_escapes_what_it_shows(page: Path) -> None:
    text = page.read_text()
    outside_of_plotly = text[: text.index("plotly.js v")] + text[text.index('id="data"') :]
    assert not re.search(r"(src|href)=\"?https?:", outside_of_plotly)
    assert "<script>alert(1)" not in text
    assert "name=&lt;run&gt;" in text
    data = json.loads(
        re.search(r'id="data" type="application/json">(.*?)</script>', text, re.S).group(1)  # type: ignore[union-attr]
    )
    assert len(data["slices"]) == NUM_SLICES
    assert data["slices"][3]["path"] == "Testing/<glioma>/3.jpg"
    assert data["slices"][3]["subsets"] == ["all"]
    assert [shown["epoch"] for shown in data["maps"]] == [1, 2]
    assert sum(card["size"] for card in data["cards"]) == NUM_SLICES
    assert data["cards"][0]["labels"] == {"glioma": 8}


def test_a_run_without_test_slices_has_no_page(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    assert write_page(run, CLASSES, EvaluationConfig(), {"chosen_epoch": 1.0}, {}) is None


ACTIONS = """
<script>
const said = {};
const set = (name, value) => { byId(name).value = value;
  byId(name).dispatchEvent(new Event("input")); };
said.all = byId("count").textContent;
set("of-class", "glioma"); said.glioma = byId("count").textContent;
set("of-outcome", "wrong"); said.wrong = byId("count").textContent;
set("of-class", ""); set("of-outcome", ""); set("of-subset", "clean");
said.clean = byId("count").textContent;
set("of-subset", "all"); set("confidence", 0.9); said.sure = byId("count").textContent;
set("confidence", 0); set("epoch", 0); said.epoch = byId("epoch-name").textContent;
setTimeout(() => { // Plotly draws behind the scenes
const map = byId("map"), area = map.querySelector(".nsewdrag");
const box = area.getBoundingClientRect(), axes = map._fullLayout;
area.dispatchEvent(new MouseEvent("mousemove", { bubbles: true,
  clientX: box.left + axes.xaxis.d2p(map.data[1].x[2]),
  clientY: box.top + axes.yaxis.d2p(map.data[1].y[2]) }));
setTimeout(() => {
said.hovered = document.querySelector("#shown img").alt;
said.image = document.querySelector("#shown img").src === slices[7].image;
byId("next").focus(); said.focus = document.activeElement.id;
byId("next").click(); said.next = document.querySelector("#shown img").alt;
document.querySelectorAll("#matrix button")[1].click();
said.cell = document.querySelectorAll("#cell img").length;
said.width = document.documentElement.scrollWidth <= window.innerWidth;
const line = document.createElement("p"); line.id = "said"; line.textContent = JSON.stringify(said);
document.body.append(line);
}, 500); }, 1500);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_filters_hover_and_galleries_work_in_a_browser(page: Path, width: int) -> None:
    acted = page.with_name(f"acted-{width}.html")
    acted.write_text(page.read_text().replace("</body>", ACTIONS + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader"]
    options += [f"--window-size={width},900", "--virtual-time-budget=8000", "--dump-dom"]
    finished = subprocess.run(
        [str(CHROMIUM), *options, "--enable-logging=stderr", acted.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in console if "Error" in line]
    found = re.search(r'<p id="said">(.*?)</p>', finished.stdout)
    assert found is not None
    said = json.loads(html.unescape(found.group(1)))
    assert (said["all"], said["glioma"], said["wrong"], said["clean"]) == ("24", "8", "2", "12")
    assert said["sure"] == "0"
    assert said["epoch"] == "1"
    assert said["hovered"] == "slice Testing/<notumor>/7.jpg"
    assert said["image"] is True
    assert said["focus"] == "next"
    assert said["next"] == "slice Testing/<pituitary>/8.jpg"
    assert said["cell"] == 2  # gliomas taken for no tumour
    assert said["width"] is True
