"""What is known of a calibration, as frozen dataclasses that are read from JSON and written to it."""
