"""The rows for open_clip's towers and for OpenAI's CLIP. (timm towers inside open_clip models are found as timm's.)"""

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

# OpenAI's code is installed from GitHub or copied into other packages, so the row does not ask for a library.
VENDORED = (
    replace(
        OPEN_CLIP,
        name="OpenAI CLIP",
        library=None,
        requirements=("conv1", "ln_pre", "transformer.resblocks"),
        sequence_first=lambda tower: True,
    ),
)
