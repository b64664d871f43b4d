import pytest
import torch
from tiny import IMAGE, build

from testreg.families import find_tower
from testreg.measure.attention import attention_to_patches, entropy
from testreg.measure.outliers import OutlierRule, token_norms

FAMILIES = ["timm_vit", "timm_siglip", "hf_clip", "hf_deit", "open_clip", "open_clip_sequence_first", "torchvision_vit"]


def images(count=2):
    return torch.randn(count, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))


def test_rule_is_median_plus_k_robust_sigmas():
    norms = torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 30.0]])  # median 13, MAD 2
    assert OutlierRule(k=5, min_ratio=1).limit(norms).item() == pytest.approx(13 + 5 * 1.4826 * 2)


def test_rule_asks_for_a_multiple_of_the_median_where_norms_hardly_vary():
    norms = torch.tensor([[10.0, 10.0, 10.0, 10.0, 19.0]])
    assert OutlierRule(min_ratio=2).limit(norms).item() == 20.0


def test_rule_does_not_depend_on_scale_but_a_threshold_does():
    norms = torch.rand(3, 4, 50).exp()
    assert torch.equal(norms > OutlierRule().limit(norms), 64 * norms > OutlierRule().limit(64 * norms))
    assert OutlierRule(threshold=75).limit(norms).unique().item() == 75


@pytest.mark.parametrize("wrong", [{"k": 0}, {"min_ratio": -1}, {"threshold": float("nan")}])
def test_rule_rejects(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OutlierRule(**wrong)


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_are_those_of_the_block_outputs(name):
    tower = find_tower(build(name))
    norms = token_norms(tower, images())
    kept = []
    handle = tower.blocks[2].module.register_forward_hook(
        lambda module, args, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    tower.run(images())
    handle.remove()
    tokens = kept[0].transpose(0, 1) if tower.sequence_first else kept[0]
    torch.testing.assert_close(norms[2], tokens.norm(dim=-1))
    assert norms.shape == (4, 2, tower.num_prefix + 16)
    assert not any(block.module._forward_hooks for block in tower.blocks)


@pytest.mark.parametrize("name", ["hf_vit", "hf_clip", "hf_siglip", "hf_dinov2_registers"])
def test_attention_is_what_the_library_returns(name):
    model = build(name)
    tower = find_tower(model)
    seen = attention_to_patches(tower, images(), block=1)
    model.set_attn_implementation("eager")
    expected = model(images(), output_attentions=True).attentions[1]  # (B, heads, T, T)
    expected = expected.mean(2) if tower.num_prefix == 0 else expected[:, :, 0]
    torch.testing.assert_close(seen, expected[..., tower.num_prefix :])
    torch.testing.assert_close(attention_to_patches(tower, images(), block=1), seen)  # eager is observed as well


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_observed_without_changing_the_output(name):
    tower = find_tower(build(name))
    with torch.no_grad():
        before = token_norms(tower, images())
        attention = attention_to_patches(tower, images())
        torch.testing.assert_close(token_norms(tower, images()), before, rtol=0, atol=0)
    assert attention.shape == (2, 4, 16)
    assert (attention > 0).all()
    assert (attention.sum(-1) < 1 + 1e-5).all()


def test_open_clip_attention_does_not_depend_on_the_token_order():
    first, second = (find_tower(build(name)) for name in ("open_clip", "open_clip_sequence_first"))
    torch.testing.assert_close(attention_to_patches(first, images()), attention_to_patches(second, images()))


def test_entropy():
    torch.testing.assert_close(entropy(torch.full((8,), 0.05)), torch.tensor(8.0).log())
    assert entropy(torch.tensor([0.0, 0.5, 0.0])).item() == 0


def test_the_mixture_rule_takes_the_upper_of_two_components():
    generator = torch.Generator().manual_seed(0)
    normal = torch.exp(0.1 * torch.randn(3, 200, generator=generator))
    norms = normal.clone()
    norms[0, :60] *= 20  # a third of the patches: the median and its deviation hold, but not for more than half
    norms[1, 5], norms[1, 77] = 4.0, 40.0
    outliers = norms > OutlierRule(mixture=True).limit(norms)
    assert outliers[0].tolist() == [True] * 60 + [False] * 140
    assert outliers[1].nonzero().flatten().tolist() == [5, 77]
    assert not outliers[2].any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("deviation", [0.01, 0.2, 0.6])
def test_one_component_has_no_outliers(deviation, seed):
    normal = deviation * torch.randn(16, 256, generator=torch.Generator().manual_seed(seed))
    assert (OutlierRule(mixture=True).limit(normal.exp()) == float("inf")).all()


@pytest.mark.parametrize(
    ("norms", "outliers"),
    [
        ([1.0], []),
        ([1.0, 9.0], []),  # half of them are not the exception
        ([2.0] * 16, []),
        ([0.0] * 16, []),
        ([0.0] + [1.0] * 15, []),  # an exception below
        ([1.0] * 15 + [1.5], []),  # less than twice as much
        ([1.0] * 15 + [5.0], [15]),
        ([7.0, *[1.0] * 14, 5.0], [0, 15]),
    ],
)
def test_the_mixture_of_few_norms(norms, outliers):
    norms = torch.tensor(norms)
    limit = OutlierRule(mixture=True).limit(norms)
    assert limit.shape == (1,)
    assert (norms > limit).nonzero().flatten().tolist() == outliers


def test_a_mixture_has_no_threshold():
    with pytest.raises(ValueError, match="not both"):
        OutlierRule(mixture=True, threshold=3.0)
    assert OutlierRule(mixture=True).describe().startswith("norm in the upper of two components")
