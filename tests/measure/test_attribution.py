import copy

import pytest
import torch
from planting import plant
from tiny import BUILDERS, SPREAD_MLP, fresh

import testreg
from testreg.families import find_tower
from testreg.measure import attribution
from testreg.measure.attribution import attribution_of
from testreg.measure.hooks import recorded_norms, replacing_inputs
from testreg.measure.outliers import Detection, OutlierRule, token_norms

RULE = OutlierRule()
NAMES = ["timm_vit", "timm_clip", "hf_siglip", "open_clip_sequence_first", "torchvision_vit"]


def planted_in(name, photos, **options):
    model = fresh(name)
    return model, plant(model, photos, num_neurons=4, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_share_is_what_a_small_step_towards_normal_patches_takes_away(name, photos):
    """Of the excess of each image, as the mean over the blocks that count, by the difference of two forwards."""
    model, planted = planted_in(name, photos)
    model, images = model.double(), photos[:12].double()
    tower = find_tower(model)
    detection = Detection(RULE, 2, onset=2)
    found = attribution_of(tower, images, detection)
    patches = tower.patches(images)

    def norms(step=0.0, unit=0):
        """(2, B, N), after blocks 2 and 3, with the neuron `step` of the way from outliers to normal patches."""

        def moved(index, hidden):
            changed = tower.batch_first(hidden).clone()
            values = changed[:, patches, unit]  # (B, N), a view
            for image, outliers in enumerate(at):
                normal = values[image, ~outliers].mean()
                values[image, outliers] += step * (normal - values[image, outliers])
            return tower.batch_first(changed)

        with (
            torch.no_grad(),
            recorded_norms(tower, images) as kept,
            replacing_inputs([tower.blocks[2].mlps[0].fc2], moved),
        ):
            tower.run(images)
        return torch.stack(kept)[2:, :, patches].double()

    at = torch.zeros(len(images), patches.stop - patches.start, dtype=torch.bool)
    before = norms()
    outlier = before > RULE.limit(before)
    at = outlier.any(0)
    normal = RULE.normal(before)

    def excess(after):
        return torch.where(outlier, after / normal - 1, 0.0).sum(-1)  # (2, B)

    for unit in (*planted.neurons[2], 0, 1):
        lost = (excess(before) - excess(norms(1e-4, unit))) / 1e-4 / excess(before).clamp(min=1e-12)
        expected = lost.sum(0) / (excess(before) > 0).sum(0).clamp(min=1)
        assert found.share[:, 2, unit] == pytest.approx(expected.float(), abs=2e-3)
    assert (found.share[at.any(1)][:, 2, planted.neurons[2]] > 0.02).any(0).all()
    assert not found.share[~at.any(1)].any()


@pytest.mark.parametrize("name", NAMES)
def test_energies_by_hand(name, photos):
    model, planted = planted_in(name, photos)
    tower = find_tower(model)
    hidden = []
    handle = tower.blocks[2].mlps[0].fc2.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach()))
    token_norms(tower, photos)
    handle.remove()
    found = attribution_of(tower, photos, Detection(RULE, 2, onset=2))
    patches = tower.patches(photos)
    squared = tower.batch_first(hidden[0])[:, patches].square()
    norms = token_norms(tower, photos)[2:, :, patches]
    at = (norms > RULE.limit(norms)).any(0)
    unit = planted.neurons[2][0]
    for image in range(len(photos)):
        expected = squared[image, at[image], unit].sum().item()
        assert found.energy_at_outliers[image, 2, unit] == pytest.approx(expected, rel=1e-4)
        expected = squared[image, :, unit].sum().item() if at[image].any() else 0.0
        assert found.energy[image, 2, unit] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in BUILDERS if "swiglu" not in name and name not in SPREAD_MLP])
def test_it_is_the_same_in_parts(name, photos, monkeypatch):
    model, _ = planted_in(name, photos)
    tower, detection = find_tower(model), Detection(RULE, 2, onset=2)
    whole = attribution_of(tower, photos[:5], detection)
    monkeypatch.setattr(attribution, "MEMORY", 1)
    parts = attribution_of(tower, photos[:5], detection)
    for field in ("share", "energy_at_outliers", "energy"):
        torch.testing.assert_close(getattr(parts, field), getattr(whole, field), rtol=1e-3, atol=1e-4)


def test_only_the_blocks_that_count_do(photos):
    model, planted = planted_in("timm_clip", photos)
    tower = find_tower(model)
    last = attribution_of(tower, photos, Detection(RULE, 3)).share.sum(0)
    assert (last[2, planted.neurons[2]] > 0).all()
    assert not attribution_of(tower, photos, Detection(RULE, 0)).share[:, 1:].any()  # nothing behind acts on block 0


def test_nothing_is_left_behind_and_the_mode_does_not_matter(photos):
    model, _ = planted_in("timm_clip", photos)
    tower, detection = find_tower(model), Detection(RULE, 2, onset=2)
    before = copy.deepcopy(model.state_dict())
    expected = attribution_of(tower, photos[:4], detection).share
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            images = photos[:4].clone()
            assert torch.allclose(attribution_of(tower, images, detection).share, expected, atol=1e-5)
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_patched_model_shows_what_is_left(photos):
    """Of four neurons, three are moved: the fourth makes what is left, and the register's token counts nowhere."""
    model, planted = planted_in("timm_clip", photos, norm_ratio=40.0)
    tower, detection = find_tower(model), Detection(RULE, 2, onset=2)
    *moved, left = planted.neurons[2]
    with testreg.patched(model, {2: moved}):
        found = attribution_of(tower, photos, detection)
    share = found.share.sum(0)
    assert int(share[2].argmax()) == left
    assert share[2, moved].abs().max() < 0.05 * share[2, left]
    assert found.outlier.shape == (tower.depth, len(photos), 16)


def test_images_without_outliers_are_not_run_if_norms_are_known(photos):
    model, _ = planted_in("timm_clip", photos)
    tower, detection = find_tower(model), Detection(RULE, 2, onset=2)
    norms = token_norms(tower, photos)
    expected = attribution_of(tower, photos, detection)
    num_run = []
    handle = tower.blocks[0].module.register_forward_pre_hook(lambda module, args: num_run.append(len(args[0])))
    found = attribution_of(tower, photos, detection, norms=norms)
    handle.remove()
    with_outliers = int(found.outlier.any(0).any(-1).sum())
    assert 0 < with_outliers < len(photos)
    assert sum(num_run) == with_outliers
    torch.testing.assert_close(found.share, expected.share)


def test_a_model_that_has_no_gradients_is_an_error(photos):
    model, _ = planted_in("timm_clip", photos)
    forward = model.blocks[3].forward
    model.blocks[3].forward = torch.no_grad()(lambda *args, **kwargs: forward(*args, **kwargs))
    with pytest.raises(ValueError, match=r"cannot be differentiated \(.*score='contribution'"):
        attribution_of(find_tower(model), photos, Detection(RULE, 3))
