"""Preprocessing: from files to the image store, on Ray Data."""
