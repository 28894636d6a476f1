"""Training of a run: one driver, and a worker on every rank."""
