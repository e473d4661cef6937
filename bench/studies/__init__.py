"""Benchmarks of one question each, beside `python -m bench`."""
