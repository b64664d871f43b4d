"""Open-vocabulary segmentation without training: python open_vocabulary.py MODEL PHOTO [NEURONS]

SCLIP, NACLIP and ClearCLIP call all blocks of CLIP but the last, and then compute the last block's attention by hand,
from its weights, so that a patch attends to patches that are like it. That works on a patched model as it stands:
blocks take and return T tokens, and the register rides along unseen. What you get are patches that the blocks before
the last have left clean. The block that is written out by hand has no register, unless you let the patches attend to it
too (`to_register=True`): `testreg.registers` holds what the block before has left.
"""

import sys
from typing import Literal

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

import testreg

Method = Literal["sclip", "naclip", "clearclip"]
LABELS = ("sky", "grass", "an animal", "a building")


def tokens_before_the_last_block(visual: nn.Module, images: Tensor) -> Tensor:
    """(B, T, C), CLS first."""
    patches = visual.conv1(images).flatten(2).mT
    cls = visual.class_embedding.expand(len(images), 1, -1)
    x = visual.ln_pre(torch.cat([cls, patches], 1) + visual.positional_embedding)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    return x


def near(rows: int, columns: int, spread: float = 5.0) -> Tensor:
    """(T, T), a Gaussian around each patch; CLS is near to nobody."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place = torch.stack([row, column], -1).flatten(0, 1).float()
    return nn.functional.pad(torch.exp(-torch.cdist(place, place).square() / (2 * spread**2)), (1, 0, 1, 0))


def last_block(block: nn.Module, x: Tensor, method: Method, grid: tuple[int, int], register: Tensor | None) -> Tensor:
    """The last block (B, T, C) -> (B, T, C) with attention among tokens that are alike, written out."""
    seen = x if register is None else torch.cat([x, register], 1)  # (B, T+R, C)
    attention, num_tokens = block.attn, x.shape[1]
    packed = nn.functional.linear(block.ln_1(seen), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = packed.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T+R, D)
    scale = query.shape[-1] ** -0.5
    if method == "naclip":
        bias = nn.functional.pad(near(*grid), (0, seen.shape[1] - num_tokens))
        weights = (key[:, :, :num_tokens] @ key.mT * scale + bias.to(key)).softmax(-1)
    elif method == "sclip":
        weights = sum((each[:, :, :num_tokens] @ each.mT * scale).softmax(-1) for each in (query, key))
    else:
        weights = (query[:, :, :num_tokens] @ query.mT * scale).softmax(-1)
    out = attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
    if method == "sclip":  # the others leave out the residual and the MLP, which hold what is global
        x = x + out
        return x + block.mlp(block.ln_2(x))
    return out


@torch.no_grad()
def segment(model: nn.Module, images: Tensor, texts: Tensor, method: Method, to_register: bool = False) -> Tensor:
    """Similarity (B, classes, h, w) of each patch to texts (classes, D)."""
    visual = model.visual
    rows, columns = (size // patch for size, patch in zip(images.shape[-2:], visual.conv1.stride, strict=True))
    register = None
    if to_register:
        with testreg.registers(model) as after_block:
            x = tokens_before_the_last_block(visual, images)
        register = after_block[-1]
    else:
        x = tokens_before_the_last_block(visual, images)
    x = last_block(visual.transformer.resblocks[-1], x, method, (rows, columns), register)
    patches = nn.functional.normalize(visual.ln_post(x[:, 1:]) @ visual.proj, dim=-1)
    return (patches @ nn.functional.normalize(texts, dim=-1).T).mT.unflatten(-1, (rows, columns))


def main(name: str, photo: str, neurons: str | None = None, method: Method = "clearclip") -> Tensor:
    model, preprocess = open_clip.create_model_from_pretrained(name)
    tokenizer = open_clip.get_tokenizer(name)
    testreg.patch(model.eval(), neurons)
    with torch.no_grad():
        texts = model.encode_text(tokenizer([f"a photo of {label}" for label in LABELS]))
    classes = segment(model, preprocess(Image.open(photo)).unsqueeze(0), texts, method).argmax(1)[0]
    for row in classes:
        print(" ".join(str(int(each)) for each in row))
    return classes


if __name__ == "__main__":
    main(*sys.argv[1:])
