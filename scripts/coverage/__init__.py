"""Which Vision Transformers testreg supports: `python scripts/coverage`, and for tests `check` and `registry`."""
