"""Identity of a slice, derived from the bytes of its file."""

import hashlib

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
