"""Tests run offline on one thread: nothing is downloaded, and results do not depend on the machine's cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and timm are imported

import torch

torch.set_num_threads(1)
