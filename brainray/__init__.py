"""Deep clustering of brain MRI slices with few labels, as a batch job on Ray."""

import logging

__version__ = "0.1.0"

# It tells every process's log which of its builds it tries.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)
