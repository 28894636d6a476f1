"""Deep clustering of brain MRI slices with few labels, as a batch job on Ray."""

import logging
import os

__version__ = "0.1.0"

# Tells every worker's log which instruction sets it has tried to load.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)

# `ray job submit` gives a job one thread unless it says otherwise: copies would be looked for on
# one core. Read by libraries as they are loaded, and so taken back here, before them.
_JOB = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
if _JOB is not None and "OMP_NUM_THREADS" not in _JOB:
    os.environ.pop("OMP_NUM_THREADS", None)
