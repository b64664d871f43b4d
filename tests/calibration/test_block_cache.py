import pytest
import torch
from marks import slow_except
from planting import plant
from tiny import BUILDERS, SPREAD_MLP, fresh, packed, photograph_crops

from testreg.calibration.block_cache import BlockCache
from testreg.calibration.effects import CACHE_BYTES, EffectMeter
from testreg.families import find_tower
from testreg.measure.outliers import Detection, OutlierRule

RULE = OutlierRule()


def meter_of(name, head=None):
    images = photograph_crops()[:9]
    model = fresh(name)
    planted = plant(model, images, num_neurons=6, two_blocks=True)
    tower = find_tower(model)
    neurons = [(block, unit, None) for block, units in planted.neurons.items() for unit in units]
    meter = EffectMeter(model, tower, packed(images), Detection(RULE, 2), 1, batch_size=5, head=head)
    meter.block_cache = BlockCache(tower, CACHE_BYTES)
    return meter, neurons


def measured(meter, neurons, num_registers=1, start="zeros"):
    return meter.effect(neurons, num_registers, start)


def assert_alike(one, other):
    assert (one.neurons, one.worst_block) == (other.neurons, other.worst_block)
    for name in ("remaining", "excess", "change_pooled", "change_patches", "sink", "hottest", "hotter", "unlike"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5), name


@pytest.mark.parametrize(
    "name",
    slow_except(
        [name for name in BUILDERS if "swiglu" not in name and name not in SPREAD_MLP],
        "timm_clip",
        "hf_siglip",
        "open_clip_sequence_first",
        "torchvision_vit",
    ),
)
def test_effects_are_what_they_would_be_without_it(name):
    meter, neurons = meter_of(name)
    late = [neuron for neuron in neurons if neuron[0] == 2]
    sets = [late, late[:1], neurons, late, [(0, 5, None), *late], neurons[:2]]
    reused = [measured(meter, each) for each in sets]
    for each, effect in zip(sets, reused, strict=True):
        meter.block_cache = BlockCache(meter.tower)
        assert_alike(effect, measured(meter, each))
    assert all("forward" not in vars(block.module) for block in meter.tower.blocks)


@pytest.mark.parametrize("name", ["timm_clip", "hf_siglip"])
def test_registers_that_enter_late_are_kept_from_the_block_that_they_enter(name):
    meter, neurons = meter_of(name)
    late = [neuron for neuron in neurons if neuron[0] == 2]
    # With the third set, blocks are skipped in front of the entry and behind it.
    sets = [neurons, late, [*late, (3, 5, None)], [(0, 5, None), *late], [*late, (3, 6, None)], late]
    reused = [measured(meter, each, 2, start) for each in sets for start in ("zeros", "mean")]
    again = iter(reused)
    for each in sets:
        for start in ("zeros", "mean"):
            meter.block_cache = BlockCache(meter.tower)
            assert_alike(next(again), measured(meter, each, 2, start))


def counting_blocks(tower):
    """The list that counts how often each block of a tower is run from now on."""
    runs = [0] * tower.depth
    for index, block in enumerate(tower.blocks):
        block.module.attn.register_forward_hook(lambda *given, i=index: runs.__setitem__(i, runs[i] + 1))
    return runs


def test_blocks_run_once_for_sets_that_have_the_same_neurons_in_front_of_them():
    meter, neurons = meter_of("timm_clip")
    runs = counting_blocks(meter.tower)
    early, late = ([neuron for neuron in neurons if neuron[0] == block] for block in (1, 2))
    expected = [0] * 4
    for moved, first in [
        (late, 0),
        (late, 3),
        (late[:1], 2),
        (neurons, 0),
        ([*early, late[0]], 2),  # the same as the set before, but for a neuron of block 2
        (early, 2),
        ([*early, (3, 7, None)], 3),
        ([early[0], *late], 1),
        (late[1:], 2),  # still known
        (neurons, 3),
    ]:
        measured(meter, moved)
        expected = [count + 2 * (index >= first) for index, count in enumerate(expected)]  # two batches
        assert runs == expected, (moved, first)


def test_only_so_much_is_kept():
    meter, neurons = meter_of("timm_clip")  # of blocks 1 and 2
    measured(meter, neurons)
    one = next(iter(meter.block_cache.cached[0].values())).output.nbytes
    meter.block_cache = BlockCache(meter.tower, 2 * one)
    runs = counting_blocks(meter.tower)
    for last in (7, 8):
        measured(meter, [*neurons, (3, last, None)])
    assert runs == [2, 2, 4, 4]
    cached = meter.block_cache.cached
    assert [[block for block, _, _ in of_batch] for of_batch in cached.values()] == [[2, 1], [2, 1]]  # not of block 3


def test_nothing_is_kept_where_sets_are_not_compared():
    meter, neurons = meter_of("timm_clip")
    with meter.comparing():
        measured(meter, neurons)
        assert [len(of_batch) for of_batch in meter.block_cache.cached.values()] == [3, 3]
    measured(meter, neurons)
    assert not any(meter.block_cache.cached.values())


def test_a_failure_leaves_nothing_behind():
    meter, neurons = meter_of("timm_clip")
    late = [neuron for neuron in neurons if neuron[0] == 2]
    expected = measured(meter, late)
    handle = meter.tower.blocks[3].module.register_forward_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(meter, late[:1])
    handle.remove()
    assert all("forward" not in vars(block.module) for block in meter.tower.blocks)
    assert_alike(measured(meter, late), expected)


def test_the_kept_tokens_are_not_edited():
    """A block may edit the tokens that it gets, in place."""
    meter, neurons = meter_of("timm_clip")
    late = [neuron for neuron in neurons if neuron[0] == 2]
    plain = measured(meter, late)

    def edit(module, args):
        args[0].mul_(1.5)

    meter.tower.blocks[2].module.register_forward_pre_hook(edit)
    meter.block_cache = BlockCache(meter.tower, CACHE_BYTES)
    first, second = measured(meter, late), measured(meter, late)
    assert_alike(first, second)
    assert abs(first.change_patches - plain.change_patches) > 1e-4


@torch.no_grad()
def test_heads_see_the_same_features():
    meter, neurons = meter_of("timm_clip", head=lambda model, images: model(images))
    late = [neuron for neuron in neurons if neuron[0] == 2]
    first, second = measured(meter, late), measured(meter, late)
    assert first.agreement == second.agreement is not None
