"""The secret salt of subject hashes."""

import hashlib
import hmac
import os
import secrets

from brainray.errors import ConfigError, DataError
from brainray.storage import Folder

SALT_VARIABLE = "BRAINRAY_SALT"

_SALT_FILE = ".subject-salt"
_MIN_SALT = 16  # characters


def subject_salt(storage: Folder) -> bytes:
    """The salt of subject hashes: ``BRAINRAY_SALT``, or a secret kept in ``storage``.

    It is kept next to the stores, not in them, so that the recipient of a store cannot guess
    patient numbers by hashing them.
    """
    given = os.environ.get(SALT_VARIABLE)
    if given is not None:
        if len(given) < _MIN_SALT:
            raise ConfigError(f"{SALT_VARIABLE} is too short: use at least {_MIN_SALT} characters")
        return given.encode()
    if not storage.exists(_SALT_FILE):
        secret = secrets.token_hex(32).encode()
        if storage.local_path is None:
            storage.write_bytes(_SALT_FILE, secret)
        else:  # if two jobs start at once, only one creates it
            storage.create_file(_SALT_FILE, secret, mode=0o600)
    salt = storage.read_bytes(_SALT_FILE)
    if len(salt) < _MIN_SALT:
        raise DataError(
            f"{storage}/{_SALT_FILE} is incomplete: restore it, or delete it if no store was made"
        )
    return salt


def salt_id(salt: bytes) -> str:
    """An id that distinguishes salts without revealing them."""
    return hmac.new(salt, b"brainray: which salt", hashlib.sha256).hexdigest()[:12]
