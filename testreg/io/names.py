"""The names that models and images may have, in words, for messages and the help. This file imports nothing."""

NAMES = (
    "timm:NAME, hf:NAME, open_clip:ARCH/PRETRAINED, hub:OWNER/REPO/NAME, torchvision:NAME, a checkpoint folder, or "
    "demo: the small model that comes with testreg"
)
KINDS = "a folder, a list of paths (.txt), an image, WebDataset shards (.tar) or hf-dataset:NAME[:SPLIT]"  # by name
CLIP_KINDS = "a folder of clips: sub-folders with the frames of one clip each, .gif or .webp files"
