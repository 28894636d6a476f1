"""Records of how stores and runs were made: JSON files, validated when read."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from brainray.errors import DataError
from brainray.storage import Folder


class Record(BaseModel):
    """A record in a folder of results; the file may be foreign or damaged."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")

    format: str


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(
    kind: type[AnyRecord], folder: Folder, name: str, *, version: str, owner: str, remedy: str
) -> AnyRecord:
    """Read a record.

    Args:
        kind: its class.
        folder: the folder of results.
        name: of the file.
        version: the ``format`` that this version of brainray reads.
        owner: what the folder is, for errors, such as ``the run``.
        remedy: what to do without the record, for errors.

    Raises:
        DataError: it is damaged, or another version of brainray wrote it.
    """
    found = folder.read_json(name)
    if not isinstance(found, dict):
        raise DataError(f"{folder}/{name} is damaged (no JSON object): {remedy}")
    if found.get("format") != version:
        raise DataError(
            f"{owner} {folder} was made by another version of brainray "
            f"({found.get('format')!r}, this version reads {version!r}): {remedy}"
        )
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = " ".join(f"{key}: {first['msg']}".split())
        raise DataError(f"{folder}/{name} is damaged ({reason}): {remedy}") from None
