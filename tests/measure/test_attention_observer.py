import pytest
import torch
import torch.nn.functional as F
from torch import nn

from testreg.measure.attention_observer import AttentionObserver, FusedAttention, UnfusedAttention

SOME = torch.tensor([3, 0])


def seen_in(run):
    seen = []
    with AttentionObserver(seen.append):
        run()
    return seen


def masks(number_of_heads, queries, keys):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(queries, keys, generator=generator) < 0.3
    hidden[:, 0] = False  # every query sees something
    padding = torch.zeros(2, keys, dtype=torch.bool)
    padding[1, -2:] = True
    of_heads = torch.rand(2 * number_of_heads, queries, keys, generator=generator)
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "added": {"attn_mask": torch.rand(queries, keys, generator=generator)},
        "of each head": {"attn_mask": of_heads},
        "padding": {"key_padding_mask": padding},
        "padding and bool": {"key_padding_mask": padding, "attn_mask": hidden},
    }


@pytest.mark.parametrize("mask", list(masks(2, 1, 1)))
@pytest.mark.parametrize("widths", ["alike", "of their own"])
@torch.no_grad()
def test_of_a_module_the_weights_are_those_that_it_returns(mask, widths):
    torch.manual_seed(0)
    width = 8 if widths == "alike" else 12
    module = nn.MultiheadAttention(8, 2, kdim=width, vdim=width, batch_first=True)
    nn.init.normal_(module.in_proj_bias)
    query, key = torch.randn(2, 4, 8), torch.randn(2, 5, width)
    kwargs = masks(2, 4, 5)[mask]
    _, expected = module(query, key, key, average_attn_weights=False, **kwargs)
    (seen,) = seen_in(lambda: module(query, key, key, need_weights=False, **kwargs))
    torch.testing.assert_close(seen.weights(SOME), expected[:, :, SOME])
    assert (seen.num_images, seen.num_tokens, seen.is_self_attention) == (2, 5, False)


@pytest.mark.parametrize("mask", list(masks(2, 1, 1)))
@pytest.mark.parametrize(
    "options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]
)
@torch.no_grad()
def test_keys_that_a_module_appends_are_seen_behind_the_tokens(options, mask):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    tokens, kwargs = torch.randn(2, 4, 8), masks(2, 4, 4)[mask]
    _, expected = module(tokens, tokens, tokens, average_attn_weights=False, **kwargs)
    (seen,) = seen_in(lambda: module(tokens, tokens, tokens, **kwargs))
    torch.testing.assert_close(seen.weights(SOME), expected[:, :, SOME])
    assert (seen.num_queries, seen.num_tokens, seen.is_self_attention) == (4, 4 + len(options), True)
    assert seen.values.shape == (2, 2, 4 + len(options), 4)


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "added", "scale", "grouped"])
def test_fused_weights_and_values_give_what_the_kernel_gives(kind):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3)
    hidden = torch.rand(5, 5) < 0.3
    hidden[:, 0] = False
    kwargs = {
        "plain": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": ~hidden},
        "added": {"attn_mask": torch.randn(2, 1, 5, 5)},
        "scale": {"scale": 0.3},
        "grouped": {"enable_gqa": True},
    }[kind]
    if kind == "grouped":
        key, value = key[:, :2], value[:, :2]
    (seen,) = seen_in(lambda: F.scaled_dot_product_attention(query, key, value, **kwargs))
    assert isinstance(seen, FusedAttention)
    expected = F.scaled_dot_product_attention(query, key, value, **kwargs)
    torch.testing.assert_close(seen.weights(slice(None)) @ seen.values, expected)
    torch.testing.assert_close(seen.weights(SOME) @ seen.values, expected[:, :, SOME])
    torch.testing.assert_close(seen.projections[0], query.transpose(1, 2).reshape(2, 5, 12))


def test_an_unfused_attention_is_seen_with_the_values_behind_dropout_and_casts():
    logits, values = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 5)

    def run():
        weights = F.dropout(logits.softmax(-1).double(), 0.0)
        return weights @ values.double()

    (seen,) = seen_in(run)
    assert isinstance(seen, UnfusedAttention)
    torch.testing.assert_close(seen.weights(SOME), logits.softmax(-1)[:, :, SOME].double())
    torch.testing.assert_close(seen.values, values.double())


def test_weights_that_nothing_is_multiplied_with_are_seen_at_the_end():
    first, second = torch.randn(1, 1, 3, 3), torch.randn(1, 1, 3, 3)
    seen = []
    with AttentionObserver(seen.append) as observer:
        first.softmax(-1)
        assert not seen
        observer.end()
        assert len(seen) == 1
        second.softmax(-1)
    assert [each.values for each in seen] == [None, None]
    torch.testing.assert_close(seen[1].weights(slice(None)), second.softmax(-1))
