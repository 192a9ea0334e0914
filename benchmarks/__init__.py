"""Measurements. See README.md; run them from the repository's root."""
