"""The tasks by which papers judge registers: object discovery, linear probes, zero-shot classification, segmentation.

Each task is a module with a function `evaluate`, which `testreg evaluate TASK` runs.
"""
