"""Calibration: finds the register neurons of a model. `calibrate` is the entry point."""
