"""What an image store records of itself: the settings that made it, its counts and statistics."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt, field_validator

from brainray import layout
from brainray.config import PreprocessConfig, SplitConfig
from brainray.errors import DataError
from brainray.mri import decode, intracranial, subjects
from brainray.orchestration.records import NOT_OF_SLICES, Record, differing_settings
from brainray.schema import TRAIN


class Manifest(Record):
    """The manifest of an image store."""

    FILE: ClassVar[str] = layout.MANIFEST
    FORMAT: ClassVar[str] = layout.STORE_FORMAT
    OWNER: ClassVar[str] = "the image store"
    REMEDY: ClassVar[str] = "choose another name, or delete it and preprocess again"

    name: str
    source: str
    generation: NonNegativeInt  # number of updates
    seconds: dict[str, float]  # of the last preprocessing, by stage

    listing: str  # changes with the files, their labels and splits
    num_files: NonNegativeInt
    num_files_decoded: NonNegativeInt  # by the last preprocessing
    num_ignored_files: NonNegativeInt
    num_rejected: NonNegativeInt
    rejected_reasons: dict[str, NonNegativeInt]
    num_removed_copies: NonNegativeInt

    preprocess: PreprocessConfig
    split: dict[str, str | int | float]  # the settings that determine a store
    classes_map: dict[str, str | None]
    decode_version: int
    intracranial_version: int | None = None  # None: not in use
    subject_version: int = 1  # of the method that estimates subjects
    skull_strip_used: dict[str, NonNegativeInt]  # number of slices by method
    subject_salt: str  # identifies the salt, without giving it away

    classes: list[str]  # of the training slices, sorted
    num_slices: dict[str, dict[str, NonNegativeInt]]  # by split and label, "" for none
    pixel_mean: float  # of the training slices, in units of [0, 1]
    pixel_std: Annotated[float, Field(gt=0.0)]  # the same
    data_hash: str  # changes with the slices, their pixels' settings, labels or splits
    slices_hash: str  # the same without labels: all that learning without labels reads

    @field_validator("num_slices")
    @classmethod
    def _has_training_slices(cls, counts: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        if TRAIN not in counts:
            raise ValueError("no training slices")
        return counts

    @property
    def versions(self) -> dict[str, int | None]:
        """Versions of the methods that made the slices, as `versions_of` returns them."""
        return {name: getattr(self, name) for name in versions_of(self.preprocess)}

    @property
    def is_compared_otherwise(self) -> bool:
        """Whether this version of brainray would find other slices likely of one subject."""
        return self.preprocess.subject.estimate and self.subject_version != subjects.VERSION

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the store, as `settings_of` returns them."""
        images = self.preprocess.model_dump(mode="json", exclude=NOT_OF_SLICES)
        settings = {"preprocess": images, "split": self.split, "classes_map": self.classes_map}
        return settings | self.versions


def settings_of(
    preprocess: PreprocessConfig,
    split: SplitConfig,
    class_map: Mapping[str, str | None],
    *,
    drawn: bool,
) -> dict[str, Any]:
    """The settings that determine a store, without those that are used only in training.

    Seed and size of the split count only if it is ``drawn``, not taken from the source.
    """
    parts: dict[str, Any] = {"mode": split.mode}
    if drawn:
        parts |= {"test_fraction": split.test_fraction, "seed": split.seed}
    images = preprocess.model_dump(mode="json", exclude=NOT_OF_SLICES)
    settings = {"preprocess": images, "split": parts, "classes_map": dict(class_map)}
    return settings | versions_of(preprocess)


def versions_of(preprocess: PreprocessConfig) -> dict[str, int]:
    """Versions of the methods in use that affect slices; constant within a store."""
    versions = {"decode_version": decode.VERSION}
    if preprocess.skull_strip == "intracranial":
        versions["intracranial_version"] = intracranial.VERSION
    return versions


def check_versions(
    what: str, preprocess: PreprocessConfig, made_with: dict[str, int | None], remedy: str
) -> None:
    """Raises DataError, naming ``remedy``, if this version makes other slices than those that
    ``what`` was ``made_with``.
    """
    difference = differing_settings(made_with, versions_of(preprocess))
    if difference:
        raise DataError(
            f"{what} made by another version of brainray ({difference}), which preprocesses slices "
            f"differently: {remedy}"
        )
