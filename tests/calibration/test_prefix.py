import pytest
import torch
from planting import plant
from tiny import BUILDERS, SPREAD_MLP, fresh, packed, photograph_crops

from testreg.calibration.evaluation import Evaluator
from testreg.calibration.prefix import Prefix
from testreg.families import find_tower
from testreg.measure.outliers import Detection, OutlierRule

RULE = OutlierRule()


def evaluator_of(name, head=None):
    images = photograph_crops()[:9]
    model = fresh(name)
    planted = plant(model, images, num_neurons=6, two_blocks=True)
    tower = find_tower(model)
    neurons = [(block, unit, None) for block, units in planted.neurons.items() for unit in units]
    return Evaluator(model, tower, packed(images), Detection(RULE, 2), 1, batch_size=5, head=head), neurons


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
        evaluator.prefix = Prefix(evaluator.tower)
        assert_alike(effect, measured(evaluator, each))
    assert all("forward" not in vars(block.module) for block in evaluator.tower.blocks)


def test_blocks_in_front_of_all_moved_neurons_run_once():
    evaluator, neurons = evaluator_of("timm_clip")
    runs = [0] * evaluator.tower.depth

    def counting(index):
        attention = evaluator.tower.blocks[index].module.attn
        attention.register_forward_hook(lambda *given: runs.__setitem__(index, runs[index] + 1))

    for index in range(evaluator.tower.depth):
        counting(index)
    late = [neuron for neuron in neurons if neuron[0] == 2]
    for _ in range(3):
        measured(evaluator, late)
    assert runs == [2, 2, 6, 6]  # two batches
    measured(evaluator, neurons)  # of block 1 too, so that less is kept
    assert runs == [4, 4, 8, 8]
    measured(evaluator, late)
    assert runs == [4, 6, 10, 10]


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
    evaluator.prefix = Prefix(evaluator.tower)
    first, second = measured(evaluator, late), measured(evaluator, late)
    assert_alike(first, second)
    assert abs(first.change_patches - plain.change_patches) > 1e-4


@torch.no_grad()
def test_heads_see_the_same_features():
    evaluator, neurons = evaluator_of("timm_clip", head=lambda model, images: model(images))
    late = [neuron for neuron in neurons if neuron[0] == 2]
    first, second = measured(evaluator, late), measured(evaluator, late)
    assert first.agreement == second.agreement is not None
