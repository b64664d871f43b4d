"""An imitation of OpenAI's CLIP, made of parts of open_clip."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from open_clip.transformer import LayerNormFp32, QuickGELU
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualAttentionBlock(nn.Module):
    """The block of openai/CLIP, `clip/model.py`."""

    def __init__(self, d_model: int, n_head: int, attn_mask: Tensor | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, n_head)
        self.ln_1, self.ln_2 = LayerNormFp32(d_model), LayerNormFp32(d_model)
        fc1, fc2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.mlp = nn.Sequential(OrderedDict(c_fc=fc1, gelu=QuickGELU(), c_proj=fc2))
        self.attn_mask = attn_mask  # not a buffer, as in the original

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (T, B, C)."""
        y, mask = self.ln_1(x), None if self.attn_mask is None else self.attn_mask.to(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, attn_mask: Tensor | None = None) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(width, heads, attn_mask) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class VisionTransformer(nn.Module):
    def __init__(self, input_resolution: int, patch_size: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((input_resolution // patch_size) ** 2 + 1, width))
        self.ln_pre = LayerNormFp32(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = LayerNormFp32(width)
        self.proj = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding).transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """The whole model. Its text tower is a causal transformer of the same class and width as the image tower."""

    def __init__(self, visual: VisionTransformer, context_length: int, vocab_size: int) -> None:
        super().__init__()
        self.visual = visual
        width = visual.transformer.width
        self.transformer = Transformer(width, 1, 2, torch.full((context_length, context_length), -torch.inf).triu(1))
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width))
        self.ln_final = LayerNormFp32(width)
        self.text_projection = nn.Parameter(torch.randn(width, width))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image.type(self.visual.conv1.weight.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x.transpose(0, 1)).transpose(0, 1))
        return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities (images, texts), and their transpose."""
        images = F.normalize(self.encode_image(image), dim=-1)
        logits = self.logit_scale.exp() * images @ F.normalize(self.encode_text(text), dim=-1).t()
        return logits, logits.t()


_NAMES = {  # {name in transformers: name in OpenAI's code}
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
}


def visual_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' CLIPVisionModelWithProjection, as OpenAI's VisionTransformer names them."""
    renamed = dict[str, Tensor]()
    for key, value in state.items():
        name = key.removeprefix("vision_model.")
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    for key in [key for key in renamed if ".attn.q_proj." in key]:
        parts = [renamed.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        renamed[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    renamed["proj"] = renamed.pop("visual_projection.weight").T
    return renamed
