"""Deep clustering of brain MRI slices with few labels, as a batch job on Ray."""

import logging

__version__ = "0.1.0"

# Tells every worker's log which instruction sets it has tried to load.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)
