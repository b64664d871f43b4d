"""Records of a calibration: frozen dataclasses that are read from JSON and written to JSON."""
