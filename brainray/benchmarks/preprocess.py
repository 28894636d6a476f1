"""Preprocessing on Ray Data against a plain loop of the same functions."""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa
from matplotlib.figure import Figure
from numpy.typing import NDArray

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.samples import SALT, load_slices, perturbed
from brainray.benchmarks.timing import OURS, one_thread, side_by_side
from brainray.config import Config
from brainray.config_text import load_config
from brainray.errors import DataError
from brainray.log import log
from brainray.mri import resize
from brainray.mri.decode import check_content, decode_file
from brainray.mri.identity import content_hash
from brainray.mri.skull_strip import (
    BLUR_SIGMA,
    KERNEL_RADIUS,
    THRESHOLD_RELAXATION,
    apply_mask,
    otsu_mask,
)
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.preprocessing.slice_rows import (
    SLICES,
    decode_options,
    preprocess_file,
    read_file,
)
from brainray.orchestration.preprocessing.source import FoundFile
from brainray.orchestration.ray_connection import attach_to_ray
from brainray.report.style import BLUE, new_figure
from brainray.storage import Folder

SIDE = 512  # pixels
MIN_EFFICIENCY = 0.85
MAX_MEMORY_GROWTH = 1.15
MIN_STRIP_SPEEDUP = 2.0
MIN_STRIP_IOU = 0.995

_LOOP_FILES = 1000
_LOOP_ROUNDS = 3  # before the jobs and again after them
_ROWS_PER_PART = 128
_RAY_STARTS_S = 10.0  # the dashboard keeps importing after `ray.init`; a running cluster is done


def run(options: CaseOptions) -> BenchmarkResult:
    """Throughput and memory of Ray Data, and the skull strip, against plain loops."""
    num_timed, sizes = (2000, (500, 4000)) if options.quick else (20_000, (5000, 40_000))
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory(prefix="brainray-benchmark-") as temporary:
        folder = Path(temporary)
        log(f"writing {max(num_timed, *sizes)} distinct slices of {SIDE} x {SIDE}")
        files = _write_slices(
            folder / "slices",
            load_slices(options.source, options.seed),
            max(num_timed, *sizes),
            rng,
        )
        speedup, iou = _strip_against_opencv(files[: 40 if options.quick else 200])
        log("the plain loop")
        loop_rates = _loop_rates(files, folder / "before")
        cores = len(os.sched_getaffinity(0))
        log(f"{cores} plain loops in parallel")
        parallel_rate = _parallel_loops(files, folder / "beside", cores)
        profile = _profile(files[:200], folder / "profile")
        runs = {}
        for count in sorted({num_timed, *sizes}):
            log(f"the Ray Data job on {count} slices")
            runs[count] = _ray_job(_linked(files[:count], folder / f"{count}"), folder / "storage")
        loop_rates += _loop_rates(files, folder / "after")
    loop_rate = statistics.median(loop_rates)
    streaming = runs[num_timed]["seconds"]["decode"] + runs[num_timed]["seconds"]["write"]
    whole = sum(runs[num_timed]["seconds"].values())
    small, large = (runs[size]["peak_bytes"] for size in sizes)
    measures = [
        Measure("plain loop", loop_rate, "img/s"),
        Measure("Ray Data, both passes", num_timed / streaming, "img/s"),
        Measure("whole job with planning and figures", num_timed / whole, "img/s"),
        Measure(
            f"Ray Data against {cores} cores x loop",
            num_timed / streaming / (cores * loop_rate),
            "x",
            at_least=MIN_EFFICIENCY,
        ),
        Measure(
            f"{cores} plain loops side by side against {cores} x loop: what the cores allow",
            parallel_rate / (cores * loop_rate),
            "x",
        ),
        Measure(
            f"peak memory, {sizes[1]} against {sizes[0]} slices",
            large / small,
            "x",
            at_most=MAX_MEMORY_GROWTH,
        ),
        Measure("otsu strip against plain OpenCV", speedup, "x", at_least=MIN_STRIP_SPEEDUP),
        Measure("otsu strip, IoU with plain OpenCV", iou, at_least=MIN_STRIP_IOU),
    ]
    details = {
        "profile_ms_per_slice": profile,
        "runs": {str(count): found for count, found in runs.items()},
        "plain_loop_images_per_s": loop_rates,
        "cores": cores,
        "side": SIDE,
    }
    for stage, milliseconds in profile.items():
        log(f"  {stage:<10} {milliseconds:6.2f} ms per slice")
    return BenchmarkResult(measures, details, _figure(profile))


def _write_slices(
    folder: Path, slices: list[NDArray[np.uint8]], count: int, rng: np.random.Generator
) -> list[Path]:
    """Write enlarged real slices, each perturbed so that no two are copies."""
    folder.mkdir(parents=True)
    files = []
    for number in range(count):
        image = perturbed(slices[number % len(slices)], SIDE, rng)
        files.append(folder / f"{number:06d}.jpg")
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
        files[-1].write_bytes(encoded.tobytes())
    return files


def _linked(files: list[Path], folder: Path) -> Path:
    folder.mkdir()
    for file in files:
        (folder / file.name).hardlink_to(file)
    return folder


def _settings(source: Path, storage: Path) -> Config:
    return load_config(None, [f"source={source}", f"storage={storage}", f"name={source.name}"])


def _loop_rates(files: list[Path], out: Path) -> list[float]:
    """Several rates of the plain loop, so that other load on the machine does not distort them."""
    chosen = files[:_LOOP_FILES]
    return [_plain_loop(chosen, out / str(number)) for number in range(_LOOP_ROUNDS)]


def _parallel_loops(files: list[Path], out: Path, num_loops: int) -> float:
    """Images per second of ``num_loops`` parallel plain loops, each a process with its own files.

    They share only memory, caches and clock, so no scheduler can get more out of the cores.
    """
    chosen = files[: num_loops * _LOOP_FILES]
    shares = [chosen[number::num_loops] for number in range(num_loops)]
    with ProcessPoolExecutor(num_loops, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_plain_loop, [files[:1]] * num_loops, _numbered(out / "first", num_loops)))
        rates = list(pool.map(_plain_loop, shares, _numbered(out, num_loops)))
    return sum(rates)


def _numbered(folder: Path, count: int) -> list[Path]:
    return [folder / str(number) for number in range(count)]


def _plain_loop(files: list[Path], out: Path) -> float:
    """Images per second of reading, preprocessing and writing in one process with one thread."""
    config = _settings(files[0].parent, out).preprocess
    source, target = Folder(files[0].parent), Folder(out)
    with one_thread():
        started = time.perf_counter()
        for start in range(0, len(files), _ROWS_PER_PART):
            rows: list[dict[str, Any]] = []
            for path in files[start : start + _ROWS_PER_PART]:
                file = FoundFile(path.name, 0, 0)
                rows += preprocess_file(read_file(source, file), file, config, SALT)
            table = pa.Table.from_pylist(rows, schema=SLICES)
            _write(target, f"{start}.parquet", table)
        return len(files) / (time.perf_counter() - started)


def _write(folder: Folder, name: str, table: pa.Table) -> None:
    """As the job writes its parts."""
    with folder.table_writer(name, table.schema) as writer:
        writer.write_table(table)


def _profile(files: list[Path], out: Path) -> dict[str, float]:
    """Milliseconds per slice of each stage, on one thread."""
    config = _settings(files[0].parent, out)
    options = decode_options(config.preprocess, SALT)
    spent: dict[str, float] = defaultdict(float)

    def timed(stage: str, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = work(*arguments, **named)
        spent[stage] += time.perf_counter() - started
        return result

    rows = []
    with one_thread():
        for path in files:
            content = timed("read", path.read_bytes)
            timed("hash", content_hash, content)
            image = timed("decode", decode_file, content, options)[0].image
            timed("checks", check_content, image, min_intensity_std=0.0)
            mask = timed("strip", otsu_mask, image)
            stripped = timed("strip", apply_mask, image, mask)
            small = timed("resize", resize.stretch, stripped, config.preprocess.image_size)
            timed("thumbnail", resize.thumbnail, image)
            rows.append({"image": small.tobytes()})
        timed("write", _write, Folder(out), "profile.parquet", pa.Table.from_pylist(rows))
    return {stage: 1000 * seconds / len(files) for stage, seconds in spent.items()}


def _strip_against_opencv(files: list[Path]) -> tuple[float, float]:
    """(speed-up, minimum IoU) of our ``otsu`` strip against the straightforward one.

    Each strips all slices per round, after a round that is not timed.
    """
    options = decode_options(_settings(files[0].parent, files[0].parent).preprocess, SALT)
    images = [decode_file(path.read_bytes(), options)[0].image for path in files]
    contestants = {
        OURS: lambda: [otsu_mask(image) for image in images],
        "plain": lambda: [straightforward_otsu_mask(image) for image in images],
    }
    with one_thread():
        timed = side_by_side(contestants, rounds=5)
    ours, plain = timed[OURS], timed["plain"]
    overlaps = [
        (mask & other).sum() / (mask | other).sum()
        for mask, other in zip(ours.result, plain.result, strict=True)
    ]
    return plain.seconds / ours.seconds, float(min(overlaps))


def straightforward_otsu_mask(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """METHOD A, step 3, written directly with OpenCV: the peer of ``otsu_mask``."""
    side = 2 * KERNEL_RADIUS + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    blurred = cv2.GaussianBlur(image, (0, 0), BLUR_SIGMA)
    otsu, _ = cv2.threshold(blurred, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    binary = (blurred > otsu - THRESHOLD_RELAXATION).astype(np.uint8)
    closed = cv2.morphologyEx(binary, cv2.MORPH_CLOSE, kernel)
    opened = cv2.morphologyEx(closed, cv2.MORPH_OPEN, kernel)
    num_labels, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=8)
    if num_labels == 1:
        return np.ones(image.shape, dtype=np.bool_)
    return np.asarray(labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])))


def _ray_job(source: Path, storage: Path) -> dict[str, Any]:
    """Seconds by stage and peak memory of the job in its own process and Ray cluster."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_preprocess_alone, args=(source, storage, sender))
    process.start()
    sender.close()  # so that the end of the process is noticed
    peak = 0
    while not receiver.poll(0.5) and process.is_alive():
        peak = max(peak, _proportional_bytes(process.pid))
    try:
        seconds = receiver.recv()
    except EOFError:
        raise DataError(f"preprocessing {source} failed, see above") from None
    finally:
        process.join()
    return {"seconds": seconds, "peak_bytes": peak}


def _preprocess_alone(source: Path, storage: Path, sender: Any) -> None:
    os.environ["RAY_ADDRESS"] = "local"  # the rate and memory of this machine, not of a cluster
    attach_to_ray()
    time.sleep(_RAY_STARTS_S)
    store = preprocess(_settings(source, storage))
    sender.send(store.manifest.seconds)


def _proportional_bytes(pid: int | None) -> int:
    """Memory of a process and its descendants, counting shared pages once."""
    total = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # the process has just ended
            continue
    return total


def _figure(profile: dict[str, float]) -> Figure:
    figure = new_figure(7.0, 3.2)
    axes = figure.subplots()
    axes.barh(list(profile), list(profile.values()), color=BLUE)
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds per slice of {SIDE} x {SIDE}, one thread")
    axes.set_title("Preprocessing time by stage")
    return figure
