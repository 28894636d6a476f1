"""A run's folder: its contents, how it is created, and how it is reopened."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from brainray import layout
from brainray.config import WORKER_SETTINGS, Config, SplitConfig
from brainray.config_text import parse_config, parse_yaml, to_yaml
from brainray.engine.recluster import check_num_clusters
from brainray.errors import ClusteringError, ConfigError, DataError
from brainray.mri.leakage import Fingerprints, exposure
from brainray.mri.split import draw_roles
from brainray.orchestration.seen import (
    check_validation_is_new,
    fingerprints_of_seen,
    seen_by_weights,
)
from brainray.orchestration.store import ImageStore, differing_settings, with_defaults
from brainray.schema import LABELLED, SEEN, TEST, TRAIN, UNLABELLED_ROLE, VALIDATION
from brainray.storage import Folder

_FREE_SECTIONS = {
    "name",
    "storage",
    "source",
    "sources",
    "labels",
    "run",
    "checkpoint",
    "epoch",
    "preprocess",
    "classes",
    "study",
    "tracking",
    "registry",
    "tune",
    "label",
}
"""Sections that may differ when a run resumes: they do not affect what it learns."""

_FREE_KEYS = {
    "train": {*WORKER_SETTINGS, "cache_gib"},
    "evaluation": {"control", "num_label_draws", "siblings"},
    "clustering": {"on_collapse"},  # may be changed after a collapse
    "split": {"mode", "test_fraction"},
}
"""Single keys of other sections that may differ."""

_OF_DRAW = {"labelled_fraction", "validation_fraction", "validation", "seed"}


@dataclass(frozen=True)
class Run:
    """An existing run; ``info`` is its ``run.json``."""

    folder: Folder
    info: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        return list(self.info["classes"])

    @property
    def is_complete(self) -> bool:
        return self.folder.exists(layout.SUMMARY)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that must not change when the run resumes, as nested sections."""
        return with_defaults(_without_free(self.info["settings"]), _settings(Config()))

    def saved_config(self) -> Config:
        """The config with which the run was created, without secrets."""
        where = f"{self.folder}/{layout.CONFIG}"
        return parse_config(parse_yaml(self.folder.read_bytes(layout.CONFIG), where))

    def predictions(self, epoch: int | None = None) -> pa.Table | None:
        """``PREDICTIONS`` rows of an epoch, by default the chosen epoch of a complete run; None if
        there are none.
        """
        if epoch is None:
            if not self.is_complete:
                return None
            epoch = int(self.folder.read_json(layout.SUMMARY)["chosen_epoch"])
        name = layout.predictions_file(epoch)
        return self.folder.read_table(name) if self.folder.exists(name) else None

    def test_paths(self) -> set[str]:
        """Paths, relative to the source, of the labelled slices that the run is tested on."""
        slices = self.folder.read_table(layout.TEST_SLICES, columns=["path", "label"])
        return set(slices.filter(pc.is_valid(slices["label"]))["path"].to_pylist())


def open_run(storage: Folder, name: str) -> Run:
    """Open a run; raises DataError if there is none of that name."""
    folder = storage / layout.RUNS / name
    if not folder.exists(layout.RUN):
        raise DataError(f"no run {name!r} in {storage}; existing runs: {_names(storage) or 'none'}")
    return Run(folder, read_run_info(folder))


def data_hash_of(storage: Folder, name: str) -> str | None:
    """Data hash of the run of that name; None if there is no such run."""
    folder = storage / layout.RUNS / name
    return str(read_run_info(folder)["data_hash"]) if folder.exists(layout.RUN) else None


def read_run_info(folder: Folder) -> dict[str, Any]:
    """A run's ``run.json``.

    Raises:
        DataError: another version of brainray wrote it.
    """
    info = folder.read_json(layout.RUN)
    if not isinstance(info, dict):
        raise DataError(f"{folder}/{layout.RUN} is not a run record: choose another name")
    if info.get("format") != layout.RUN_FORMAT:
        raise DataError(
            f"the run {folder} was made by another version of brainray ({info.get('format')}, "
            f"this version reads {layout.RUN_FORMAT}): train under another name"
        )
    return info


def begin_run(config: Config, store: ImageStore, num_workers: int) -> tuple[Run, bool]:
    """Create the run's folder or reopen it; the second value is whether the run resumes.

    Labels are drawn here and saved with the run, together with the fingerprints of every slice that
    the run sees in any role. Workers read labels from this draw only.

    Raises:
        ConfigError: the run exists with other settings or data, or has too many workers.
        DataError: no labels to learn from, or a class with too few.
        ClusteringError: K does not fit the number of classes or slices.
    """
    folder = Folder(config.storage) / layout.RUNS / name_of_run(config)
    settings = _settings(config)
    if folder.exists(layout.RUN):
        info = read_run_info(folder)
        difference = differing_settings(Run(folder, info).settings, settings)
        if difference:
            raise ConfigError(
                f"run {config.name!r} exists with other settings ({difference}): "
                "choose another name, or delete its folder"
            )
        if info["data_hash"] != store.data_hash:
            raise ConfigError(
                f"run {config.name!r} exists with other data ({info['dataset']}, hash "
                f"{info['data_hash']}, now {store.data_hash}): choose another name"
            )
        _check_ranks(info["num_slices"], num_workers)
        return Run(folder, info), True
    seen = _draw(config, store)
    counts = _role_counts(seen)
    num_fitted = counts[LABELLED] + counts.get(UNLABELLED_ROLE, 0)
    check_num_clusters(config.clustering.num_clusters, len(store.classes), num_fitted)
    if config.clustering.pca_dim > num_fitted:
        raise ClusteringError(
            f"clustering.pca_dim={config.clustering.pca_dim} exceeds the number of training "
            f"slices ({num_fitted}): lower it"
        )
    _check_ranks(counts, num_workers)
    before = seen_by_weights(config.encoder.weights, Folder(config.storage))
    check_validation_is_new(config, seen, before, store.preprocess)
    folder.write_table(layout.SEEN, seen)
    folder.delete_file(layout.SEEN_BEFORE, missing_ok=True)  # left by an interrupted start
    if before is not None:
        folder.write_table(layout.SEEN_BEFORE, before)
    folder.write_table(layout.TEST_SLICES, _test_slices(store, folder))
    _keep_records(store.folder, folder / layout.DATASET)
    folder.write_bytes(layout.CONFIG, to_yaml(config).encode())
    info = {
        "format": layout.RUN_FORMAT,
        "name": config.name,
        "dataset": config.dataset,
        "data_hash": store.data_hash,
        "classes": store.classes,
        "preprocess": store.preprocess.model_dump(mode="json"),
        "versions": store.versions,
        "subject_salt": store.manifest["subject_salt"],
        "num_slices": counts,
        "settings": settings,
    }
    folder.write_json(layout.RUN, info)
    return Run(folder, info), False


def check_same_draw(split: SplitConfig, other: Run, purpose: str) -> None:
    """Raises ConfigError if another run on the same data trains or validates on other labels."""
    asked = split.model_dump(mode="json", include=_OF_DRAW)
    defaults = SplitConfig().model_dump(mode="json")
    theirs = {key: (defaults | other.info["settings"]["split"])[key] for key in _OF_DRAW}
    difference = differing_settings(theirs, asked, "split.")
    if difference:
        raise ConfigError(
            f"{purpose}: its run {other.folder.name} was trained on other labels ({difference}); "
            "use the same settings for both"
        )


def name_of_run(config: Config) -> str:
    """The run's name; raises ConfigError if it is not set."""
    if config.name is None:
        raise ConfigError("training needs a name for the run: --set name=NAME")
    return config.name


def _keep_records(store: Folder, kept: Folder) -> None:
    """Copy the store's records to the run, because the store may change or be deleted."""
    names = [layout.MANIFEST, layout.LEAKAGE, layout.LEAKAGE_TABLE]
    names += [f"{layout.FIGURES}/{name}" for name in (store / layout.FIGURES).names()]
    for name in names:
        kept.write_bytes(name, store.read_bytes(name))


def _settings(config: Config) -> dict[str, Any]:
    """All settings that must not change when a run resumes."""
    settings = _without_free(config.model_dump(mode="json"))
    if config.encoder.pretext == "none":
        del settings["self_supervision"]
    return settings


def _without_free(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in _FREE_SECTIONS}
    return kept | {
        section: {key: value for key, value in settings[section].items() if key not in free}
        for section, free in _FREE_KEYS.items()
    }


def _draw(config: Config, store: ImageStore) -> pa.Table:
    index = store.index(thumbnails=True)
    train = index.filter(pc.equal(index["split"], TRAIN))
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
        kin=train["split_group_id" if by_subject else "kin_group_id"].to_pylist(),
        leave_out_kin=by_subject,
        labelled_fraction=config.split.labelled_fraction,
        validation_fraction=config.split.validation_fraction,
        seed=config.split.seed,
    )
    if len(store.classes) < 2:
        raise DataError(
            f"the training slices have only one class ({store.classes[0]}): at least 2 are needed"
        )
    readable = [
        label if role in {LABELLED, VALIDATION} else None
        for label, role in zip(labels, roles, strict=True)
    ]
    columns = {
        "role": pa.array(roles, pa.string()),
        "label": pa.array(readable, pa.string()),
    }
    return pa.table(
        [columns[name] if name in columns else train[name] for name in SEEN.names],
        schema=SEEN,
    )


def _test_slices(store: ImageStore, run: Folder) -> pa.Table:
    """The store's test slices, in the order of their predictions, with ``clean``, ``strict``."""
    index = store.index(thumbnails=True)
    test = index.filter(pc.equal(index["split"], TEST)).sort_by(
        [(name, "ascending") for name in ("sample_id", "path", "frame")]
    )
    if test["label"].null_count == test.num_rows:
        test = test.slice(0, 0)  # nothing to score; use jobs/predict.py for these
    seen = fingerprints_of_seen(run)
    assert seen is not None, "written before"
    exposed = exposure(Fingerprints.of(test), seen, store.preprocess)
    test = test.select(["sample_id", "path", "frame", "label", "thumbnail", "split_group_id"])
    for name, flags in (("clean", exposed.clean), ("strict", exposed.strict)):
        test = test.append_column(name, pa.array(flags, pa.bool_()))
    return test


def groups_of_test_slices(run: Folder) -> dict[str, str]:
    """Resampling group of each of a run's test slices: its copies and its likely subject.

    Empty for a checkpoint alone.
    """
    told = ["sample_id", "split_group_id"]
    if not run.exists(layout.TEST_SLICES):
        return {}
    rows = run.read_table(layout.TEST_SLICES, told)
    ids, groups = (rows[name].to_pylist() for name in told)
    return dict(zip(ids, groups, strict=True))


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


def _names(storage: Folder) -> str:
    """Names of the runs, without folders whose job ended before the run was created."""
    runs = storage / layout.RUNS
    return ", ".join(name for name in runs.names() if (runs / name).exists(layout.RUN))
