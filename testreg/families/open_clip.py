"""open_clip's own towers, and OpenAI's CLIP, which they grew from. CLIP with a timm tower is a timm tower."""

from __future__ import annotations

from dataclasses import replace

from testreg.families.family import Family

OPEN_CLIP = Family(
    name="open_clip VisionTransformer",
    library="open_clip",
    towers="VisionTransformer",
    blocks="transformer.resblocks",
    fc2=("mlp.ln", "mlp.c_proj"),
    patch_embed="conv1",
    positions="positional_embedding",
    scale="ls_2.gamma",
    entry_norm="ln_pre",
    sequence_first=lambda tower: not tower.transformer.batch_first,
)

FAMILIES = (OPEN_CLIP,)

# OpenAI's release is code that people install from GitHub or vendor, so any package will do.
VENDORED = (
    replace(
        OPEN_CLIP,
        name="OpenAI CLIP",
        library=None,
        requirements=("conv1", "ln_pre", "transformer.resblocks"),
        sequence_first=lambda tower: True,
    ),
)
