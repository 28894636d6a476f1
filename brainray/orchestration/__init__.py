"""Where things run: Ray Data, Ray Train, Ray Tune, and what all jobs share."""
