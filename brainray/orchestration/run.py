"""A run's folder: its contents, and how it is opened; `training/start.py` creates it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import NonNegativeInt

from brainray import layout
from brainray.config import (
    TRAINING_SECTIONS,
    WORKER_SETTINGS,
    Config,
    PreprocessConfig,
    SplitConfig,
)
from brainray.config_text import parse_saved, to_yaml
from brainray.errors import ConfigError, DataError
from brainray.mri.split import check_validation_share
from brainray.orchestration.lock import is_held
from brainray.orchestration.records import Record, check_same_settings, differing_settings
from brainray.storage import Folder

_LASTING_SECTIONS = {"dataset", "seed", *TRAINING_SECTIONS} - {"tracking"}
"""What a run learns depends on these; others may differ when it resumes."""

_FREE_KEYS = {
    "train": {*WORKER_SETTINGS, "cache_gib", "embed_batch_size"},
    "evaluation": {
        "control",
        "num_label_draws",
        "siblings",
        "tsne_epochs",
        "tsne_max_slices",
        "bootstrap_resamples",
    },
    "clustering": {"on_collapse"},  # may be changed after a collapse
    "split": {"mode", "test_fraction"},
}
"""Keys of these sections that may differ nevertheless."""

_DRAW_SETTINGS = {"labelled_fraction", "validation_fraction", "validation", "seed"}


class RunRecord(Record):
    """What a run records of its data at its beginning."""

    FILE: ClassVar[str] = layout.RUN
    FORMAT: ClassVar[str] = layout.RUN_FORMAT
    OWNER: ClassVar[str] = "the run"
    REMEDY: ClassVar[str] = "train under another name"

    name: str
    dataset: str
    data_hash: str  # of the store at that time
    classes: list[str]
    preprocess: PreprocessConfig  # of the store
    versions: dict[str, int | None]  # `Manifest.versions`
    subject_salt: str  # of the store
    num_slices: dict[str, NonNegativeInt]  # by role


@dataclass(frozen=True)
class Run:
    """An existing run."""

    folder: Folder
    record: RunRecord

    @classmethod
    def open(cls, folder: Folder) -> "Run":
        """Open the run in a folder.

        Raises:
            DataError: its record is damaged, or another version of brainray wrote it.
        """
        return cls(folder, RunRecord.read(folder))

    @property
    def is_complete(self) -> bool:
        return self.folder.exists(layout.SUMMARY)

    def write_config(self, config: Config) -> None:
        """Save the config, without secrets."""
        self.folder.write_bytes(layout.CONFIG, to_yaml(config).encode())

    def saved_config(self) -> Config:
        """The config with which the run was last trained."""
        where = f"{self.folder}/{layout.CONFIG}"
        return parse_saved(self.folder.read_bytes(layout.CONFIG), where)

    def last_submission(self) -> dict[str, Any] | None:
        """Provenance of the last submission that trained the run; None if it is not recorded."""
        submissions = self.folder.read_json_lines(layout.PROVENANCE)
        return submissions[-1] if submissions else None

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
        """Paths, relative to the source, of the labelled test slices when the run was begun."""
        slices = self.folder.read_table(layout.TEST_SLICES, columns=["path", "label"])
        return set(slices.filter(pc.is_valid(slices["label"]))["path"].to_pylist())


def unfinished(storage: Folder, run: Run) -> str:
    """What to do about a run that is not complete, for errors."""
    if is_held(storage, layout.RUNS, run.record.name):
        return (
            f"the run {run.folder} is still training: wait until it finishes, or, if its job was "
            "killed on another machine, submit its training again"
        )
    return (
        f"the run {run.folder} is not complete, and no job is training it: submit its training "
        "again under the same name"
    )


def open_run(storage: Folder, name: str) -> Run:
    """Open a run; raises DataError if there is none of that name."""
    folder = storage / layout.RUNS / name
    if not folder.exists(layout.RUN):
        raise DataError(f"no run {name!r} in {storage}; existing runs: {_names(storage) or 'none'}")
    return Run.open(folder)


def run_to_resume(config: Config) -> Run | None:
    """The existing run of that name, which training resumes; None if there is none yet.

    Raises:
        ConfigError: it was begun with other settings.
        DataError: another version of brainray made it.
    """
    folder = Folder(config.storage) / layout.RUNS / config.given("name")
    if not folder.exists(layout.RUN):
        return None
    run = Run.open(folder)
    check_same_settings(
        f"run {config.name!r}",
        lasting_settings(run.saved_config()),
        lasting_settings(config),
        "choose another name, or delete its folder",
    )
    return run


def check_new_or_same(config: Config) -> None:
    """Check, before anything is made, that training can begin a run of that name or resume it.

    Raises:
        ConfigError: the run was begun with other settings, or a new one cannot draw its validation
            slices as configured.
        DataError: another version of brainray made it.
    """
    if run_to_resume(config) is None:
        check_validation_share(config.split.validation_fraction)


def check_same_draw(split: SplitConfig, other: Run, purpose: str) -> None:
    """Raises ConfigError if another run on the same data trains or validates on other labels."""
    own = split.model_dump(mode="json", include=_DRAW_SETTINGS)
    theirs = other.saved_config().split.model_dump(mode="json", include=_DRAW_SETTINGS)
    difference = differing_settings(theirs, own, "split.")
    if difference:
        raise ConfigError(
            f"{purpose}: its run {other.folder.name} was trained on other labels ({difference}); "
            "use the same settings for both"
        )


def lasting_settings(config: Config) -> dict[str, Any]:
    """All settings that must not change when a run resumes, as nested sections."""
    settings = config.model_dump(mode="json", include=_LASTING_SECTIONS, exclude=_FREE_KEYS)
    if config.encoder.pretext == "none":
        del settings["self_supervision"]
    return settings


def groups_of_test_slices(run: Folder) -> dict[str, str]:
    """Resampling group of each of a run's test slices: its copies and its likely subject."""
    columns = ["sample_id", "split_group_id"]
    rows = run.read_table(layout.TEST_SLICES, columns)
    ids, groups = (rows[name].to_pylist() for name in columns)
    return dict(zip(ids, groups, strict=True))


def _names(storage: Folder) -> str:
    """Names of the runs, without folders whose job ended before the run was created."""
    runs = storage / layout.RUNS
    return ", ".join(name for name in runs.names() if (runs / name).exists(layout.RUN))
