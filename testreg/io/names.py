"""What the names of models and of images may be, in words, for messages and the help. Imports nothing."""

NAMES = (
    "timm:NAME, hf:NAME, open_clip:ARCH/PRETRAINED, hub:OWNER/REPO/NAME, torchvision:NAME, a checkpoint folder, or "
    "demo: the small model that comes with testreg"
)
KINDS = "a folder, a list of paths (.txt), an image, WebDataset shards (.tar) or hf-dataset:NAME[:SPLIT]"  # by name
