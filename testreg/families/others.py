"""The rows for torchvision, and for the ViTs of facebookresearch that torch.hub loads."""

from __future__ import annotations

from testreg.families.family import Family

FAMILIES = (
    Family(
        name="torchvision VisionTransformer",
        library="torchvision",
        towers="VisionTransformer",
        blocks="encoder.layers",
        fc2="mlp.3",
        patch_embed="conv_proj",
        positions="encoder.pos_embedding",
    ),
)

VENDORED = (
    Family(
        name="facebookresearch/dinov2",
        towers="DinoVisionTransformer",
        blocks="blocks",
        fc2=("mlp.w3", "mlp.fc2"),
        patch_embed="patch_embed.proj",
        positions="pos_embed",
        prefix=lambda tower: 1 + getattr(tower, "num_register_tokens", 0),  # the first releases lack the attribute
        trained_registers=lambda tower: getattr(tower, "num_register_tokens", 0),
        scale="ls2.gamma",
    ),
    Family(
        name="facebookresearch/dino",
        towers="VisionTransformer",
        requirements=("cls_token", "prepare_tokens", "get_last_selfattention"),
        blocks="blocks",
        fc2="mlp.fc2",
        patch_embed="patch_embed.proj",
        positions="pos_embed",
        attention="attn",
    ),
)
