"""Use of a trained run: evaluation, prediction, labels to collect, export."""
