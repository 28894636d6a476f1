"""Errors that a user can act on. A job prints the message as one line and exits with code 2."""


class BrainrayError(Exception):
    """Base of every error that names a culprit and a remedy; what else escapes is a bug."""


class TransientError(BrainrayError):
    """What settings are not to blame for: the same job may succeed later."""


class ConfigError(BrainrayError):
    """A configuration key or value with which the job cannot start."""


class DataError(BrainrayError):
    """Images, labels or an image store with which nothing useful can be done."""


class StorageError(DataError, TransientError):
    """Files that cannot be read or written: the disk is full, a right is missing, a server is
    away.
    """


class RoomError(ConfigError, TransientError):
    """Workers for which the Ray cluster has no room, at present at least."""


class BusyError(ConfigError, TransientError):
    """Another job is at work on what this one would write."""


class ClusteringError(BrainrayError):
    """A clustering that cannot be fitted, or one that has collapsed."""


class DivergenceError(BrainrayError):
    """A loss, gradient or embedding that is no longer finite."""


class CheckpointError(BrainrayError):
    """A file that is not a brainray checkpoint, or one that does not fit the run."""


class TrackingError(BrainrayError):
    """The tracking server or database cannot be used."""
