"""The tables by which registers are judged, each as a command: object discovery, probes, zero-shot, segmentation."""
