"""Checks which Vision Transformers testreg supports: `python scripts/coverage`. Tests use `check` and `registry`."""
