"""Texts for messages and help: how models and images may be named. This file imports nothing, to keep `--help` fast."""

NAMES = (
    "timm:NAME, hf:NAME, open_clip:ARCH/PRETRAINED, hub:OWNER/REPO/NAME, torchvision:NAME, a checkpoint folder, or "
    "demo: the small model that comes with testreg"
)
KINDS = "a folder, a list of paths (.txt), an image, WebDataset shards (.tar) or hf-dataset:NAME[:SPLIT]"
CLIP_KINDS = "a folder of clips: sub-folders with the frames of one clip each, .gif or .webp files"
