"""Distributed K-means, Gaussian mixture and PCA, with alignment, metrics and collapse watch."""
