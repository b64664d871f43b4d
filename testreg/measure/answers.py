"""Which parts of an image a vision-language model attends to when it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families.kernels import attention_kernel
from testreg.families.language import decoder_blocks, image_tokens
from testreg.measure.attention import UNSEEN, AttentionRecorder
from testreg.measure.hooks import recording_inputs, recording_outputs


@torch.no_grad()
def answer_attention(
    model: nn.Module,
    inputs: Mapping[str, Any],
    blocks: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    neutral: Mapping[str, Any] | None = None,
) -> Tensor:
    """The attention to the h x w tokens of each image when the first token of the answer is predicted: (B, h, w).

    The first token of the answer is predicted from the last token of the prompt. So the map is the attention that this
    token gives to the image tokens in the blocks of the language model, in one forward of the prompt. The rest of its
    attention goes to the text.

    Language models have sinks of their own: a few image tokens that draw attention whatever the prompt says. With
    `neutral`, the map is divided by that of a neutral prompt (arXiv 2502.17422), which removes the sinks. It is then
    above 1 where this prompt draws more attention than the neutral one.

    Example:
        >>> from transformers import LlavaForConditionalGeneration
        >>> def llava_map(name, inputs):  # of transformers.AutoProcessor: processor(image, prompt, return_tensors="pt")
        ...     model = testreg.patch(LlavaForConditionalGeneration.from_pretrained(name))
        ...     return testreg.answer_attention(model, inputs)[0]  # (24, 24) for LLaVA-1.5

    Args:
        model: a vision-language model of transformers, patched or not, in eval mode: Llava, LlavaNext and
            LlavaOnevision (the map of the whole image, without the tiles), PaliGemma, Qwen-VL and others that place
            their images as these do.
        inputs: what its processor returns for prompts with one image each, padded on the left.
        blocks: the blocks (0-based) of the language model over which attention is averaged; None takes all.
        heads: the heads over which attention is averaged; None takes all.
        neutral: what the processor returns for the same images with a prompt that asks for nothing in particular, such
            as "Write a general description of the image."

    Raises:
        ValueError: the model is no vision-language model, it is not known how its image tokens form a grid, or an
            argument does not fit.
        RuntimeError: attention cannot be observed from Python (compiled or custom kernels).
    """
    if neutral is not None:
        of_prompt, of_neutral = (answer_attention(model, each, blocks, heads) for each in (inputs, neutral))
        if of_prompt.shape != of_neutral.shape:
            raise ValueError(
                f"the neutral prompts have other images: maps {tuple(of_neutral.shape)}, not {tuple(of_prompt.shape)}"
            )
        return of_prompt / of_neutral.clamp(min=torch.finfo(of_neutral.dtype).tiny)
    layers = decoder_blocks(model)
    chosen = range(len(layers)) if blocks is None else blocks
    if not chosen or any(not -len(layers) <= block < len(layers) for block in chosen):
        raise ValueError(f"blocks={list(chosen)} do not fit: the language model has {len(layers)} blocks")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not mask[:, -1].all():
        raise ValueError("the prompts are padded on the right, where the answer goes: use padding_side='left'")
    positions, grid = image_tokens(model, inputs)
    modules, recorded = [layers[block] for block in chosen], list[Tensor]()
    with (
        attention_kernel(model, "sdpa", instead_of=UNSEEN),
        AttentionRecorder(lambda num_tokens: slice(-1, None)) as recorder,
        recording_inputs(modules, lambda index, tokens: recorder.recorded.clear()),
        recording_outputs(modules, lambda index, tokens: recorded.extend(recorder.recorded)),
    ):
        model(**inputs)
    if len(recorded) != len(modules):
        raise RuntimeError(f"saw no attention in the blocks of {type(model).__name__}: use its sdpa or eager attention")
    attention = torch.stack(recorded, 1)  # (B, blocks, heads, T)
    if heads is not None:
        if not heads or any(not -attention.shape[2] <= head < attention.shape[2] for head in heads):
            raise ValueError(f"heads={list(heads)} do not fit: the language model has {attention.shape[2]} heads")
        attention = attention[:, :, list(heads)]
    return attention.mean((1, 2)).gather(1, positions.to(attention.device)).unflatten(1, grid)
