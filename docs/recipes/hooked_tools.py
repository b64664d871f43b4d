"""Tools that hook modules inside the blocks, on a patched model: python hooked_tools.py MODEL PHOTO [NEURONS]

Within `testreg.hooks_without_registers` these see the tokens that they know, in shapes and in gradients. Take CAMs at
`norm1` of the last block, or at the output of an earlier block: a head that reads CLS alone uses no patch of the last
block's output.
"""

import sys

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import AttentionExtract
from torch import Tensor, nn

import testreg


def grad_cam(model: nn.Module, images: Tensor) -> Tensor:
    """pytorch-grad-cam's recipe for ViTs: (B, h, w) of the most likely class, at the image's size."""
    from pytorch_grad_cam import GradCAM

    side = model.patch_embed.grid_size[0]

    def as_map(tokens: Tensor) -> Tensor:
        return tokens[:, model.num_prefix_tokens :].reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)

    with GradCAM(model=model, target_layers=[model.blocks[-1].norm1], reshape_transform=as_map) as cam:
        return torch.from_numpy(cam(input_tensor=images, targets=None))


def attention_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """Attention rollout, as by hooks on `attn_drop`: what CLS has of each patch (B, N) in the end."""
    seen: list[Tensor] = []
    drops = [module for name, module in model.named_modules() if name.endswith("attn_drop")]
    handles = [drop.register_forward_hook(lambda module, args, output: seen.append(output)) for drop in drops]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    result = torch.eye(seen[0].shape[-1])
    for attention in seen:
        mixed = attention.mean(1) + torch.eye(attention.shape[-1])
        result = mixed / mixed.sum(-1, keepdim=True) @ result
    return result[:, 0, model.num_prefix_tokens :]


def key_descriptors(model: nn.Module, images: Tensor, block: int = -1) -> Tensor:
    """Keys of a block as dense descriptors (B, heads, T, D), as a hook on attention that projects its input anew."""
    seen: list[Tensor] = []

    def hook(attention: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        batch, tokens, width = args[0].shape
        projected = attention.qkv(args[0]).reshape(batch, tokens, 3, attention.num_heads, width // attention.num_heads)
        seen.append(projected[:, :, 1].transpose(1, 2))

    handle = model.blocks[block].attn.register_forward_hook(hook)
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def lost_similarity(model: nn.Module, images: Tensor) -> Tensor:
    """LOST's similarity of patches (B, N, N): of the keys that a hook on the last `qkv` sees."""
    seen: dict[str, Tensor] = {}
    qkv = model.blocks[-1].attn.qkv
    handle = qkv.register_forward_hook(lambda module, args, output: seen.update(qkv=output))
    with torch.no_grad():
        model(images)
    handle.remove()
    tokens = 1 + model.patch_embed.num_patches  # it counts on CLS and the patches
    keys = seen["qkv"].reshape(len(images), tokens, 3, -1)[:, 1:, 1]
    return keys @ keys.mT


def timm_attention(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """timm's own extractor: attention (B, heads, T, T) of each block, by the name of its hook point."""
    with torch.no_grad():
        return AttentionExtract(model, method="hook")(images)


def visionzip_metric(model: nn.Module, images: Tensor, block: int = -2) -> tuple[Tensor, Tensor]:
    """VisionZip's choice of tokens: keys (B, T, D) that a block keeps for itself, and attention of CLS (B, N).

    An attention of one's own computes them in its forward, where no hook is: the block is patched with it inside.
    """
    attention = model.blocks[block].attn
    with torch.no_grad():
        model(images)
    return attention.metric, attention.weights[:, :, 0, 1:].sum(1)


def main(name: str, photo: str, neurons: str | None = None) -> Tensor:
    timm.layers.set_fused_attn(False)  # attention as matrices, which hooks can see
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = transform(Image.open(photo).convert("RGB")).unsqueeze(0)
    testreg.patch(model, neurons)
    with testreg.hooks_without_registers(model):
        cam = grad_cam(model, images)
        print(f"{name}: a CAM of {tuple(cam.shape)}, rollout of {tuple(attention_rollout(model, images).shape)}")
    return cam


if __name__ == "__main__":
    main(*sys.argv[1:])
