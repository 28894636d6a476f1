"""Sweeps: many trainings under Ray Tune."""
