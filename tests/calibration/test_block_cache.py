import pytest
import torch
from planting import plant
from tiny import BUILDERS, SPREAD_MLP, fresh, packed, photograph_crops

from testreg.calibration.block_cache import BlockCache
from testreg.calibration.effects import KEPT, EffectMeter
from testreg.families import find_tower
from testreg.measure.outliers import Detection, OutlierRule

RULE = OutlierRule()


def evaluator_of(name, head=None):
    images = photograph_crops()[:9]
    model = fresh(name)
    planted = plant(model, images, num_neurons=6, two_blocks=True)
    tower = find_tower(model)
    neurons = [(block, unit, None) for block, units in planted.neurons.items() for unit in units]
    evaluator = EffectMeter(model, tower, packed(images), Detection(RULE, 2), 1, batch_size=5, head=head)
    evaluator.prefix = BlockCache(tower, KEPT)
    return evaluator, neurons


def measured(evaluator, neurons):
    """The effect of a set, measured anew even if it is known."""
    evaluator.known.clear()
    return evaluator.effect(neurons)


def assert_alike(one, other):
    assert (one.neurons, one.worst_block) == (other.neurons, other.worst_block)
    for name in ("remaining", "excess", "change_pooled", "change_patches"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5), name


@pytest.mark.parametrize("name", [name for name in BUILDERS if "swiglu" not in name and name not in SPREAD_MLP])
def test_effects_are_what_they_would_be_without_it(name):
    evaluator, neurons = evaluator_of(name)
    late = [neuron for neuron in neurons if neuron[0] == 2]
    sets = [late, late[:1], neurons, late, [(0, 5, None), *late], neurons[:2]]
    reused = [measured(evaluator, each) for each in sets]
    for each, effect in zip(sets, reused, strict=True):
        evaluator.prefix = BlockCache(evaluator.tower)
        assert_alike(effect, measured(evaluator, each))
    assert all("forward" not in vars(block.module) for block in evaluator.tower.blocks)


def counting_blocks(tower):
    """The list that counts how often each block of a tower is run from now on."""
    runs = [0] * tower.depth
    for index, block in enumerate(tower.blocks):
        block.module.attn.register_forward_hook(lambda *given, i=index: runs.__setitem__(i, runs[i] + 1))
    return runs


def test_blocks_run_once_for_sets_that_have_the_same_neurons_in_front_of_them():
    evaluator, neurons = evaluator_of("timm_clip")
    runs = counting_blocks(evaluator.tower)
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
        measured(evaluator, moved)
        expected = [count + 2 * (index >= first) for index, count in enumerate(expected)]  # two batches
        assert runs == expected, (moved, first)


def test_only_so_much_is_kept():
    evaluator, neurons = evaluator_of("timm_clip")  # of blocks 1 and 2
    measured(evaluator, neurons)
    one = next(iter(evaluator.prefix.kept[0].values())).output.nbytes
    evaluator.prefix = BlockCache(evaluator.tower, 2 * one)
    runs = counting_blocks(evaluator.tower)
    for last in (7, 8):
        measured(evaluator, [*neurons, (3, last, None)])
    assert runs == [2, 2, 4, 4]
    kept = evaluator.prefix.kept
    assert [[block for block, _ in of_batch] for of_batch in kept.values()] == [[2, 1], [2, 1]]  # not of block 3


def test_nothing_is_kept_where_sets_are_not_compared():
    evaluator, neurons = evaluator_of("timm_clip")
    with evaluator.comparing():
        measured(evaluator, neurons)
        assert [len(of_batch) for of_batch in evaluator.prefix.kept.values()] == [3, 3]
    measured(evaluator, neurons)
    assert not any(evaluator.prefix.kept.values())


def test_a_failure_leaves_nothing_behind():
    evaluator, neurons = evaluator_of("timm_clip")
    late = [neuron for neuron in neurons if neuron[0] == 2]
    expected = measured(evaluator, late)
    handle = evaluator.tower.blocks[3].module.register_forward_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(evaluator, late[:1])
    handle.remove()
    assert all("forward" not in vars(block.module) for block in evaluator.tower.blocks)
    assert_alike(measured(evaluator, late), expected)


def test_the_kept_tokens_are_not_edited():
    """A block may edit the tokens that it gets, in place."""
    evaluator, neurons = evaluator_of("timm_clip")
    late = [neuron for neuron in neurons if neuron[0] == 2]
    plain = measured(evaluator, late)

    def edit(module, args):
        args[0].mul_(1.5)

    evaluator.tower.blocks[2].module.register_forward_pre_hook(edit)
    evaluator.prefix = BlockCache(evaluator.tower, KEPT)
    first, second = measured(evaluator, late), measured(evaluator, late)
    assert_alike(first, second)
    assert abs(first.change_patches - plain.change_patches) > 1e-4


@torch.no_grad()
def test_heads_see_the_same_features():
    evaluator, neurons = evaluator_of("timm_clip", head=lambda model, images: model(images))
    late = [neuron for neuron in neurons if neuron[0] == 2]
    first, second = measured(evaluator, late), measured(evaluator, late)
    assert first.agreement == second.agreement is not None
