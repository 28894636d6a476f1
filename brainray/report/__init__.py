"""Figures and tables from finished results."""
