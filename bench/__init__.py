"""The benchmark, run from a clone: `python -m bench` (README.md beside this file)."""
