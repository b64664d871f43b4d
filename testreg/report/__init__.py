"""Draws measurements: as maps, as charts, and as HTML pages (reports)."""
