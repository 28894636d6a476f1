"""Identity of slices, derived from the bytes of their files, and of results, from their inputs."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SAMPLE_ID_DIGITS = 32


def content_hash(content: bytes) -> str:
    """SHA-256 of the file's bytes, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def sample_id(digest: str, frame: str = "") -> str:
    """The id of a slice: the first 128 bits of its file's content hash.

    For a file with several slices, the first 128 bits of the hash of that hash and the frame.
    """
    named = content_hash(f"{digest}#{frame}".encode()) if frame else digest
    return named[:SAMPLE_ID_DIGITS]


def content_key(made_by: Mapping[str, Any]) -> str:
    """Hash of plain values (12 hex digits), independent of the order of keys."""
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
