"""The names of the tasks, for the help of the command line. This file imports nothing, to keep `--help` fast."""

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
"""{name of the task: what it measures}."""
