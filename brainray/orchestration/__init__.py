"""Where things run: Ray Data, Ray Train, and the shared life of a job."""
