"""Loads a rank's share of a run's slices, in memory or streamed."""

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from brainray import dist, layout
from brainray.config import Config, TrainConfig
from brainray.engine.shard import (
    CachedImages,
    Images,
    RankData,
    SliceShard,
    StreamedImages,
    sample_keys,
)
from brainray.mri.split import inherited_labels
from brainray.orchestration.store import ImageStore, scan_images
from brainray.schema import (
    ESTIMATED,
    LABELLED,
    TEST,
    TRAIN,
    UNLABELLED,
    UNLABELLED_ROLE,
    VALIDATION,
)
from brainray.storage import Folder

_READ_OF_SEEN = ["sample_id", "role", "label", "subject_id", "subject_source"]


def load_rank_data(
    config: Config,
    run: Folder,
    store: ImageStore,
    device: torch.device,
    rank: int,
    num_ranks: int,
) -> RankData:
    """Load every num_ranks-th slice of each role; labels are from the run's draw, not the store."""
    class_index = {name: index for index, name in enumerate(store.manifest.classes)}
    seen = _seen_with_inherited_labels(config, run, store)
    test = run.read_table(layout.TEST_SLICES, ["sample_id", "label"])

    def rows_of_role(role: str) -> pa.Table:
        return seen.filter(pc.equal(seen["role"], role)).sort_by("sample_id")

    def share(rows: pa.Table) -> pa.Table:
        return rows.take(pa.array(range(rank, rows.num_rows, num_ranks), pa.int64()))

    shares = {  # labelled slices are read most often, so they are cached first
        LABELLED: share(rows_of_role(LABELLED)),
        VALIDATION: share(rows_of_role(VALIDATION)),
        TEST: share(test),
        UNLABELLED_ROLE: share(rows_of_role(UNLABELLED_ROLE)),
    }
    images = _load_images(config.train, store, shares, device)

    def classes_of(names: pa.ChunkedArray) -> Tensor:
        indices = [class_index.get(name, UNLABELLED) for name in names.to_pylist()]
        return torch.tensor(indices, dtype=torch.int64, device=device)

    def shard(role: str) -> SliceShard:
        rows = shares[role]
        if role == TEST:  # test sets keep byte-identical copies, so the row number is the key
            keys = list(range(rank, test.num_rows, num_ranks))
        else:
            keys = sample_keys(rows["sample_id"].to_pylist()).tolist()
        return SliceShard(
            images[role],
            torch.tensor(keys, dtype=torch.int64, device=device),
            classes_of(rows["label"]),
        )

    return RankData(
        labelled=shard(LABELLED),
        validation=shard(VALIDATION),
        test=shard(TEST),
        unlabelled=shard(UNLABELLED_ROLE),
        inherited=classes_of(shares[UNLABELLED_ROLE]["inherited"]),
    )


def _seen_with_inherited_labels(config: Config, run: Folder, store: ImageStore) -> pa.Table:
    """The slices that the run sees, with the label that each unlabelled one inherits, if any."""
    seen = run.read_table(layout.SEEN, _READ_OF_SEEN)
    inherited: list[str | None] = [None] * seen.num_rows
    if config.objective.inherit_labels == "subject":
        # Subjects given by metadata are drawn as a whole: slices without a label were deliberately
        # not labelled. They may also have slices of several classes.
        guessed = pc.equal(seen["subject_source"], ESTIMATED)
        subjects = pc.if_else(guessed, seen["subject_id"], None).to_pylist()
        index = store.index()
        train = index.filter(pc.equal(index["split"], TRAIN))
        kin = train["kin_group_id"].take(pc.index_in(seen["sample_id"], train["sample_id"]))
        columns = (seen["role"], seen["label"], kin)
        inherited = inherited_labels(subjects, *(column.to_pylist() for column in columns))
        if config.objective.name != "supervised":  # a control does not use them
            count = sum(label is not None for label in inherited)
            dist.log_once(f"{count} unlabelled slices inherit the label of their estimated subject")
    return seen.append_column("inherited", pa.array(inherited, pa.string()))


def _load_images(
    config: TrainConfig,
    store: ImageStore,
    shares: dict[str, pa.Table],
    device: torch.device,
) -> dict[str, Images]:
    """Load the slices of each role in one pass over the store, in memory while there is room."""
    side = config.image_size
    room = int(config.cache_gib * 2**30)
    images: dict[str, Images] = {}
    places: dict[tuple[str, str], list[tuple[Images, int]]] = {}
    for role, rows in shares.items():
        num_bytes = rows.num_rows * side * side
        if num_bytes <= room:
            room -= num_bytes
            empty = torch.empty((rows.num_rows, 1, side, side), dtype=torch.uint8, device=device)
            images[role] = CachedImages(empty)
        else:
            dist.log_once(f"streaming {rows.num_rows} slices from disk: train.cache_gib is full")
            images[role] = StreamedImages(rows.num_rows, side, device)
        split = TEST if role == TEST else TRAIN
        for row, identity in enumerate(rows["sample_id"].to_pylist()):
            places.setdefault((split, identity), []).append((images[role], row))
    for key, image in scan_images(store.folder, places, side):
        for kept, row in places[key]:
            kept.put(row, image)
    return images
