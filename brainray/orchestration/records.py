"""Records of how stores and runs were made: JSON files, validated when read, and compared with the
settings requested now.
"""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from brainray.errors import ConfigError, DataError
from brainray.storage import Folder

NOT_OF_SLICES = {"files_per_task", "max_rejected_fraction"}
"""Settings of preprocessing that do not affect slices: they may change between updates."""


class Record(BaseModel):
    """A record in a folder of results; the file may be foreign or damaged."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")

    FILE: ClassVar[str]
    FORMAT: ClassVar[str]  # the ``format`` that this version of brainray reads
    OWNER: ClassVar[str]  # what the folder is, for errors, such as ``the run``
    REMEDY: ClassVar[str]  # what to do without the record, for errors

    format: str

    @classmethod
    def read(cls, folder: Folder) -> Self:
        """Read the record of a folder.

        Raises:
            DataError: it is damaged, or another version of brainray wrote it.
        """
        found = folder.read_json(cls.FILE)
        if not isinstance(found, dict):
            raise DataError(f"{folder}/{cls.FILE} is damaged (no JSON object): {cls.REMEDY}")
        if found.get("format") != cls.FORMAT:
            raise DataError(
                f"{cls.OWNER} {folder} was made by another version of brainray "
                f"({found.get('format')!r}, this version reads {cls.FORMAT!r}): {cls.REMEDY}"
            )
        try:
            # Also within sections of the config: an earlier version may have had more settings.
            return cls.model_validate(found, extra="ignore")
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            reason = " ".join(f"{key}: {first['msg']}".split())
            raise DataError(
                f"{folder}/{cls.FILE} cannot be read by this version, or is damaged ({reason}): "
                f"{cls.REMEDY}"
            ) from None

    def write(self, folder: Folder) -> None:
        """Write the record into a folder."""
        content = self.model_dump(mode="json", exclude={"preprocess": NOT_OF_SLICES})
        folder.write_json(self.FILE, content)


def with_defaults(stored: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that have ``defaults``, each as stored if it is: an earlier version may have had
    others, and not all of them.
    """
    found = {key: stored.get(key, default) for key, default in defaults.items()}
    return {
        key: with_defaults(value, defaults[key])
        if isinstance(value, dict) and isinstance(defaults[key], dict)
        else value
        for key, value in found.items()
    }


def check_same_settings(
    what: str, made_with: dict[str, Any], wanted: dict[str, Any], remedy: str
) -> None:
    """Raises ConfigError, naming ``remedy``, if ``what`` was made with other settings."""
    difference = differing_settings(made_with, wanted)
    if difference:
        raise ConfigError(f"{what} exists with other settings ({difference}): {remedy}")


def differing_settings(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """``preprocess.skull_strip: otsu here, none requested; ...`` for what differs, or empty."""
    problems: list[str] = []
    one_sided: list[str] = []  # these follow from another difference, if there is one
    for key in sorted(stored.keys() | wanted.keys()):
        in_both = key in stored and key in wanted  # null differs from unset: a class map has nulls
        here, requested = stored.get(key, "unset"), wanted.get(key, "unset")
        if in_both and here == requested:
            continue
        if isinstance(here, dict) and isinstance(requested, dict):
            problems.append(differing_settings(here, requested, f"{prefix}{key}."))
        else:
            differences = problems if in_both else one_sided
            differences.append(f"{prefix}{key}: {here} here, {requested} requested")
    return "; ".join(problems or one_sided)
