"""Models of repositories that are no package, imitated: their class, module and argument names, and what they return.

These imitate the interface only, in words of their own; where timm's parts have the same modules, they stand in.
Weights do not load into them, and nothing here shows that the originals compute the same numbers. DINO and CLIP call
their tower VisionTransformer, so each is a namespace here.
"""

from __future__ import annotations

from collections import OrderedDict

import timm
import torch
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F


class Dino:
    """facebookresearch/dino, `vision_transformer.py`."""

    class Attention(nn.Module):
        def __init__(self, width: int, num_heads: int) -> None:
            super().__init__()
            self.num_heads = num_heads
            self.scale = (width // num_heads) ** -0.5
            self.qkv = nn.Linear(width, 3 * width)
            self.proj = nn.Linear(width, width)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """The tokens, and the weights (B, heads, T, T)."""
            query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            attn = (query @ key.transpose(-2, -1) * self.scale).softmax(-1)
            return self.proj((attn @ value).transpose(1, 2).flatten(2)), attn

    class Block(nn.Module):
        def __init__(self, width: int, num_heads: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.attn = Dino.Attention(width, num_heads)
            self.mlp = Mlp(width, 4 * width)

        def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
            """The tokens; or, instead of them, the attention weights."""
            y, attn = self.attn(self.norm1(x))
            if return_attention:
                return attn
            x = x + y
            return x + self.mlp(self.norm2(x))

    class VisionTransformer(nn.Module):
        def __init__(self, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> None:
            super().__init__()
            self.num_features = self.embed_dim = embed_dim
            self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim=embed_dim, strict_img_size=False)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
            self.blocks = nn.ModuleList([Dino.Block(embed_dim, num_heads) for _ in range(depth)])
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        def prepare_tokens(self, x: Tensor) -> Tensor:
            (patch, _), side = self.patch_embed.patch_size, self.patch_embed.grid_size[0]
            cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            if (size := (x.shape[-2] // patch, x.shape[-1] // patch)) != (side, side):
                grid = F.interpolate(grid, size, mode="bicubic")
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1)
            return x + torch.cat([cls, grid.flatten(2).transpose(1, 2)], 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.get_intermediate_layers(x)[-1][:, 0]

        def get_last_selfattention(self, x: Tensor) -> Tensor:
            x = self.prepare_tokens(x)
            for block in self.blocks[:-1]:
                x = block(x)
            return self.blocks[-1](x, return_attention=True)

        def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
            x, outputs = self.prepare_tokens(x), []
            for block in self.blocks:
                x = block(x)
                outputs.append(self.norm(x))
            return outputs[-n:]


class OpenAIClip:
    """openai/CLIP, `clip/model.py`."""

    class LayerNorm(nn.LayerNorm):
        """In float32, whatever the model's dtype."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).to(x.dtype)

    class QuickGELU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.702 * x)

    class ResidualAttentionBlock(nn.Module):
        def __init__(self, d_model: int, n_head: int, attn_mask: Tensor | None) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(d_model, n_head)
            self.ln_1, self.ln_2 = OpenAIClip.LayerNorm(d_model), OpenAIClip.LayerNorm(d_model)
            layers = {
                "c_fc": nn.Linear(d_model, 4 * d_model),
                "gelu": OpenAIClip.QuickGELU(),
                "c_proj": nn.Linear(4 * d_model, d_model),
            }
            self.mlp = nn.Sequential(OrderedDict(layers))
            self.attn_mask = attn_mask  # no buffer, in the original

        def forward(self, x: Tensor) -> Tensor:
            """Tokens (T, B, C)."""
            y, mask = self.ln_1(x), None if self.attn_mask is None else self.attn_mask.to(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Transformer(nn.Module):
        def __init__(self, width: int, layers: int, heads: int, attn_mask: Tensor | None = None) -> None:
            super().__init__()
            self.width, self.layers = width, layers
            blocks = [OpenAIClip.ResidualAttentionBlock(width, heads, attn_mask) for _ in range(layers)]
            self.resblocks = nn.Sequential(*blocks)

        def forward(self, x: Tensor) -> Tensor:
            return self.resblocks(x)

    class VisionTransformer(nn.Module):
        def __init__(self, input_resolution: int, patch_size: int, width: int, layers: int, heads: int) -> None:
            super().__init__()
            self.input_resolution = input_resolution
            self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
            self.class_embedding = nn.Parameter(torch.randn(width))
            self.positional_embedding = nn.Parameter(torch.randn((input_resolution // patch_size) ** 2 + 1, width))
            self.ln_pre, self.ln_post = OpenAIClip.LayerNorm(width), OpenAIClip.LayerNorm(width)
            self.transformer = OpenAIClip.Transformer(width, layers, heads)
            self.proj = nn.Parameter(torch.randn(width, width))

        def forward(self, x: Tensor) -> Tensor:
            patches = self.conv1(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1)
            x = self.ln_pre(x + self.positional_embedding).permute(1, 0, 2)
            x = self.transformer(x).permute(1, 0, 2)
            return self.ln_post(x[:, 0]) @ self.proj

    class CLIP(nn.Module):
        """Its text tower is a causal transformer of the same class as that for images, and as wide."""

        def __init__(self, visual: OpenAIClip.VisionTransformer, context_length: int, vocab_size: int) -> None:
            super().__init__()
            self.visual = visual
            width = visual.transformer.width
            mask = torch.full((context_length, context_length), -torch.inf).triu(1)
            self.transformer = OpenAIClip.Transformer(width, 1, 2, mask)
            self.token_embedding = nn.Embedding(vocab_size, width)
            self.positional_embedding = nn.Parameter(torch.randn(context_length, width))
            self.ln_final = OpenAIClip.LayerNorm(width)
            self.text_projection = nn.Parameter(torch.randn(width, width))
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

        def encode_image(self, image: Tensor) -> Tensor:
            return self.visual(image.type(self.visual.conv1.weight.dtype))

        def encode_text(self, text: Tensor) -> Tensor:
            x = self.token_embedding(text) + self.positional_embedding
            x = self.ln_final(self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
            return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection

        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            """Similarities (images, texts), and their transpose."""
            images = F.normalize(self.encode_image(image), dim=-1)
            logits = self.logit_scale.exp() * images @ F.normalize(self.encode_text(text), dim=-1).t()
            return logits, logits.t()


class Radio(nn.Module):
    """NVlabs/RADIO: timm's VisionTransformer, with a generator of summary and patch tokens as its embedding."""

    class PatchGenerator(nn.Module):
        def __init__(self, width: int, patch_size: int, num_skip: int) -> None:
            super().__init__()
            self.patch_size, self.num_skip = patch_size, num_skip
            self.embedder = nn.Linear(3 * patch_size**2, width)
            self.summary = nn.Parameter(torch.randn(1, num_skip, width))

        def forward(self, images: Tensor) -> Tensor:
            patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
            return torch.cat([self.summary.expand(len(images), -1, -1), self.embedder(patches)], 1)

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        arguments = {"img_size": image_size, "patch_size": patch_size, "embed_dim": width}
        self.model = timm.create_model("vit_base_patch16_224", depth=depth, num_heads=num_heads, **arguments)
        self.model.patch_generator = self.PatchGenerator(width, patch_size, num_skip=8)
        self.model.patch_embed = self.model.cls_token = self.model.pos_embed = None
        self.model.forward_features = self._forward_features

    def _forward_features(self, images: Tensor) -> Tensor:
        return self.model.norm(self.model.blocks(self.model.patch_generator(images)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(images)
        return tokens[:, :3].flatten(1), tokens[:, self.model.patch_generator.num_skip :]
