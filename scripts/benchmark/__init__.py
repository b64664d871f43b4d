"""Measures what testreg costs in time and memory."""
