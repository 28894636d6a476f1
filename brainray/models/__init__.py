"""Encoders, heads, objectives and augmentation."""
