"""Models of repositories that are no package, imitated: their class, module and argument names, and what they return.

These imitate the interface only, in words of their own. Weights do not load into them, and nothing here shows that the
originals compute the same numbers. DINO and CLIP call their tower VisionTransformer, so each is a namespace here.
"""

from __future__ import annotations

from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dino:
    """facebookresearch/dino, `vision_transformer.py`."""

    class Mlp(nn.Module):
        def __init__(self, width: int, hidden: int) -> None:
            super().__init__()
            self.fc1 = nn.Linear(width, hidden)
            self.act = nn.GELU()
            self.fc2 = nn.Linear(hidden, width)
            self.drop = nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    class Attention(nn.Module):
        def __init__(self, width: int, num_heads: int) -> None:
            super().__init__()
            self.num_heads = num_heads
            self.scale = (width // num_heads) ** -0.5
            self.qkv = nn.Linear(width, 3 * width)
            self.attn_drop = nn.Dropout(0.0)
            self.proj = nn.Linear(width, width)
            self.proj_drop = nn.Dropout(0.0)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            """The tokens, and the weights (B, heads, T, T)."""
            query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            attn = self.attn_drop((query @ key.transpose(-2, -1) * self.scale).softmax(-1))
            return self.proj_drop(self.proj((attn @ value).transpose(1, 2).flatten(2))), attn

    class Block(nn.Module):
        def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(width, eps=1e-6)
            self.attn = Dino.Attention(width, num_heads)
            self.drop_path = nn.Identity()
            self.norm2 = nn.LayerNorm(width, eps=1e-6)
            self.mlp = Dino.Mlp(width, int(width * mlp_ratio))

        def forward(self, x: Tensor, return_attention: bool = False) -> Tensor:
            """The tokens; or, instead of them, the attention weights."""
            y, attn = self.attn(self.norm1(x))
            if return_attention:
                return attn
            x = x + self.drop_path(y)
            return x + self.drop_path(self.mlp(self.norm2(x)))

    class PatchEmbed(nn.Module):
        def __init__(self, img_size: int, patch_size: int, width: int) -> None:
            super().__init__()
            self.img_size, self.patch_size = img_size, patch_size
            self.num_patches = (img_size // patch_size) ** 2
            self.proj = nn.Conv2d(3, width, patch_size, patch_size)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).flatten(2).transpose(1, 2)

    class VisionTransformer(nn.Module):
        def __init__(
            self, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0
        ) -> None:
            super().__init__()
            self.num_features = self.embed_dim = embed_dim
            self.patch_embed = Dino.PatchEmbed(img_size, patch_size, embed_dim)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
            self.pos_drop = nn.Dropout(0.0)
            self.blocks = nn.ModuleList([Dino.Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
            self.head = nn.Identity()

        def interpolate_pos_encoding(self, x: Tensor, width: int, height: int) -> Tensor:
            patch, side = self.patch_embed.patch_size, int(self.patch_embed.num_patches**0.5)
            cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            if (width // patch, height // patch) != (side, side):
                grid = F.interpolate(grid, (width // patch, height // patch), mode="bicubic")
            return torch.cat([cls, grid.flatten(2).transpose(1, 2)], 1)

        def prepare_tokens(self, x: Tensor) -> Tensor:
            width, height = x.shape[-2:]  # the original's names for them
            x = self.patch_embed(x)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            return self.pos_drop(x + self.interpolate_pos_encoding(x, width, height))

        def forward(self, x: Tensor) -> Tensor:
            x = self.prepare_tokens(x)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)[:, 0]

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
            self.ln_1 = OpenAIClip.LayerNorm(d_model)
            layers = {
                "c_fc": nn.Linear(d_model, 4 * d_model),
                "gelu": OpenAIClip.QuickGELU(),
                "c_proj": nn.Linear(4 * d_model, d_model),
            }
            self.mlp = nn.Sequential(OrderedDict(layers))
            self.ln_2 = OpenAIClip.LayerNorm(d_model)
            self.attn_mask = attn_mask  # no buffer, in the original

        def attention(self, x: Tensor) -> Tensor:
            mask = self.attn_mask.to(x) if self.attn_mask is not None else None
            return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

        def forward(self, x: Tensor) -> Tensor:
            """Tokens (T, B, C)."""
            x = x + self.attention(self.ln_1(x))
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
        def __init__(
            self, input_resolution: int, patch_size: int, width: int, layers: int, heads: int, output_dim: int
        ) -> None:
            super().__init__()
            self.input_resolution, self.output_dim = input_resolution, output_dim
            self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
            self.class_embedding = nn.Parameter(torch.randn(width))
            self.positional_embedding = nn.Parameter(torch.randn((input_resolution // patch_size) ** 2 + 1, width))
            self.ln_pre = OpenAIClip.LayerNorm(width)
            self.transformer = OpenAIClip.Transformer(width, layers, heads)
            self.ln_post = OpenAIClip.LayerNorm(width)
            self.proj = nn.Parameter(torch.randn(width, output_dim))

        def forward(self, x: Tensor) -> Tensor:
            patches = self.conv1(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1)
            x = self.ln_pre(x + self.positional_embedding).permute(1, 0, 2)
            x = self.transformer(x).permute(1, 0, 2)
            return self.ln_post(x[:, 0]) @ self.proj

    class CLIP(nn.Module):
        def __init__(
            self,
            embed_dim: int,
            image_resolution: int,
            vision_layers: int,
            vision_width: int,
            vision_patch_size: int,
            vision_heads: int,
            context_length: int,
            vocab_size: int,
        ) -> None:
            super().__init__()
            self.visual = OpenAIClip.VisionTransformer(
                image_resolution, vision_patch_size, vision_width, vision_layers, vision_heads, embed_dim
            )
            mask = torch.full((context_length, context_length), -torch.inf).triu(1)
            self.transformer = OpenAIClip.Transformer(embed_dim, 1, 2, mask)
            self.token_embedding = nn.Embedding(vocab_size, embed_dim)
            self.positional_embedding = nn.Parameter(torch.randn(context_length, embed_dim))
            self.ln_final = OpenAIClip.LayerNorm(embed_dim)
            self.text_projection = nn.Parameter(torch.randn(embed_dim, embed_dim))
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

        @property
        def dtype(self) -> torch.dtype:
            return self.visual.conv1.weight.dtype

        def encode_image(self, image: Tensor) -> Tensor:
            return self.visual(image.type(self.dtype))

        def encode_text(self, text: Tensor) -> Tensor:
            x = self.token_embedding(text) + self.positional_embedding
            x = self.ln_final(self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
            return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection

        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            """Similarities (images, texts), and their transpose."""
            images = F.normalize(self.encode_image(image), dim=-1)
            texts = F.normalize(self.encode_text(text), dim=-1)
            logits = self.logit_scale.exp() * images @ texts.t()
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
