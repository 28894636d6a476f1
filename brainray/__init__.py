"""Deep clustering of brain MRI slices with few labels, as a batch job on Ray."""

__version__ = "0.1.0"
