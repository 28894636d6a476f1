"""A study's page: its maps and cards by hand, its size, and in a real browser."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from brainray import layout
from brainray.report.study_page import ClusterMap, ShownSet, shown_rows, write_study_page
from brainray.report.table import Table
from brainray.schema import NOISE, THUMBNAIL_SIDE
from brainray.storage import Folder
from tests.browser import CHROMIUM, state_after
from tests.report.test_page import data_of, picture_of


def cluster_map(title: str, rows: list[int], clusters: list[int]) -> ClusterMap:
    """A slice is as far from its centroid as its row is high; row 7 is held out."""
    return ClusterMap(
        title,
        rows,
        x=[float(row) for row in rows],
        y=[float(cluster) for cluster in clusters],
        clusters=clusters,
        distances=[None if row == 7 else row / 10 for row in rows],
        sizes=[(cluster, 100 + cluster) for cluster in sorted(set(clusters))],
    )


def shown_set(name: str, rows: list[int], maps: list[ClusterMap]) -> ShownSet:
    """Slices whose brightness is ten times their row."""
    held_out = np.array(rows) == 7
    subsets = {"all": np.full(len(rows), True), "fitted": ~held_out}
    if held_out.any():
        subsets["held out"] = held_out
    return ShownSet(
        np.array(rows),
        paths=[f"<{name}>/{row}.jpg" for row in rows],
        subsets=subsets,
        images=[np.full((THUMBNAIL_SIDE, THUMBNAIL_SIDE), 10 * row, np.uint8) for row in rows],
        maps=maps,
    )


FIRST = cluster_map("one, a: kmeans", list(range(20)), [0] * 15 + [1] * 5)
SECOND = cluster_map("one, b: kmeans", list(range(20)), [0, 1, 2, 3] * 5)
THIRD = cluster_map("two, a: dbscan", [2, 4, 6, 8, 9], [0, 0, NOISE, 0, NOISE])
SETS = [
    shown_set("one", [row for row in range(20) if row != 5], [FIRST, SECOND]),  # row 5 is left out
    shown_set("two", [2, 4, 6, 8, 9], [THIRD]),
]


def noisy_png(side: int) -> bytes:
    """A file of about side x side bytes, as noise cannot be compressed."""
    stored = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    Image.fromarray(noise).save(stored, "PNG")
    return stored.getvalue()


FIGURES = {"one/a-tsne.png": noisy_png(1100), "one/<b>.png": noisy_png(8)}


def page_with(folder: Path, figures: dict[str, bytes], sets: list[ShownSet]) -> Path:
    write_study_page(
        Folder(folder / "mine"),
        summary=["96 cells, <none> of them failed."],
        tables=[Table("one: 15 fitted slices", ["features", "NMI"], [["a", "0.123"]])],
        sets=sets,
        figures=figures,
        about={"command": "python jobs/study.py --set name=<mine>"},
        settings="name: mine  # </script><script>alert(1)</script>\n",
    )
    return folder / "mine" / layout.REPORT


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_with(tmp_path_factory.mktemp("page"), FIGURES, SETS)


def test_the_page_has_the_tables_and_figures_and_needs_no_network(page: Path) -> None:
    text = page.read_text()
    outside_of_plotly = text[: text.index("plotly.js v")] + text[text.index('id="data"') :]
    assert not re.search(r"(src|href)=\"?https?:", outside_of_plotly)
    assert "<script>alert(1)" not in text
    assert "name=&lt;mine&gt;" in text
    assert "<title>brainray: study mine</title>" in text
    assert "96 cells, &lt;none&gt; of them failed." in text
    assert '<th scope="row">a</th><td>0.123</td>' in text
    assert not {"confusion", "subtypes", "curves"} & set(re.findall(r'<section id="(\w+)"', text))
    uris = re.findall(r'<img src="data:image/png;base64,(.*?)" alt="(.*?)"', text)
    assert {name: base64.b64decode(uri) for uri, name in uris} == {
        "one/a-tsne.png": FIGURES["one/a-tsne.png"],
        "one/&lt;b&gt;.png": FIGURES["one/<b>.png"],
    }
    assert text.count('<figure class="wide">') == 1


def test_every_map_has_the_slices_of_its_data_set(page: Path) -> None:
    data = data_of(page)
    assert [each["epoch"] for each in data["maps"]] == [
        each.title for each in (FIRST, SECOND, THIRD)
    ]
    assert data["chosen"] == {"epoch": FIRST.title}
    assert [each["path"] for each in data["slices"][17:21]] == [
        "<one>/18.jpg",
        "<one>/19.jpg",
        "<two>/2.jpg",
        "<two>/4.jpg",
    ]
    assert picture_of(data["slices"][6]["image"]).mean() == pytest.approx(70, abs=2)
    assert data["slices"][6]["subsets"] == ["all", "held out"]
    assert all(each["label"] is None for each in data["slices"])
    first, _, third = data["maps"]
    assert first["x"] == [row for row in range(20) if row != 5] + [None] * 5
    assert third["cluster"] == [None] * 19 + [0, 0, NOISE, 0, NOISE]
    assert data["clusters"] == [NOISE, 0, 1, 2, 3]
    assert data["cluster_colours"][0][0] == "noise"


def test_cards_show_the_fitted_slices_nearest_to_the_centroid_and_the_farthest(page: Path) -> None:
    first, _, third = data_of(page)["maps"]
    of_first = {card["cluster"]: card for card in first["cards"]}
    assert (of_first[0]["size"], of_first[1]["size"]) == (100, 101)  # not of the shown slices
    paths = [each["path"] for each in data_of(page)["slices"]]

    def rows(places: list[int]) -> list[str]:
        return [paths[place].partition("/")[2].removesuffix(".jpg") for place in places]

    assert rows(of_first[0]["typical"]) == ["0", "1", "2", "3", "4", "6"]
    assert rows(of_first[0]["borderline"]) == ["14", "13", "12", "11", "10", "9"]
    assert rows(of_first[1]["typical"]) == ["15", "16", "17", "18", "19"]
    assert of_first[1]["borderline"] == []
    noise = third["cards"][0]
    assert (noise["cluster"], noise["size"], rows(noise["typical"])) == (NOISE, 99, ["6", "9"])


def test_of_many_clusters_the_largest_have_cards(tmp_path: Path) -> None:
    many = cluster_map("one, a: hdbscan", list(range(20)), list(range(20)))
    (drawn,) = data_of(page_with(tmp_path, {}, [shown_set("one", many.rows, [many])]))["maps"]
    assert [card["cluster"] for card in drawn["cards"]] == list(range(8, 20))


def test_slices_on_several_maps_count_once_and_are_thinned_evenly() -> None:
    other = cluster_map("one, c: kmeans", [1, 30], [0, 0])
    assert shown_rows([FIRST, other], 30).tolist() == [*range(20), 30]
    assert shown_rows([FIRST, other], 3).tolist() == [0, 10, 30]


def test_figures_for_which_there_is_no_room_are_named(tmp_path: Path) -> None:
    large = noisy_png(3500)
    figures = {"large.png": large, "larger.png": noisy_png(3600), "small.png": noisy_png(8)}
    page = page_with(tmp_path, figures, SETS)
    assert 4 / 3 * len(large) < page.stat().st_size < 25e6
    text = page.read_text()
    assert re.findall(r'<img src="data:image/png.*?" alt="(.*?)"', text) == [
        "large.png",
        "small.png",
    ]
    assert "larger.png: too large for this page" in text


def test_a_study_of_too_few_slices_has_no_map(tmp_path: Path) -> None:
    page = page_with(tmp_path, {}, [])
    assert data_of(page)["maps"] == []
    assert "Too few slices for a map" in page.read_text()
    assert '<section id="figures">' not in page.read_text()


ACTIONS = """
<script>
const state = {};
const set = (name, value) => { byId(name).value = value;
  byId(name).dispatchEvent(new Event("input")); };
const cards = () => [...document.querySelectorAll("#cards h3")].map(item => item.textContent);
const legend = () => [...document.querySelectorAll("#map .legendtext")].map(i => i.textContent);
state.all = byId("count").textContent;
state.cards = cards();
state.images = document.querySelectorAll("#cards img").length;
set("of-cluster", 1); state.cluster = byId("count").textContent;
set("of-cluster", ""); set("of-subset", "held out"); state.held_out = byId("count").textContent;
set("of-subset", "all");
setTimeout(() => { // Plotly draws behind the scenes
const map = byId("map"), area = map.querySelector(".nsewdrag");
const box = area.getBoundingClientRect(), axes = map._fullLayout;
area.dispatchEvent(new MouseEvent("mousemove", { bubbles: true,
  clientX: box.left + axes.xaxis.d2p(7), clientY: box.top + axes.yaxis.d2p(0) }));
setTimeout(() => {
state.legend = legend();
state.hovered = document.querySelector("#shown img").alt;
state.image = document.querySelector("#shown img").src === slices[6].image;
state.described = byId("shown").textContent;
set("epoch", 2);
state.forgotten = byId("shown").textContent;
setTimeout(() => {
state.other = { all: byId("count").textContent, cards: cards(), legend: legend() };
set("of-cluster", -1); state.noise = byId("count").textContent;
byId("next").click(); state.next = document.querySelector("#shown img").alt;
const shown = [...document.querySelectorAll(
  "button:not(:disabled), select, input, .scroll, #map, nav a")].filter(
  item => item.checkVisibility());
state.controls = shown.filter(item => item.tagName === "SELECT").map(item => item.id);
state.reached = shown.every(item => { item.focus(); return document.activeElement === item; });
state.width = document.documentElement.scrollWidth <= window.innerWidth;
state.innerWidth = window.innerWidth;
window.parent.postMessage(JSON.stringify(state), "*");
}, 500); }, 500); }, 1500);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_maps_and_their_cards_work_in_a_browser(page: Path, width: int) -> None:
    state: dict[str, Any] = state_after(ACTIONS, page, width)
    assert (state["all"], state["cluster"], state["held_out"]) == ("19", "5", "1")
    assert state["cards"] == ["Cluster 0, 100 slices", "Cluster 1, 101 slices"]
    assert state["images"] == 6 + 6 + 5
    assert state["legend"] == ["cluster 0", "cluster 1"]
    assert state["hovered"] == "slice <one>/7.jpg"
    assert state["image"] is True
    assert state["described"] == ("path<one>/7.jpgclustercluster 0subsetsall, held out")
    assert state["forgotten"] == ""  # it is of another data set
    assert state["other"] == {
        "all": "5",
        "cards": ["Noise, 99 slices", "Cluster 0, 100 slices"],
        "legend": ["noise", "cluster 0"],
    }
    assert (state["noise"], state["next"]) == ("2", "slice <two>/6.jpg")
    assert state["controls"] == ["epoch", "of-cluster", "of-subset"]
    assert state["reached"] is True
    assert state["innerWidth"] == width
    assert state["width"] is True
