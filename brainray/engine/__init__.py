"""One epoch, the re-clustering that closes it, and what is saved; knows nothing of Ray."""
