"""Finds the register neurons of a model."""
