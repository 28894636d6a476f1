"""Deep clustering of brain MRI slices with few labels, as a batch job on Ray."""

import logging
import os

__version__ = "0.1.0"

# Would log in every worker which instruction sets it tried to load.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)

# `ray job submit` limits a job to one thread by default, so duplicates would be searched on one
# core. Libraries read the variable when they are loaded, so it is removed here, before that.
_JOB = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
if _JOB is not None and "OMP_NUM_THREADS" not in _JOB:
    os.environ.pop("OMP_NUM_THREADS", None)
