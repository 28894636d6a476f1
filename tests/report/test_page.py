"""The interactive page: complete in itself, and working in a real browser."""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from brainray import layout
from brainray.config import EvaluationConfig
from brainray.report.figures import confusion_counts
from brainray.report.maps import SliceMap, run_maps
from brainray.report.page import Explained, write_evaluation_page, write_page
from brainray.schema import PREDICTIONS, REJECTED, THUMBNAIL_SIDE
from brainray.storage import Folder
from tests.browser import CHROMIUM, state_after

LEAKAGE = {
    "levels": {"near": "near-duplicates that are not byte-identical"},
    "num_test": {"all": 12, "clean": 5},
    "num_test_by_class": {"all": {"glioma": 12}, "clean": {"glioma": 5}},
    "across_splits": {"near": [{"path": "Testing/a.png", "twin": "Training/b.png"}] * 7},
    "within_train": {"near": []},
    "within_test": {"near": []},
    "label_conflicts": [
        {"path": "Training/<b>/2.nii", "frame": "axial=7", "label": None, "group": "01"},
        {"path": "Training/<b>/1.png", "label": "pituitary", "group": "01"},
        {"path": "Training/<a>/1.png", "label": "glioma", "group": "01"},
    ],
}
# No integer may come first, no name be markup, and no long one widen the page.
CLASSES = ["glioma", "2", "<b>pituitary" + "_adenoma" * 8]
NUM_SLICES = 24


def predictions(epoch: int, num_slices: int = NUM_SLICES) -> pa.Table:
    """Slices of known brightness; every fourth is predicted wrongly; gliomas have two clusters."""
    rng = np.random.default_rng(epoch)
    rows = []
    for number in range(num_slices):
        label = number % 3
        cluster = 3 if label == 0 and number % 2 else label
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
                "cluster": cluster,
                "confidence": float(probabilities.max()),
                "probabilities": probabilities.tolist(),
                "responsibilities": (np.eye(4)[cluster] * 0.9 + 0.1 / 4).tolist(),
                "log_likelihood": float(rng.normal()),
                "embedding": (np.eye(3)[label] * 5 + rng.normal(size=3)).tolist(),
                "thumbnail": bytes([10 * number % 256] * THUMBNAIL_SIDE**2),
            }
        )
    return pa.Table.from_pylist(rows, schema=PREDICTIONS)


def explained() -> list[Explained]:
    """A right one and an error, with the evidence in the upper left corner."""
    activation = np.zeros((32, 32), np.float32)
    activation[:8, :8] = 1.0
    grey = np.full((32, 32), 100, np.uint8)
    return [
        Explained("Testing/<glioma>/3.jpg", "glioma", predicted, 0.8, grey, activation)
        for predicted in ("glioma", "2")
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "run"
    run = Folder(path)
    history = [{"epoch": float(n), "train/loss/total": 1 / n} for n in (1, 2)]
    run.write_json_lines(layout.METRICS, history)
    run.write_bytes(layout.CONFIG, b"name: run  # </script><script>alert(1)</script>\n")
    for epoch in (1, 2):
        run.write_table(layout.predictions_file(epoch), predictions(epoch))
    compared = {"difference": 0.25, "only_run": 3.0, "only_control": 1.0, "p": 0.625}
    metrics = {"chosen_epoch": 2.0, "test/all/head/accuracy": 0.75, "time/embed_s": 3.5}
    metrics |= {"test/all/num_slices": 1221.0, "test/all/head/balanced_accuracy": 0.7125}
    metrics |= {f"{name}/test/all/head/accuracy": value for name, value in compared.items()}
    about = {"command": "python jobs/train.py --set name=<run>"}
    run.write_json(
        f"{layout.DATASET}/{layout.MANIFEST}", {"rejected_reasons": {"blank <slice>": 7}}
    )
    run.write_json(f"{layout.DATASET}/{layout.LEAKAGE}", LEAKAGE)
    evaluation = EvaluationConfig(tsne_epochs=(1, 2), control="c")
    write_page(
        run,
        CLASSES,
        evaluation,
        metrics,
        about,
        run_maps(run, evaluation, 2),
        control=metrics,
        explained=explained(),
        siblings={"seed1": predictions(3).take(list(reversed(range(NUM_SLICES))))},
    )
    return path / layout.REPORT


def test_the_page_needs_no_network_and_escapes_what_it_shows(page: Path) -> None:
    text = page.read_text()
    outside_of_plotly = text[: text.index("plotly.js v")] + text[text.index('id="data"') :]
    assert not re.search(r"(src|href)=\"?https?:", outside_of_plotly)
    assert "<script>alert(1)" not in text
    assert "name=&lt;run&gt;" in text
    data = data_of(page)
    assert len(data["slices"]) == NUM_SLICES
    assert data["slices"][3]["path"] == "Testing/<glioma>/3.jpg"
    assert data["slices"][3]["subsets"] == ["all"]
    assert [shown["epoch"] for shown in data["maps"]] == [1, 2]
    assert data["subsets"] == ["all", "clean", "strict"]
    assert list(data["confusion"]) == ["all", "clean"]  # too few are strict for figures by class
    assert sum(card["size"] for card in data["cards"]) == NUM_SLICES
    assert data["cards"][0]["labels"] == [["glioma", 4]]
    assert data["chosen"]["responsibility"] == [0.925] * NUM_SLICES
    assert "blank &lt;slice&gt;" in text
    assert "not distinguishable from its control c in accuracy on all test slices: +0.250" in text
    assert all(cell in text for cell in ("slice by slice", "+0.250", "3 of 4", "0.62"))
    assert all(cell in text for cell in ("all (1,221)", "head, balanced accuracy", "0.713"))


def test_copies_with_different_labels_are_listed_group_by_group(page: Path) -> None:
    text = page.read_text()
    assert "Copies with different labels (3)" in text
    rows = [
        "".join(f'<td class="text">{cell}</td>' for cell in cells)
        for cells in (
            ("Training/&lt;a&gt;/1.png", "", "glioma"),
            ("Training/&lt;b&gt;/1.png", "", "pituitary"),
            ("Training/&lt;b&gt;/2.nii", "axial=7", ""),
        )
    ]
    places = [text.index(row) for row in rows]
    assert places == sorted(places)


def test_evidence_glows_on_the_slice_and_the_rest_stays_grey(page: Path) -> None:
    shown = data_of(page)["explained"][0]
    assert shown["path"] == "Testing/<glioma>/3.jpg"
    before, after = (picture_of(shown[name]) for name in ("image", "blended"))
    assert before.shape == (32, 32)
    assert np.abs(after[16:, 16:] - 100).max() < 12  # of JPEG
    assert after[2:6, 2:6].mean() > 140  # inferno ends in a pale yellow


def test_sizes_of_clusters_are_those_of_all_slices(tmp_path: Path) -> None:
    """Whatever part of them is shown."""
    folder, table = Folder(tmp_path / "scored"), predictions(1)
    metrics = {"epoch": 2.0, "test/all/head/accuracy": 0.75, "num_rejected": 0.0}
    write_evaluation_page(
        folder,
        "scored",
        table,
        rejected=REJECTED.empty_table(),
        classes=CLASSES,
        evaluation=EvaluationConfig(tsne_max_slices=6),
        metrics=metrics | {"num_without_class": 0.0, "num_outside_of_test": 0.0},
        about={},
        settings="run: a\n",
    )
    data = data_of(tmp_path / "scored" / layout.REPORT)
    assert len(data["slices"]) < table.num_rows
    sizes = Counter(table["cluster"].to_pylist())
    assert {card["cluster"]: card["size"] for card in data["cards"]} == sizes
    assert all(sum(count for _, count in card["labels"]) == card["size"] for card in data["cards"])
    labels, heads = (table[name].to_pylist() for name in ("label", "head"))
    expected = confusion_counts(labels, heads, CLASSES).tolist()
    assert data["confusion"]["all"]["head"] == expected


def test_typical_slices_are_the_surest_and_borderline_ones_the_least_sure(tmp_path: Path) -> None:
    """Of equally sure ones, the likelier is the more typical."""
    table = predictions(1, 12)
    members = {1: (0.9, -2.0), 4: (0.5, 3.0), 7: (0.7, 0.0), 10: (0.9, -1.0)}
    rows = table.to_pylist()
    assert [number for number, row in enumerate(rows) if row["cluster"] == 1] == list(members)
    for number, (sure, likelihood) in members.items():
        rows[number]["responsibilities"] = [1 - sure, sure, 0.0, 0.0]
        rows[number]["log_likelihood"] = likelihood
    write_evaluation_page(
        Folder(tmp_path / "scored"),
        "scored",
        pa.Table.from_pylist(rows, schema=PREDICTIONS),
        rejected=REJECTED.empty_table(),
        classes=CLASSES,
        evaluation=EvaluationConfig(),
        metrics={"epoch": 2.0, "test/all/head/accuracy": 0.75, "num_rejected": 0.0}
        | {"num_without_class": 0.0, "num_outside_of_test": 0.0},
        about={},
        settings="run: a\n",
    )
    cards = data_of(tmp_path / "scored" / layout.REPORT)["cards"]
    (card,) = (card for card in cards if card["cluster"] == 1)
    assert card["typical"] == [10, 1, 7, 4]
    assert card["borderline"] == [4, 7, 1, 10]


def test_clusters_of_one_class_are_its_subtypes(page: Path) -> None:
    data = data_of(page)
    classes = {card["cluster"]: card["class"] for card in data["cards"]}
    assert classes == dict(enumerate([*CLASSES, "glioma"]))
    (kind,) = data["subtypes"]
    assert kind["class"] == "glioma"
    assert kind["ari"] == 1.0
    assert kind["runs"] == ["seed1"]
    assert [(part["cluster"], part["size"]) for part in kind["clusters"]] == [(0, 4), (3, 4)]
    assert all(part["stable"] for part in kind["clusters"])


def page_of(
    folder: Path,
    history: list[dict[str, float]],
    metrics: dict[str, float],
    limit: int = NUM_SLICES,
    maps: Sequence[SliceMap] = (),
    siblings: dict[str, pa.Table] | None = None,
) -> Path:
    """The page of a run of which the first epoch was chosen."""
    run = Folder(folder)
    run.write_json_lines(layout.METRICS, history)
    run.write_bytes(layout.CONFIG, b"name: run\n")
    run.write_table(layout.predictions_file(1), predictions(1))
    evaluation, metrics = EvaluationConfig(tsne_max_slices=limit), {"chosen_epoch": 1.0} | metrics
    write_page(run, CLASSES, evaluation, metrics, {}, maps, siblings=siblings)
    return folder / layout.REPORT


def evaluation_page_of(
    folder: Path,
    metrics: dict[str, float],
    table: pa.Table,
    limit: int = NUM_SLICES,
    rejected: Sequence[dict[str, str]] = (),
    num_seen: dict[str, int] | None = None,
) -> Path:
    write_evaluation_page(
        Folder(folder),
        "scored",
        table,
        rejected=pa.Table.from_pylist(list(rejected), schema=REJECTED),
        classes=CLASSES,
        evaluation=EvaluationConfig(tsne_max_slices=limit),
        metrics={"epoch": 2.0} | metrics,
        about={},
        settings="run: a\n",
        num_seen=num_seen,
    )
    return folder / layout.REPORT


def test_clusters_that_other_runs_do_not_find_are_not_stable(tmp_path: Path) -> None:
    rows = predictions(1).to_pylist()
    for number, row in enumerate(rows):
        if row["head"] == "glioma" or row["label"] == "glioma":
            row["cluster"] = 3 if number < NUM_SLICES // 2 else 0
    siblings = {"other": pa.Table.from_pylist(rows, schema=PREDICTIONS)}
    (kind,) = data_of(page_of(tmp_path, [{"epoch": 1.0}], {}, siblings=siblings))["subtypes"]
    assert [part["stable"] for part in kind["clusters"]] == [False, False]


def test_sizes_of_subtypes_are_those_of_all_slices(tmp_path: Path) -> None:
    (of_run,) = data_of(page_of(tmp_path / "run", [{"epoch": 1.0}], {}, limit=4))["subtypes"]
    scored = evaluation_page_of(tmp_path / "scored", {}, predictions(1), limit=4)
    (of_evaluation,) = data_of(scored)["subtypes"]
    for kind in (of_run, of_evaluation):
        assert [(part["cluster"], part["size"]) for part in kind["clusters"]] == [(0, 4), (3, 4)]


def test_a_map_shows_what_its_own_epoch_predicted(tmp_path: Path) -> None:
    table = predictions(1)
    points = np.zeros((NUM_SLICES, 2), np.float32)
    maps = [
        SliceMap(epoch, points, rows)
        for epoch, rows in ((1, table.take(list(reversed(range(NUM_SLICES))))), (2, table))
    ]
    first, second = data_of(page_of(tmp_path, [{"epoch": 1.0}], {}, maps=maps))["maps"]
    assert second["head"] == table["head"].to_pylist()
    assert first["head"] == second["head"][::-1] != second["head"]


def test_head_and_clusters_have_confusions_of_their_own(page: Path) -> None:
    found = data_of(page)["confusion"]["all"]
    assert found["head"] != found["cluster_class"] == (8 * np.eye(3, dtype=int)).tolist()


def test_slices_of_volumes_and_without_a_label_are_shown_as_such(tmp_path: Path) -> None:
    rows = predictions(1, 4).to_pylist()
    rows[1] |= {"label": None, "frame": "axial=7"}
    table = pa.Table.from_pylist(rows, schema=PREDICTIONS)
    data = data_of(evaluation_page_of(tmp_path, {}, table))
    assert data["slices"][1]["label"] is None
    assert data["slices"][1]["path"].endswith("/1.jpg axial=7")
    assert [card["labels"] for card in data["cards"] if card["cluster"] == 1] == [
        [["(no label)", 1]]
    ]
    assert np.sum(data["confusion"]["all"]["head"]) == 3


def test_of_very_many_unusable_or_conflicting_slices_the_first_are_listed(tmp_path: Path) -> None:
    names = [f"{number:03d}.png" for number in range(101)]
    rejected = [{"path": name, "reason": "blank"} for name in names]
    scored = evaluation_page_of(tmp_path / "scored", {}, predictions(1, 4), rejected=rejected)
    conflicts = [{"path": name, "label": "glioma", "group": "01"} for name in names]
    Folder(tmp_path / "run" / layout.DATASET).write_json(
        layout.LEAKAGE, LEAKAGE | {"label_conflicts": conflicts}
    )
    run = page_of(tmp_path / "run", [{"epoch": 1.0}], {})
    for file, title in ((scored, "Rejected"), (run, "Copies with different labels")):
        text = file.read_text()
        assert f"{title} (101, first 100 shown)" in text
        assert ("099.png" in text, "100.png" in text) == (True, False)


def test_tables_tell_the_time_of_each_part_and_what_was_rejected(tmp_path: Path) -> None:
    times = {"time/train_s": 10.0, "time/embed_s": 3.5, "time/images_per_s": 123.4}
    manifest = {"rejected_reasons": {"blank": 1234, "not an image": 2}}
    Folder(tmp_path / layout.DATASET).write_json(layout.MANIFEST, manifest)
    text = page_of(tmp_path, [{"epoch": 1.0}], times).read_text()
    assert re.findall(r"<th[^>]*>([^<]*)</th>", text[text.index("<h3>Time per epoch") :])[:5] == [
        "",
        "train",
        "embed",
        "images/s in training",
        "seconds",
    ]
    assert "<td>10.0</td><td>3.5</td><td>123</td>" in text
    assert '<th scope="row">blank</th><td>1,234</td>' in text


def test_an_evaluation_tells_its_epoch_and_all_that_it_leaves_out(tmp_path: Path) -> None:
    counts = {
        "num_rejected": 1.0,
        "num_without_class": 2.0,
        "num_slices_without_class": 3.0,
        "num_outside_of_test": 4.0,
        "num_ignored_files": 5.0,
    }
    text = evaluation_page_of(
        tmp_path,
        counts | {"epoch": 7.0},
        predictions(1),
        limit=3,
        num_seen={"exact": 2, "near": 1},
    ).read_text()
    assert "The encoder of epoch 7 predicted these slices." in text
    assert "images show 3 of 24 slices" in text
    assert (
        "Left out: 1 rejected, 2 without a class, 3 slices without a class in other files, "
        "4 outside the test split, 5 of other types." in text
    )
    for level, count in (("exact", 2), ("near", 1)):
        assert f'<th scope="row">{level}</th><td>{count}</td>' in text


def test_the_summary_says_so_if_no_test_slice_has_a_label(tmp_path: Path) -> None:
    text = page_of(tmp_path, [{"epoch": 1.0}], {"test/all/num_slices": 0.0}).read_text()
    assert "None of the test slices has a label: predictions are not scored." in text
    assert "an unknown share" not in text


@pytest.mark.parametrize(
    ("of_clean_slices", "said"),
    [
        (
            {"head/accuracy": 0.73, "cluster/accuracy": 0.64, "thumbnail_1nn/accuracy": 0.55},
            "correctly and 73.0 % of the clean ones, which have no upright copy in the data that "
            "the run saw; the clusters 82.0 % and 64.0 %. Copying the label of the most similar "
            "thumbnail gets 55.0 % of the clean ones right.",
        ),
        (
            {"num_slices": 0.0},
            "correctly, the clusters 82.0 %. "
            "No labelled slice is clean: the run saw a copy of each.",
        ),
        (
            {},
            "correctly, the clusters 82.0 %. "
            "Which slices are clean (no upright copy in the data that the run saw) is unknown.",
        ),
    ],
)
def test_the_summary_tells_the_chosen_epoch_and_how_all_and_clean_slices_fare(
    tmp_path: Path, of_clean_slices: dict[str, float], said: str
) -> None:
    metrics = {"test/all/head/accuracy": 0.91, "test/all/cluster/accuracy": 0.82}
    metrics |= {f"test/clean/{name}": value for name, value in of_clean_slices.items()}
    text = page_of(tmp_path, [{"epoch": 1.0}, {"epoch": 2.0}], metrics).read_text()
    chosen = "Epoch 1 of 2 was chosen on held-out labelled slices."
    assert f"{chosen} The head classifies 91.0 % of all labelled test slices {said}" in text


def test_a_curve_has_a_gap_where_an_epoch_logged_nothing_and_axes_hold_all_values(
    tmp_path: Path,
) -> None:
    history = [
        {"epoch": 1.0, "validation/head/accuracy": 0.5},
        {"epoch": 2.0, "validation/head/accuracy": 0.9, "train/loss/total": 0.25},
    ]
    losses, accuracies = data_of(page_of(tmp_path, history, {}))["charts"]
    assert losses["epochs"] == accuracies["epochs"] == [1, 2]
    assert [curve["values"] for curve in losses["curves"]] == [[None, 0.25]]
    assert [curve["values"] for curve in accuracies["curves"]] == [[0.5, 0.9]]
    least, most = accuracies["range"]
    assert 0.4 < least < 0.5
    assert 0.9 < most < 1.0


def test_an_axis_of_accuracies_ends_just_above_1(tmp_path: Path) -> None:
    history = [{"epoch": 1.0, "validation/head/accuracy": 1.0}]
    (chart,) = data_of(page_of(tmp_path, history, {}))["charts"]
    assert chart["range"] == [0.95, 1.02]


def test_an_evaluation_has_a_page_too(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "scored")
    rejected = pa.Table.from_pylist(
        [{"path": "<a>.dcm", "frame": "frame=7", "reason": "blank image"}], schema=REJECTED
    )
    write_evaluation_page(
        folder,
        "scored",
        predictions(1),
        rejected=rejected,
        classes=CLASSES,
        evaluation=EvaluationConfig(tsne_max_slices=10),
        metrics={"epoch": 2.0, "test/all/head/accuracy": 0.75, "num_rejected": 1.0}
        | {"num_without_class": 3.0, "num_outside_of_test": 0.0},
        about={"model": "/runs/a/best"},
        settings="run: a\n",
    )
    text = (tmp_path / "scored" / layout.REPORT).read_text()
    assert "Rejected (1)" in text
    assert "&lt;a&gt;.dcm" in text
    assert "frame=7" in text
    assert "75.0 % of all labelled slices correctly" in text
    assert "Left out: 1 rejected, 3 without a class." in text
    shown = data_of(tmp_path / "scored" / layout.REPORT)
    assert len(shown["slices"]) == 10
    assert shown["slices"][-1]["path"].endswith("/23.jpg")  # not the first ten
    assert [drawn["epoch"] for drawn in shown["maps"]] == [2]


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def picture_of(uri: str) -> np.ndarray:
    content = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)), dtype=float)


def test_a_run_without_test_slices_has_no_page(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    write_page(run, CLASSES, EvaluationConfig(), {"chosen_epoch": 1.0}, {}, [])
    assert not run.exists(layout.REPORT)


ACTIONS = """
<script>
const state = {};
const set = (name, value) => { byId(name).value = value;
  byId(name).dispatchEvent(new Event("input")); };
state.all = byId("count").textContent;
set("of-class", "glioma"); state.glioma = byId("count").textContent;
set("of-outcome", "wrong"); state.wrong = byId("count").textContent;
set("of-class", ""); set("of-outcome", ""); set("of-subset", "clean");
state.clean = byId("count").textContent;
set("of-subset", "all"); set("confidence", 0.9); state.sure = byId("count").textContent;
set("confidence", 0); set("epoch", 0); state.epoch = byId("epoch-name").textContent;
setTimeout(() => { // Plotly draws behind the scenes
const map = byId("map"), area = map.querySelector(".nsewdrag");
const box = area.getBoundingClientRect(), axes = map._fullLayout;
area.dispatchEvent(new MouseEvent("mousemove", { bubbles: true,
  clientX: box.left + axes.xaxis.d2p(map.data[1].x[2]),
  clientY: box.top + axes.yaxis.d2p(map.data[1].y[2]) }));
setTimeout(() => {
state.legend = [...map.querySelectorAll(".legendtext")].map(item => item.textContent);
state.hovered = document.querySelector("#shown img").alt;
state.image = document.querySelector("#shown img").src === slices[7].image;
byId("next").focus(); state.focus = document.activeElement.id;
byId("next").click(); state.next = document.querySelector("#shown img").alt;
document.querySelectorAll("#matrix button")[1].click();
state.cell = document.querySelectorAll("#cell img").length;
state.wrong_cell = document.querySelectorAll("#cell .wrong").length;
state.caption = document.querySelector("#cell figcaption").textContent;
const row = document.querySelectorAll("#matrix tbody tr:first-child td");
state.counts = [...row].map(item => item.textContent);
state.shades = [...row].map(item => parseFloat(item.style.background.split(",")[3]));
state.card = document.querySelector("#cards figcaption").textContent;
state.wrong_cards = document.querySelectorAll("#cards .wrong").length;
state.wrong_pairs = document.querySelectorAll("#pairs .wrong").length;
state.chosen = document.querySelector(".chart").layout.shapes.map(line => [line.x0, line.x1]);
byId("map").focus();
byId("map").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
state.arrow = document.querySelector("#shown img").alt;
state.reached = [...document.querySelectorAll(
  "button:not(:disabled), select, input, .scroll, #map, nav a")].filter(
  item => item.checkVisibility()).every(
  item => { item.focus(); return document.activeElement === item; });
state.pairs = document.querySelectorAll("#pairs img").length;
const kind = byId("explained-kind"); kind.value = "wrong"; kind.dispatchEvent(new Event("change"));
state.errors = document.querySelectorAll("#pairs figure").length;
state.subtypes = byId("kinds").textContent;
for (const event of ["mousedown", "mouseup"])
  map.querySelector(".legendtoggle").dispatchEvent(new MouseEvent(event, { bubbles: true }));
setTimeout(() => {
const hidden = () => map._fullData.filter(trace => trace.visible === "legendonly");
state.hidden = hidden().map(trace => trace.name);
state.left = byId("count").textContent;
const seen = new Set();
for (let i = 0; i < 24; i++) { byId("next").click(); seen.add(slices[current].label); }
state.stepped = [...seen].sort();
const mark = byId("ring"), at = map._fullLayout, last = maps[+byId("epoch").value];
state.ring = mark.hidden || Math.hypot(
  parseFloat(mark.style.left) - at.xaxis._offset - at.xaxis.d2p(last.x[current]),
  parseFloat(mark.style.top) - at.yaxis._offset - at.yaxis.d2p(last.y[current]));
set("colour", "cluster"); state.hidden_clusters = hidden().length;
state.innerWidth = window.innerWidth;
state.width = document.documentElement.scrollWidth <= window.innerWidth;
window.parent.postMessage(JSON.stringify(state), "*");
}, 1000); }, 500); }, 1500);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_filters_hover_and_galleries_work_in_a_browser(page: Path, width: int) -> None:
    state = state_after(ACTIONS, page, width)
    assert (state["all"], state["glioma"], state["wrong"], state["clean"]) == ("24", "8", "2", "12")
    assert state["sure"] == "0"
    assert state["epoch"] == "1"
    assert state["legend"] == CLASSES
    assert state["hovered"] == "slice Testing/<2>/7.jpg"
    assert state["image"] is True
    assert state["focus"] == "next"
    assert state["next"] == f"slice Testing/<{CLASSES[2]}>/8.jpg"
    assert state["cell"] == state["wrong_cell"] == 2  # gliomas taken for no tumour
    assert state["caption"] == "glioma: 2 0.80 wrong"
    assert state["counts"] == ["6 (75 %)", "2 (25 %)", "0"]
    assert state["shades"] == pytest.approx([3 * state["shades"][1], 0.15, 0.0])
    assert (state["card"], state["wrong_cards"]) == ("glioma: glioma 0.93", 0)
    assert state["wrong_pairs"] == 1
    assert state["chosen"] == [[2, 2]]
    assert state["arrow"] == "slice Testing/<2>/7.jpg"
    assert state["reached"] is True
    assert (state["pairs"], state["errors"]) == (4, 1)
    assert "glioma: 2 clusters" in state["subtypes"]
    assert "Jaccard index of 1.00: stable" in state["subtypes"]
    assert state["left"] == str(24 - 8)
    assert state["stepped"] == sorted(CLASSES[1:])
    assert state["ring"] < 1  # pixels from its slice, though the axes have moved
    assert (state["hidden"], state["hidden_clusters"]) == ([CLASSES[0]], 0)  # not the first cluster
    assert state["innerWidth"] == width
    assert state["width"] is True


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_six_thousand_points_stay_fluid(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    num_slices, rng = 6000, np.random.default_rng(0)
    table = predictions(1, num_slices)
    # Coarse noise, of which JPEG makes a quarter more than of real slices.
    coarse = rng.integers(0, 256, (num_slices, THUMBNAIL_SIDE // 4, THUMBNAIL_SIDE // 4), np.uint8)
    sides = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    noise = [cv2.resize(image, sides, interpolation=cv2.INTER_LINEAR).tobytes() for image in coarse]
    column = table.schema.get_field_index("thumbnail")
    table = table.set_column(column, "thumbnail", pa.array(noise))
    run = Folder(tmp_path / "run")
    run.write_json_lines(layout.METRICS, [{"epoch": 1.0, "train/loss/total": 1.0}])
    run.write_bytes(layout.CONFIG, b"name: run\n")
    run.write_table(layout.predictions_file(1), table)
    shown = EvaluationConfig(tsne_epochs=(1,), tsne_max_slices=num_slices)
    write_page(run, CLASSES, shown, {"chosen_epoch": 1.0}, {}, run_maps(run, shown, 1))
    page_file = tmp_path / "run" / "report.html"
    assert page_file.stat().st_size < 25e6

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--enable-unsafe-swiftshader"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(page_file.as_uri())
        page.wait_for_function("byId('map')._fullLayout && byId('count').textContent === '6000'")
        seconds: dict[str, float] = page.evaluate(TIMED)
        browser.close()
    assert seconds["filter"] < 0.5
    assert seconds["hover"] < 0.1
    assert seconds["zoom"] < 0.5


# The median time in seconds until the browser has drawn what was asked for.
TIMED = """async () => {
  const drawn = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  const map = byId("map"), area = map.querySelector(".nsewdrag");
  const box = area.getBoundingClientRect(), axes = map._fullLayout;
  const timed = async (act) => {
    const times = [];
    for (let i = 0; i < 9; i++) {
      const started = performance.now();
      await act(i);
      await drawn();
      times.push(performance.now() - started);
    }
    return times.sort((a, b) => a - b)[4] / 1000;
  };
  return {
    filter: await timed(i => {
      byId("of-class").value = i % 2 ? "glioma" : "";
      byId("of-class").dispatchEvent(new Event("input"));
    }),
    hover: await timed(i => area.dispatchEvent(new MouseEvent("mousemove", { bubbles: true,
      clientX: box.left + axes.xaxis.d2p(map.data[1].x[10 * i]),
      clientY: box.top + axes.yaxis.d2p(map.data[1].y[10 * i]) }))),
    zoom: await timed(i => Plotly.relayout(map, {
      "xaxis.range": [-20 - i, 20 + i], "yaxis.range": [-20 - i, 20 + i] })),
  };
}"""
