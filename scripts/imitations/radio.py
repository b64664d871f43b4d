"""An imitation of NVlabs' RADIO, made of parts of timm."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Radio(nn.Module):
    """timm's VisionTransformer, whose embedding is replaced by a generator of summary tokens and patch tokens."""

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
