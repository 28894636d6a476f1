"""Cases of ``jobs/benchmark.py``; each measures a claim against a named peer in the same run."""
