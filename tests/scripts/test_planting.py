"""Planted models are what `scripts/planting` says of them."""

from contextlib import contextmanager

import pytest
import timm
import torch
import transformers
from marks import slow_except
from planting import plant, plant_into
from tiny import HF, TIMM, fresh

import testreg
from testreg.families import find_tower
from testreg.measure.outliers import OutlierRule, token_norms

FAMILIES = ["timm_vit", "timm_eva", "hf_clip", "hf_dinov2", "hf_siglip", "hf_dinov3", "open_clip"]
QUICK = ("timm_vit", "hf_clip", "open_clip")
WITH_POSITIONS = ["timm_vit", "timm_eva", "hf_dinov2", "hf_siglip"]
FIXED = (1, 2)  # of 4 x 4 patches


def random_model(name, seed=0):
    if name == "timm_eva":
        torch.manual_seed(seed)
        return timm.create_model("vit_small_patch16_rope_ape_224", num_classes=0, init_values=1.0, **TIMM).eval()
    return fresh(name, seed)


def outliers_of(tower, images):
    """(L, B, N)"""
    norms = token_norms(tower, images)[..., tower.num_prefix :]
    return norms > OutlierRule().limit(norms)


@torch.no_grad()
def patches_of(tower, images, index):
    """Patches (B, N, C) behind a block, and hidden activations (B, N, H) in it."""
    found = []
    block = tower.blocks[index]
    handles = [
        block.mlps[0].fc2.register_forward_pre_hook(lambda module, args: found.append(args[0])),
        block.module.register_forward_hook(
            lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
        ),
    ]
    tower.run(images)
    for handle in handles:
        handle.remove()
    hidden, tokens = (tower.batch_first(each)[:, tower.num_prefix :] for each in found)
    return tokens, hidden


@contextmanager
def silenced(tower, neurons):
    """Neurons {block: [units]} write nothing."""
    with torch.no_grad():
        columns = [(tower.blocks[block].mlps[0].columns, units) for block, units in neurons.items()]
        kept = [each[:, units].clone() for each, units in columns]
        for each, units in columns:
            each[:, units] = 0.0
        yield
        for (each, units), values in zip(columns, kept, strict=True):
            each[:, units] = values


@pytest.mark.parametrize("two_blocks", [False, True])
@pytest.mark.parametrize("name", slow_except(FAMILIES, *QUICK))
def test_planted_neurons_make_the_outliers(name, two_blocks, photos):
    model = random_model(name)
    planted = plant(model, photos, num_neurons=6, two_blocks=two_blocks, outlier_fraction=0.03)
    assert {block: len(units) for block, units in planted.neurons.items()} == ({1: 2, 2: 4} if two_blocks else {2: 6})
    assert planted.decoys == {}
    tower = find_tower(model)
    outlier = outliers_of(tower, photos)
    share = outlier.float().mean((1, 2)).tolist()
    assert share == pytest.approx([0, 0.01 if two_blocks else 0, 0.03, 0.03], abs=0.01)
    for block, units in planted.neurons.items():
        with silenced(tower, {block: units}):
            left = outliers_of(tower, photos)
        if two_blocks:  # the other ones
            assert left[3].any()
            assert not (left[1] if block == 1 else left[2] & ~outlier[1]).any()
        else:
            assert not left.any()
    with silenced(tower, planted.neurons):
        assert not outliers_of(tower, photos).any()


@pytest.mark.parametrize("name", slow_except(FAMILIES, *QUICK))
def test_decoys_are_there_when_outliers_are_but_do_not_make_them(name, photos):
    model = random_model(name)
    planted = plant(model, photos, num_neurons=4, norm_ratio=16.0, decoys=True)
    tower = find_tower(model)
    outlier = outliers_of(tower, photos)
    assert outlier.float().mean((1, 2)).tolist() == pytest.approx([0, 0, 0.02, 0.02], abs=0.01)
    normal = ~outlier.any(0)
    features, _ = patches_of(tower, photos, 3)
    loudest = min(patches_of(tower, photos, 2)[1][outlier[2]][:, unit].mean().item() for unit in planted.neurons[2])
    change = {}
    for decoy, (block, unit) in planted.named_decoys.items():
        assert unit in planted.decoys[block]
        assert unit not in planted.neurons.get(block, [])
        hidden = patches_of(tower, photos, block)[1][..., unit]
        assert hidden[outlier[2]].mean() > 0.7 * loudest, decoy
        if decoy in ("idle", "companion", "echo"):
            assert hidden[normal].abs().mean() < 0.2, decoy
        with silenced(tower, {block: [unit]}):
            left = outliers_of(tower, photos)[outlier]
            # In some random models the trap lifts an outlier or two just over the limit.
            assert left.all() or (decoy == "trap" and left.float().mean() > 0.9), decoy
            change[decoy] = (features - patches_of(tower, photos, 3)[0])[normal].norm(dim=-1).mean()
    assert change["trap"] > 0.05 * features[normal].norm(dim=-1).mean()
    assert change["trap"] > 5 * max(change[decoy] for decoy in ("idle", "companion", "echo"))


@pytest.mark.parametrize("name", slow_except(FAMILIES, *QUICK))
def test_an_echo_writes_much_across_the_outliers(name, photos):
    model = random_model(name)
    planted = plant(model, photos, num_neurons=4, norm_ratio=16.0, decoys=True)
    tower = find_tower(model)
    outlier = outliers_of(tower, photos)[3]
    block, unit = planted.named_decoys["echo"]
    tokens, _ = patches_of(tower, photos, block)
    with silenced(tower, {block: [unit]}):
        without, _ = patches_of(tower, photos, block)
    with silenced(tower, planted.neurons):
        assert patches_of(tower, photos, block)[1][..., unit].abs().max() < 0.5  # it fires because of them
    written = (tokens - without)[outlier]
    assert written.norm(dim=-1).mean() > 2 * tokens.norm(dim=-1).median()
    assert torch.cosine_similarity(written, without[outlier], dim=-1).abs().mean() < 0.15
    assert tokens[outlier].norm(dim=-1).mean() < 1.1 * without[outlier].norm(dim=-1).mean()


@pytest.mark.parametrize("num_neurons", [0, 4])
@pytest.mark.parametrize("name", slow_except(WITH_POSITIONS, "timm_vit"))
def test_a_fixed_position_is_an_outlier_everywhere(name, num_neurons, photos):
    model = random_model(name)
    planted = plant(model, photos, num_neurons=num_neurons, decoys=True, fixed_position=FIXED)
    tower = find_tower(model)
    row, column = FIXED
    for neurons in ({}, planted.neurons, planted.decoys):
        with silenced(tower, neurons):
            outlier = outliers_of(tower, photos).unflatten(-1, (4, 4))
        assert outlier[..., row, column].all()
        if num_neurons == 0 or neurons is planted.neurons:
            assert outlier.sum() == outlier[..., row, column].sum()
    assert outlier[2:].sum() > 1.1 * outlier[2:, ..., row, column].sum() or num_neurons == 0


@pytest.mark.parametrize(("name", "message"), [("hf_clip", "norm in front"), ("hf_dinov3", "no position embedding")])
def test_not_every_family_has_fixed_positions(name, message, photos):
    with pytest.raises(ValueError, match=message):
        plant(random_model(name), photos, fixed_position=FIXED)


@pytest.mark.parametrize("decoys", [False, True])
@pytest.mark.parametrize("name", slow_except(FAMILIES, *QUICK))
def test_without_neurons_a_model_is_clean(name, decoys, photos):
    model = random_model(name)
    planted = plant(model, photos, num_neurons=0, decoys=decoys)
    assert planted.neurons == {}
    assert set(planted.named_decoys) == ({"loud", "idle", "companion", "echo", "trap"} if decoys else set())
    assert not outliers_of(find_tower(model), photos).any()


def test_two_blocks_need_two_neurons(photos):
    with pytest.raises(ValueError, match="one neuron a block"):
        plant(fresh("timm_vit"), photos, num_neurons=1, two_blocks=True)


def test_a_family_without_a_row_is_refused(photos):
    model = timm.create_model("beit_base_patch16_224", num_classes=0, **TIMM).eval()
    with pytest.raises(ValueError, match="does not know timm Beit"):
        plant(model, photos)


def deep_model(name, depth=8):
    torch.manual_seed(0)
    if name == "timm_vit":
        return timm.create_model("vit_base_patch16_224", num_classes=0, **TIMM | {"depth": depth}).eval()
    if transformers.__version__ < "5":
        pytest.skip("transformers 4 draws other weights, for which the thresholds here are not made")
    config = transformers.SiglipVisionConfig(**HF | {"num_hidden_layers": depth})
    return transformers.SiglipVisionModel(config).eval()


def features_of(tower, images):
    return patches_of(tower, images, tower.depth - 1)[0]


MECHANISMS = {
    "triggers": (2, 6, (7, 40)),
    "spread": (4, 16, (40, 130)),
    "two_populations": (4, 9, (6, 45)),
    "weak": (2, 6, (2, 6)),
    "rare": (2, 6, (3, 40)),
    "fading": (2, 6, (4, 16)),
}
"""Triggers, amplifiers, and the norm of an outlier over the median."""


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", slow_except(["timm_vit", "hf_siglip"], "timm_vit"))
def test_a_mechanism_makes_outliers_that_moving_its_neurons_takes_away(name, mechanism, photos):
    model = deep_model(name)
    planted = plant(model, photos, mechanism=mechanism, decoys=True, outlier_fraction=0.03)
    tower = find_tower(model)
    roles = list(planted.roles.values())
    num_triggers, num_amplifiers, (low, high) = MECHANISMS[mechanism]
    assert (roles.count("trigger"), roles.count("amplifier")) == (num_triggers, num_amplifiers)
    assert {(block, unit) for block, units in planted.neurons.items() for unit in units} == {
        neuron for neuron, role in planted.roles.items() if role != "eraser"
    }
    assert not planted.named_decoys.keys() & planted.roles.keys()

    norms = token_norms(tower, photos)[..., tower.num_prefix :]
    outlier = norms > OutlierRule().limit(norms)
    count = outlier.sum((1, 2))
    first = min(block for (block, _), role in planted.roles.items() if role == "trigger")
    assert count[: first + 1].max() <= 0.1 * count.max()  # triggers make none
    most = int(count.argmax())
    assert low < (norms / norms.median(-1, keepdim=True).values)[most][outlier[most]].median() < high
    with planted.silenced(model):
        assert not outliers_of(tower, photos).any()
        truth = features_of(tower, photos)
    with testreg.patched(model, planted.neurons):
        assert outliers_of(tower, photos).sum((1, 2)).max() < 0.05 * count.max()
        after = torch.cosine_similarity(features_of(tower, photos), truth, dim=-1).mean()
    assert after > 0.95


@pytest.mark.parametrize("name", slow_except(["timm_vit", "hf_siglip"], "timm_vit"))
def test_the_triggers_cause_what_amplifiers_do(name, photos):
    model = deep_model(name)
    planted = plant(model, photos, mechanism="spread", outlier_fraction=0.03)
    tower = find_tower(model)
    count = outliers_of(tower, photos).sum((1, 2)).max()
    block = min(planted.neurons)
    with silenced(tower, {block: planted.neurons[block]}):
        assert not outliers_of(tower, photos).any()
    *amplifiers, _ = (each for each in planted.neurons if each > block)
    with silenced(tower, {each: planted.neurons[each] for each in amplifiers}):  # one block of them is left
        assert outliers_of(tower, photos).sum((1, 2)).max() > 0.6 * count


def test_the_second_population_shows_when_the_first_is_silent(photos):
    model = deep_model("timm_vit")
    planted = plant(model, photos, mechanism="two_populations", outlier_fraction=0.03)
    tower = find_tower(model)
    together = outliers_of(tower, photos)[-1]
    with silenced(tower, {block: planted.neurons[block] for block in (1, 3)}):
        second = outliers_of(tower, photos)
    with silenced(tower, {block: units for block, units in planted.neurons.items() if block > 3}):
        first = outliers_of(tower, photos)
    assert first[3].any()
    assert not second[:4].any()
    assert second[-1].any()
    assert (second[-1] & first[-1]).any()  # some hidden
    assert (together & ~first[-1]).any()  # some not


def test_rare_and_fading_outliers(photos):
    model = deep_model("timm_vit")
    plant(model, photos, mechanism="rare", outlier_fraction=0.03)
    assert 0 < outliers_of(find_tower(model), photos)[-1].any(-1).float().mean() < 0.35
    model = deep_model("timm_vit")
    plant(model, photos, mechanism="fading", outlier_fraction=0.03)
    count = outliers_of(find_tower(model), photos).sum((1, 2))
    assert count[-1] < 0.35 * count.max()


def test_planting_into_a_network_keeps_the_rest(photos):
    model = deep_model("timm_vit", depth=12)
    plant(model, photos, num_neurons=0)  # a network without outliers
    before = {name: value.clone() for name, value in model.state_dict().items()}
    planted = plant_into(model, photos, mechanism="spread", outlier_fraction=0.03)
    assert {block: len(units) for block, units in planted.neurons.items()} == dict.fromkeys(range(3, 10), 4)
    for name, value in model.state_dict().items():
        changed = (value != before[name]).nonzero()
        if len(changed):
            _, block, *_, kind = name.removesuffix(".weight").removesuffix(".bias").split(".")
            units = changed[:, 1] if name.endswith("fc2.weight") else changed[:, 0]
            assert kind in ("fc1", "fc2")
            assert set(units.tolist()) == set(planted.neurons[int(block)])
    tower = find_tower(model)
    outlier = outliers_of(tower, photos)
    assert outlier[9].float().mean() > 0.01
    with planted.silenced(model):
        assert outliers_of(tower, photos).sum((1, 2)).max() < 0.05 * outlier.sum((1, 2)).max()
    with testreg.patched(model, planted.neurons):
        assert outliers_of(tower, photos).sum((1, 2)).max() < 0.05 * outlier.sum((1, 2)).max()


def test_outliers_that_do_not_arise_cannot_fade(photos):
    with pytest.raises(ValueError, match="none can fade there: try another seed"):
        plant(deep_model("timm_vit"), photos[:1].expand(8, -1, -1, -1) * 0, mechanism="fading")


def test_mechanisms_need_blocks(photos):
    with pytest.raises(ValueError, match="needs 8 blocks"):
        plant(fresh("timm_vit"), photos, mechanism="spread")
    with pytest.raises(ValueError, match="12 blocks"):
        plant_into(fresh("timm_vit"), photos)
