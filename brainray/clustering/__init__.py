"""Distributed K-means, Gaussian mixtures and PCA; alignment, metrics and collapse detection."""
