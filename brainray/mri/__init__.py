"""Slices: decoding, checks, skull stripping, duplicates, splits. Arrays in, arrays out."""
