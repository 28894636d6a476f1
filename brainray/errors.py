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


class StoreChangedError(DataError):
    """An image store has been updated while it was being used."""


class UnreachableError(StorageError):
    """An object store does not answer; it may do so in a moment."""


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


def error_to_dict(error: BrainrayError) -> dict[str, str]:
    """An error as plain values, to be passed between processes."""
    return {"error": type(error).__name__, "message": str(error)}


def error_from_dict(fields: dict[str, str]) -> BrainrayError:
    """The error, with its type, that `error_to_dict` was given."""
    error_class: type[BrainrayError] = globals().get(fields["error"], BrainrayError)
    return error_class(fields["message"])


_GPU_ADVICE = {
    "ProcessGroupNCCL is only supported with GPUs": (
        "Ray detected GPUs that PyTorch cannot use on the workers' nodes: fix the driver or "
        "install PyTorch with CUDA there, or set train.device=cpu"
    ),
    "driver on your system is too old": (
        "the NVIDIA driver is too old for the installed PyTorch: update it, install PyTorch for an "
        "older CUDA version (README, GPUs), or set train.device=cpu"
    ),
    "no kernel image is available": (
        "the installed PyTorch does not run on these GPUs (compute capability below 7.5, as V100 "
        "and P100): install PyTorch for CUDA 12.6 (README, GPUs), or set train.device=cpu"
    ),
    "CUDA out of memory": (
        "a GPU has too little memory: lower train.batch_size_per_worker, "
        "train.labelled_batch_size_per_worker, train.embed_batch_size, train.cache_gib or, in a "
        "warm-up, self_supervision.batch_size_per_worker; in prediction, set train.device=cpu"
    ),
}
"""Messages of PyTorch, and what a user can do."""


def gpu_problem(message: str) -> ConfigError | None:
    """What a user can do about an error of PyTorch that settings or installation cause."""
    advice = next((advice for text, advice in _GPU_ADVICE.items() if text in message), None)
    return None if advice is None else ConfigError(advice)
