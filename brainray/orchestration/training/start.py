"""The beginning of a run: the labels drawn for it, and what it sees, saved in its folder."""

import pyarrow as pa
import pyarrow.compute as pc

from brainray import layout
from brainray.clustering.gmm import has_few_rows
from brainray.config import ClusteringConfig, Config, PreprocessConfig
from brainray.engine.recluster import check_num_clusters
from brainray.errors import ClusteringError, ConfigError, DataError
from brainray.log import log
from brainray.mri.leakage import Fingerprints, exposure
from brainray.mri.split import check_validation_share, draw_roles
from brainray.orchestration.run import Run, RunRecord
from brainray.orchestration.seen import (
    all_seen,
    check_validation_is_new,
    seen_by_weights,
    seen_rows,
)
from brainray.orchestration.store import ImageStore
from brainray.schema import LABELLED, SEEN, TEST, TRAIN, UNLABELLED_ROLE, VALIDATION
from brainray.storage import Folder


def check_run_fits(run: Run, store: ImageStore, num_workers: int) -> None:
    """Check that an existing run can resume on the store, with so many workers (0: none needed).

    Raises:
        ConfigError: it was begun on other data, or has fewer labelled slices than workers.
    """
    if run.record.data_hash != store.manifest.data_hash:
        raise ConfigError(
            f"run {run.record.name!r} exists with other data ({run.record.dataset}, hash "
            f"{run.record.data_hash}, now {store.manifest.data_hash}): choose another name"
        )
    _check_ranks(run.record.num_slices, num_workers)


def begin_run(config: Config, store: ImageStore, num_workers: int) -> Run:
    """Create the folder of a new run; the caller holds its lock, and no run has its name.

    Labels are drawn here and saved with the run, together with the fingerprints of every slice that
    the run sees in any role. Workers read labels from this draw only.

    Raises:
        ConfigError: it has more workers than labelled slices, or cannot draw its slices as asked.
        DataError: no labels to learn from, or a class with too few.
        ClusteringError: K does not fit the number of classes or slices.
    """
    folder = Folder(config.storage) / layout.RUNS / config.given("name")
    index = store.index(thumbnails=True)
    train, test = (index.filter(pc.equal(index["split"], split)) for split in (TRAIN, TEST))
    seen = _draw(config, store, train)
    counts = _role_counts(seen)
    num_fitted = counts[LABELLED] + counts.get(UNLABELLED_ROLE, 0)
    check_num_clusters(config.clustering.num_clusters, len(store.manifest.classes), num_fitted)
    if config.clustering.pca_dim > num_fitted:
        raise ClusteringError(
            f"clustering.pca_dim={config.clustering.pca_dim} exceeds the number of training "
            f"slices ({num_fitted}): lower it"
        )
    _note_few_slices(config.clustering, num_fitted)
    _check_ranks(counts, num_workers)
    before = seen_by_weights(config.encoder.weights, Folder(config.storage))
    check_validation_is_new(config, seen, before, store.manifest.preprocess)
    folder.write_table(layout.SEEN, seen)
    folder.delete_file(layout.SEEN_BEFORE, missing_ok=True)  # left by an interrupted start
    if before is not None:
        folder.write_table(layout.SEEN_BEFORE, before)
    everything = all_seen(seen, SEEN.empty_table() if before is None else before)
    folder.write_table(
        layout.TEST_SLICES, _test_slices(test, everything, store.manifest.preprocess)
    )
    _keep_records(store.folder, folder / layout.DATASET)
    record = RunRecord(
        format=layout.RUN_FORMAT,
        name=config.given("name"),
        dataset=config.given("dataset"),
        data_hash=store.manifest.data_hash,
        classes=store.manifest.classes,
        preprocess=store.manifest.preprocess,
        versions=store.manifest.versions,
        subject_salt=store.manifest.subject_salt,
        num_slices=counts,
    )
    run = Run(folder, record)
    run.write_config(config)
    record.write(folder)  # last, since with it the run exists
    return run


def _note_few_slices(config: ClusteringConfig, num_fitted: int) -> None:
    if has_few_rows(num_fitted, config.num_clusters, config.pca_dim, config.covariance_type):
        log(
            f"note: {num_fitted} training slices are few for {config.num_clusters} full "
            f"covariances of {config.pca_dim} dimensions, so that other slices will look like "
            "outliers: set clustering.covariance_type=tied or a lower clustering.pca_dim"
        )


def _keep_records(store: Folder, kept: Folder) -> None:
    """Copy the store's records to the run, because the store may change or be deleted."""
    names = [layout.MANIFEST, layout.LEAKAGE, layout.LEAKAGE_TABLE]
    names += [f"{layout.FIGURES}/{name}" for name in (store / layout.FIGURES).names()]
    for name in names:
        kept.write_bytes(name, store.read_bytes(name))


def _draw(config: Config, store: ImageStore, train: pa.Table) -> pa.Table:
    """``SEEN`` rows of the training slices, with their roles and the labels that may be read."""
    check_validation_share(config.split.validation_fraction)
    labels = train["label"].to_pylist()
    by_subject = config.split.validation == "subject"
    if by_subject and train["subject_id"].null_count == train.num_rows:
        raise ConfigError(
            f"split.validation=subject: the image store {store.folder} has no subjects, given or "
            "estimated; preprocess with subjects in a labels table or with "
            "preprocess.subject.estimate=true, or set split.validation=slice"
        )
    roles = draw_roles(
        labels,
        train["draw_group_id"].to_pylist(),
        train["generation"].to_pylist(),
        related_groups=train["split_group_id" if by_subject else "kin_group_id"].to_pylist(),
        leave_out_related=by_subject,
        labelled_fraction=config.split.labelled_fraction,
        validation_fraction=config.split.validation_fraction,
        seed=config.split.seed,
    )
    if len(store.manifest.classes) < 2:
        raise DataError(
            f"the training slices have only one class ({store.manifest.classes[0]}): at least 2 "
            "are needed"
        )
    readable = [
        label if role in {LABELLED, VALIDATION} else None
        for label, role in zip(labels, roles, strict=True)
    ]
    return seen_rows(train, roles, readable)


def _test_slices(test: pa.Table, seen: pa.Table, preprocess: PreprocessConfig) -> pa.Table:
    """Test slices, in the order of their predictions, with ``clean`` and ``strict``."""
    test = test.sort_by([(name, "ascending") for name in ("sample_id", "path", "frame")])
    if test["label"].null_count == test.num_rows:
        test = test.slice(0, 0)  # nothing to score; use jobs/predict.py for these
    exposed = exposure(Fingerprints.from_table(test), Fingerprints.from_table(seen), preprocess)
    test = test.select(["sample_id", "path", "frame", "label", "thumbnail", "split_group_id"])
    for name, flags in exposed.columns.items():
        test = test.append_column(name, flags)
    return test


def _check_ranks(counts: dict[str, int], num_workers: int) -> None:
    """Every rank needs a labelled slice."""
    if counts[LABELLED] < num_workers:
        raise ConfigError(
            f"{num_workers} workers cannot share {counts[LABELLED]} labelled training slice(s): "
            "lower train.num_workers"
        )


def _role_counts(seen: pa.Table) -> dict[str, int]:
    counted = seen.group_by("role").aggregate([([], "count_all")]).to_pylist()
    return {row["role"]: row["count_all"] for row in sorted(counted, key=lambda row: row["role"])}
