"""Tests run offline on one thread: nothing is downloaded, and results do not depend on the machine's cores."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers and timm are imported
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # whose architectures are tested too

import torch

torch.set_num_threads(1)
