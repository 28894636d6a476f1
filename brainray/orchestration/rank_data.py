"""A rank's share of the slices of a run, in memory or streamed."""

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from brainray import layout
from brainray.config import Config
from brainray.engine.shard import (
    CachedImages,
    Images,
    RankData,
    SliceShard,
    StreamedImages,
    sample_keys,
)
from brainray.mri.split import inherited_labels
from brainray.orchestration.store import ImageStore
from brainray.schema import (
    ESTIMATED,
    LABELLED,
    SEEN,
    TEST,
    TRAIN,
    UNLABELLED,
    UNLABELLED_ROLE,
    VALIDATION,
)
from brainray.storage import Folder


def load_rank_data(
    config: Config,
    run: Folder,
    store: ImageStore,
    device: torch.device,
    rank: int,
    num_ranks: int,
) -> RankData:
    """Every num_ranks-th slice of each role. Labels come from the run's draw, not the store."""
    class_index = {name: index for index, name in enumerate(store.classes)}

    side = config.train.image_size
    room = int(config.train.cache_gib * 2**30)

    def load(sample_ids: list[str], split: str) -> Images:
        nonlocal room
        num_bytes = len(sample_ids) * side * side
        if num_bytes <= room:
            room -= num_bytes
            return CachedImages(torch.from_numpy(store.images(sample_ids, split, side)).to(device))
        if rank == 0:
            print(f"streaming {len(sample_ids)} slices from disk: train.cache_gib is full")
        return StreamedImages(len(sample_ids), side, store.scan(sample_ids, split, side), device)

    def classes_of(names: pa.ChunkedArray) -> Tensor:
        indices = [class_index.get(name, UNLABELLED) for name in names.to_pylist()]
        return torch.tensor(indices, dtype=torch.int64, device=device)

    def shard(rows: pa.Table, split: str, keys: list[int]) -> SliceShard:
        return SliceShard(
            load(rows["sample_id"].to_pylist(), split),
            torch.tensor(keys, dtype=torch.int64, device=device),
            classes_of(rows["label"]),
        )

    def of_role(role: str) -> pa.Table:
        rows = seen.filter(pc.equal(seen["role"], role)).sort_by("sample_id")
        return rows.take(pa.array(range(rank, rows.num_rows, num_ranks), pa.int64()))

    def training_shard(role: str) -> SliceShard:
        mine = of_role(role)
        return shard(mine, TRAIN, sample_keys(mine["sample_id"].to_pylist()).tolist())

    seen = run.read_table(layout.SEEN, [name for name in SEEN.names if name != "thumbnail"])
    # Subjects that are named are drawn as a whole: who labelled some of their slices only has left
    # the others out. Their slices may be of several classes, too.
    guessed = pc.equal(seen["subject_source"], ESTIMATED)
    subjects = pc.if_else(guessed, seen["subject_id"], None).to_pylist()
    inherited: list[str | None] = [None] * seen.num_rows
    if config.objective.inherit_labels == "subject":
        inherited = inherited_labels(subjects, seen["role"].to_pylist(), seen["label"].to_pylist())
        if rank == 0:
            count = sum(label is not None for label in inherited)
            print(f"{count} unlabelled slices inherit a label of their likely subject", flush=True)
    seen = seen.append_column("inherited", pa.array(inherited, pa.string()))
    test = run.read_table(layout.TEST_SLICES, ["sample_id", "label"])
    test_rows = list(range(rank, test.num_rows, num_ranks))
    unlabelled = of_role(UNLABELLED_ROLE)
    # Labelled slices are read most often, so they are the first to stay in memory.
    return RankData(
        labelled=training_shard(LABELLED),
        validation=training_shard(VALIDATION),
        # Test sets keep byte-identical copies, so the row is the key there.
        test=shard(test.take(pa.array(test_rows, pa.int64())), TEST, test_rows),
        unlabelled=training_shard(UNLABELLED_ROLE),
        inherited=classes_of(unlabelled["inherited"]),
    )
