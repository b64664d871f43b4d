"""The tasks by name, for the help of the command line. This file imports nothing."""

TASKS = {
    "lost": "object discovery: CorLoc",
    "knn": "classification by the nearest neighbours",
    "linear": "linear classification",
    "zeroshot": "zero-shot classification with a CLIP",
    "segment": "linear segmentation",
    "depth": "linear depth",
    "attention-seg": "segmentation by attention",
    "tokens": "what single tokens know",
    "typographic": "typographic attacks on a CLIP",
}
"""The commands, each with what it measures."""
