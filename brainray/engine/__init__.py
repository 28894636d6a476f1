"""One epoch of training, the re-clustering after it, and checkpoints; independent of Ray."""
