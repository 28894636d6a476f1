"""Errors that a user can act on. A job prints the message as one line and exits with code 2."""


class BrainrayError(Exception):
    """Base of all errors that name a culprit and a remedy; other exceptions are bugs."""


class TransientError(BrainrayError):
    """An error not caused by the settings: the same job may succeed later."""


class ConfigError(BrainrayError):
    """A configuration key or value with which the job cannot start."""


class DataError(BrainrayError):
    """Unusable images, labels or image store."""


class StorageError(DataError, TransientError):
    """Files cannot be read or written: disk full, permission denied, server unavailable."""


class RoomError(ConfigError, TransientError):
    """The workers do not fit on the Ray cluster at present."""


class BusyError(ConfigError, TransientError):
    """Another job is using what this one would write."""


class ClusteringError(BrainrayError):
    """A clustering cannot be fitted or has collapsed."""


class DivergenceError(BrainrayError):
    """A loss, gradient or embedding is no longer finite."""


class CheckpointError(BrainrayError):
    """A file is not a brainray checkpoint or does not fit the run."""


class TrackingError(BrainrayError):
    """The tracking server or database cannot be used."""
