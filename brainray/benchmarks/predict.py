"""Prediction on Ray Data against the bare model and the limit set by decoding and the model."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from brainray.benchmarks.result import BenchmarkResult, CaseOptions, Measure
from brainray.benchmarks.samples import SALT, spread
from brainray.benchmarks.timing import OURS, one_thread, side_by_side
from brainray.config import Config
from brainray.config_text import load_config
from brainray.engine.epoch import embed
from brainray.engine.forward import autocast
from brainray.engine.shard import CachedImages
from brainray.engine.slice_model import SliceModel, use_all_threads
from brainray.log import log
from brainray.mri.phantom import write_phantoms
from brainray.orchestration.blocks import arrow_blocks
from brainray.orchestration.prediction.inference import (
    Predictor,
    find_predictor,
    predicted_blocks,
    predicted_slices,
)
from brainray.orchestration.preprocessing.driver import preprocess
from brainray.orchestration.preprocessing.slice_rows import decode_to_predict, read_file
from brainray.orchestration.preprocessing.source import SourceFile, list_source
from brainray.orchestration.ray_connection import attach_to_ray
from brainray.orchestration.store import ImageStore, read_images
from brainray.orchestration.training.driver import train
from brainray.schema import TRAIN
from brainray.storage import Folder

MIN_EFFICIENCY = 0.9
SIDE = 256  # pixels of a file

_NUM_LOOPED = 300  # files
_LOOP_ROUNDS = 3  # before the jobs and again after them
_NUM_CLASSES = 4


def run(options: CaseOptions) -> BenchmarkResult:
    """Images per second of prediction, on decoded slices and on files, against plain loops.

    Rates of Ray Data are marginal: they come from the difference in time between the whole set and
    a quarter of it (medians of three). The start of Ray's processes is reported separately. The
    limit for files is the time of decoding them in plain loops on all cores and of embedding them
    from memory, with the faster of our embedding and the bare model.
    """
    os.environ["RAY_ADDRESS"] = "local"  # the rate of this machine, not of a cluster
    attach_to_ray()
    each = 300 if options.quick else 1500
    with tempfile.TemporaryDirectory(prefix="brainray-benchmark-") as temporary:
        storage = Path(temporary)
        log(f"generating {_NUM_CLASSES * each} phantoms of {SIDE} x {SIDE}")
        config = _config(storage, options.seed)
        quarter, store = (
            _store(config, storage / name, num_slices, options)
            for name, num_slices in (("quarter", each // 4), ("slices", each))
        )
        train(config.model_copy(update={"name": "model", "dataset": "slices"}))
        config = config.model_copy(update={"run": "model"})
        predictor = find_predictor(config)
        files = [
            file
            for file in list_source(Folder(storage / "slices"), None, {}).files
            if file.split == TRAIN
        ]
        log("the plain loops")
        config = config.model_copy(update={"source": str(storage / "slices")})
        looped = spread(files, _NUM_LOOPED)
        decode_rates = _decode_rates(looped, config, predictor)
        embedding = _embedding(store, predictor)
        log("Ray Data on decoded slices")
        slices_rate, _ = _marginal(
            partial(_predict_slices, quarter, config, predictor),
            partial(_predict_slices, store, config, predictor),
        )
        log("Ray Data on files")
        files_rate, start_s = _marginal(
            partial(_predict_files, spread(files, each), config, predictor),
            partial(_predict_files, files, config, predictor),
        )
        decode_rates += _decode_rates(looped, config, predictor)
    cores, device = len(os.sched_getaffinity(0)), embedding.device
    decode_rate = statistics.median(decode_rates)
    limit = _limit(cores * decode_rate, max(embedding.bare_rate, embedding.our_rate), device)
    return BenchmarkResult(
        [
            Measure(f"bare model on {device}", embedding.bare_rate, "img/s"),
            Measure(
                "embedding from memory against the bare model",
                embedding.our_rate / embedding.bare_rate,
                "x",
            ),
            Measure("plain decoding, one thread", decode_rate, "img/s"),
            Measure("prediction of decoded slices", slices_rate, "img/s"),
            Measure(
                "decoded slices against the bare model",
                slices_rate / embedding.bare_rate,
                "x",
                at_least=MIN_EFFICIENCY,
            ),
            Measure("prediction of files", files_rate, "img/s"),
            Measure(
                f"files against what {cores} cores allow",
                files_rate / limit,
                "x",
                at_least=MIN_EFFICIENCY,
            ),
            Measure("start of prediction", start_s, "s"),
        ],
        {
            "num_slices": 4 * each,
            "cores": cores,
            "device": device,
            "limit": limit,
            "plain_decoding_images_per_s": decode_rates,
        },
    )


def _limit(decode_rate: float, embed_rate: float, device: str) -> float:
    """Files per second that decoding on all cores and embedding allow together."""
    if device == "cpu":  # they share the cores
        return 1 / (1 / decode_rate + 1 / embed_rate)
    return min(decode_rate, embed_rate)


def _config(storage: Path, seed: int) -> Config:
    return load_config(
        None,
        [
            f"storage={storage}",
            f"seed={seed}",
            f"tracking.uri=sqlite:///{storage}/mlflow.db",
            "preprocess.subject.estimate=false",
            "split.labelled_fraction=0.5",
            "train.image_size=128",
            "train.num_epochs=1",
            "train.num_workers=1",
            "evaluation.tsne_epochs=[]",
        ],
    )


def _store(config: Config, source: Path, each: int, options: CaseOptions) -> ImageStore:
    """An image store with ``each`` phantoms of each class."""
    write_phantoms(
        source,
        num_training_per_class=each,
        num_testing_per_class=1,
        seed=options.seed,
        size=SIDE,
    )
    named = {"name": source.name, "source": str(source)}
    return preprocess(config.model_copy(update=named))


def _decode_rates(files: list[SourceFile], config: Config, predictor: Predictor) -> list[float]:
    """Files decoded per second by one process on one thread, several times after a warm-up."""
    source = Folder(str(config.source))

    def rate() -> float:
        started = time.perf_counter()
        for file in files:
            decode_to_predict(
                file, partial(read_file, source, file.file), predictor.preprocess, SALT
            )
        return len(files) / (time.perf_counter() - started)

    with one_thread():
        rate()
        return [rate() for _ in range(_LOOP_ROUNDS)]


@dataclass(frozen=True)
class _Embedding:
    """Slices per second from memory, on all threads."""

    bare_rate: float  # the bare model in a plain loop
    our_rate: float
    device: str


def _embedding(store: ImageStore, predictor: Predictor) -> _Embedding:
    """Our embedding and the bare model on the training slices of a store, alternating."""
    use_all_threads()
    model = SliceModel(predictor.checkpoint)
    ids = _training_ids(store)
    side = predictor.checkpoint.image_size
    images = torch.from_numpy(read_images(store.folder, ids, TRAIN, side)).to(model.device)
    scale = predictor.checkpoint.scale
    batch_size = predictor.checkpoint.config.train.embed_batch_size

    @torch.inference_mode()
    def bare() -> float:
        model.encoder.eval()
        with autocast(model.device, model.precision):
            logits = [
                model.encoder(scale.standardise(scale.to_unit(batch))).logits
                for batch in images.split(batch_size)
            ]
        return torch.cat(logits).sum().item()  # synchronises a GPU

    def ours() -> float:
        output = embed(
            model.encoder,
            CachedImages(images),
            scale=scale,
            batch_size=batch_size,
            precision=model.precision,
        )
        return output.logits.sum().item()

    timed = side_by_side({OURS: ours, "bare": bare}, rounds=3)
    rates = {name: len(ids) / found.seconds for name, found in timed.items()}
    return _Embedding(rates["bare"], rates[OURS], model.device.type)


def _training_ids(store: ImageStore) -> list[str]:
    index = store.index()
    ids: list[str] = index.filter(pc.equal(index["split"], TRAIN))["sample_id"].to_pylist()
    return ids


def _marginal(some: Callable[[], int], all_of_them: Callable[[], int]) -> tuple[float, float]:
    """(slices per second without start-up, seconds of start-up), from a part and the whole."""
    timed = side_by_side({"some": some, "all": all_of_them}, rounds=3, warm_up=False)
    some_of_them, everything = timed["some"], timed["all"]
    rate = (everything.result - some_of_them.result) / (everything.seconds - some_of_them.seconds)
    return rate, everything.seconds - everything.result / rate


def _predict_slices(store: ImageStore, config: Config, predictor: Predictor) -> int:
    return _num_rows(arrow_blocks(predicted_slices(store, _training_ids(store), config, predictor)))


def _predict_files(files: list[SourceFile], config: Config, predictor: Predictor) -> int:
    return _num_rows(arrow_blocks(predicted_blocks(files, config, predictor)))


def _num_rows(blocks: Iterable[pa.Table]) -> int:
    return sum(block.num_rows for block in blocks)
