"""Steering: register neurons fire on the patches of a mask, against literal tensors and a forward by hand."""

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from reference import LAYOUTS, block_outputs, build, forward_by_hand, run
from tiny import IMAGE
from torch import Tensor, nn

import testreg
from testreg import disabled, patch, registers, steered, unpatch
from testreg.families import find_tower
from testreg.patching.moves import shift

RANKING = ((1, 3), (2, 127), (1, 120), (2, 0), (1, 77), (0, 5), (3, 9), (2, 64))
NEURONS = testreg.RegisterNeurons(tuple((layer, unit, None) for layer, unit in RANKING))
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "zero_firing": {"zero": "firing"},
    "zero_all": {"zero": "all"},
    "max_over_layer": {"max_over": "layer"},
}


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(7)).to(dtype)


def targets(batch: int = 2) -> Tensor:
    """Another mask for each image; that of the second is empty."""
    masks = torch.rand(batch, 4, 4, generator=torch.Generator().manual_seed(3)) > 0.6
    masks[1:2] = False
    assert masks[0].any()
    return masks


@torch.no_grad()
def outputs(model: nn.Module, batch: int = 2) -> Tensor:
    return run(model, images(batch, next(model.parameters()).dtype))


# The arithmetic ------------------------------------------------------------------------------------------------------

# Rows: CLS and four patches. Columns: neurons 0 and 1, which are steered, and 2, which is not.
HIDDEN = [[1.0, -9.0, 7.0], [-6.0, 3.0, 8.0], [4.0, -1.0, 9.0], [0.0, 5.0, 6.0], [2.0, 2.0, 2.0]]
TARGET = [[[False, True], [True, False]]]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("options", "target", "expected"),
    [
        ({}, TARGET, [[1, -9, 7], [0, 0, 8], [-6, -9, 9], [-6, -9, 6], [0, 0, 2]]),
        ({}, [[[False] * 2] * 2], [[1, -9, 7], [0, 0, 8], [0, 0, 9], [0, 0, 6], [0, 0, 2]]),
        ({}, [[[True] * 2] * 2], [[1, -9, 7], [-6, -9, 8], [-6, -9, 9], [-6, -9, 6], [-6, -9, 2]]),
        ({"zero": "all"}, TARGET, [[0, 0, 7], [0, 0, 8], [-6, -9, 9], [-6, -9, 6], [0, 0, 2]]),
        ({"max_over": "layer"}, TARGET, [[1, -9, 7], [0, 0, 8], [-9, -9, 9], [-9, -9, 6], [0, 0, 2]]),
        (  # the token with the largest value of neuron 0 is padding
            {"valid": torch.tensor([[True, False, True, True, True]])},
            TARGET,
            [[1, -9, 7], [0, 0, 8], [4, -9, 9], [4, -9, 6], [0, 0, 2]],
        ),
        (  # the token that is no patch is the last
            {"patches": torch.tensor([[True, True, True, True, False]])},
            TARGET,
            [[0, 0, 7], [-6, -9, 8], [-6, -9, 9], [0, 0, 6], [2, 2, 2]],
        ),
    ],
)
def test_steer_gives_the_literal_result(
    options: dict[str, Any], target: list[list[list[bool]]], expected: list[list[float]], grad: bool
) -> None:
    hidden = torch.tensor([HIDDEN])
    settings = {"num_prefix": 1, "max_over": "neuron", "zero": "patches", **options}
    with torch.set_grad_enabled(grad):
        moved = shift(hidden, (0, 1), target=torch.tensor(target), **settings)
    assert moved.tolist() == [expected]
    assert (moved is hidden) is not grad


def test_images_of_a_batch_have_their_own_masks() -> None:
    hidden = torch.tensor([HIDDEN, [[-each for each in row] for row in HIDDEN]])
    masks = torch.tensor([TARGET[0], [[False, False], [False, False]]])
    settings: dict[str, Any] = {"num_prefix": 1, "max_over": "neuron", "zero": "patches"}
    together = shift(hidden.clone(), (0, 1), target=masks, **settings)
    for i in range(2):
        assert together[i : i + 1].equal(shift(hidden[i : i + 1].clone(), (0, 1), target=masks[i : i + 1], **settings))
    assert together[1, 1:, :2].count_nonzero() == 0
    both = shift(hidden.clone(), (0, 1), target=masks[:1], **settings)  # one mask for all
    assert both[1].equal(shift(hidden[1:].clone(), (0, 1), target=masks[:1], **settings)[0])


# The forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LAYOUTS)
@torch.no_grad()
def test_every_block_agrees_with_the_forward_by_hand(family: str) -> None:
    model, inputs, masks = build(family).double(), images(dtype=torch.float64), targets()
    for variant, options in VARIANTS.items():
        expected = forward_by_hand(family, model, inputs, RANKING, target=masks.flatten(1), **options)
        moved = block_outputs(family, patch(model, NEURONS, **options), inputs)
        with steered(model, masks) as same:
            assert same is model
            per_call = block_outputs(family, model, inputs)
        unpatch(model)
        always = block_outputs(family, patch(model, NEURONS, target=masks, **options), inputs)
        unpatch(model)
        assert (expected[-1] - moved[-1]).abs().max() > 0.1
        for block, by_hand in enumerate(expected):
            assert (per_call[block] - by_hand).abs().max() < 1e-10, f"{variant}, block {block}"
            assert always[block].equal(per_call[block])


def test_gradients_agree_with_the_forward_by_hand() -> None:
    family = "timm_dinov2_reg4"
    model, inputs, masks = build(family).double(), images(dtype=torch.float64).requires_grad_(), targets()
    weights = torch.randn(2, 21, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    by_hand = forward_by_hand(family, model, inputs, RANKING, target=masks.flatten(1))[-1]
    (expected,) = torch.autograd.grad((by_hand * weights).sum(), inputs)
    with steered(patch(model, NEURONS), masks):
        ours = block_outputs(family, model, inputs)[-1]
    (actual,) = torch.autograd.grad((ours * weights).sum(), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["timm_siglip", "open_clip", "open_clip_sequence_first"])
def test_images_do_not_mix(family: str) -> None:
    model, masks = patch(build(family), NEURONS), targets(3)
    with steered(model, masks):
        together = outputs(model, 3)
    for i in range(3):
        with steered(model, masks[i : i + 1]), torch.no_grad():
            alone = run(model, images(3)[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["timm_vit", "hf_siglip", "open_clip_sequence_first"])
def test_contexts_nest_and_end_as_they_began(family: str) -> None:
    model = build(family)
    clean = outputs(model)
    moved = outputs(patch(model, NEURONS))
    first, second = targets(), ~targets()
    with steered(model, first):
        one = outputs(model)
        with steered(model, second):
            assert not outputs(model).equal(one)
            with disabled(model):
                assert outputs(model).equal(clean)
        assert outputs(model).equal(one)
        with disabled(model), steered(model, second):
            assert outputs(model).equal(clean)
    assert outputs(model).equal(moved)
    with pytest.raises(ZeroDivisionError), steered(model, first):
        raise ZeroDivisionError
    assert outputs(model).equal(moved)
    assert outputs(unpatch(model)).equal(clean)


def test_a_target_of_the_patch_gives_way_to_that_of_a_call() -> None:
    model = patch(build("timm_vit"), NEURONS)
    with steered(model, ~targets()):
        expected = outputs(model)
    unpatch(model)
    patch(model, NEURONS, target=targets())
    fixed = outputs(model)
    with steered(model, ~targets()):
        assert outputs(model).equal(expected)
    assert outputs(model).equal(fixed)


def test_an_exception_in_a_forward_leaves_nothing_behind() -> None:
    model = patch(build("timm_vit"), NEURONS)
    moved = outputs(model)
    handle = model.blocks[2].register_forward_hook(lambda *args: 1 / 0)
    with steered(model, targets()):
        with pytest.raises(ZeroDivisionError):
            outputs(model)
        handle.remove()
        one = outputs(model)
    assert not one.equal(moved)
    assert outputs(model).equal(moved)


@pytest.mark.parametrize("at", [0, 2])
def test_a_forward_ends_as_it_began(at: int) -> None:
    model = patch(build("timm_vit"), NEURONS)
    moved = outputs(model)
    with steered(model, targets()):
        one = outputs(model)
    context = steered(model, targets())

    def enter() -> None:
        context.__enter__()

    def leave() -> None:
        context.__exit__(None, None, None)

    handle = model.blocks[at].norm1.register_forward_hook(lambda *args: enter())
    assert outputs(model).equal(moved)
    handle.remove()
    handle = model.blocks[at].norm1.register_forward_hook(lambda *args: leave())
    assert outputs(model).equal(one)
    handle.remove()


def test_threads_have_their_own_masks() -> None:
    model = patch(build("timm_vit"), NEURONS)
    masks = [targets(), ~targets(), None]
    expected = []
    for mask in masks:
        if mask is None:
            expected.append(outputs(model))
        else:
            with steered(model, mask):
                expected.append(outputs(model))
    wrong: list[object] = []
    start = threading.Barrier(3)

    def work(number: int) -> None:
        try:
            start.wait()
            for _ in range(15):
                if (mask := masks[number]) is None:
                    found = outputs(model)
                else:
                    with steered(model, mask):
                        found = outputs(model)
                if not found.equal(expected[number]):
                    wrong.append(number)
        except Exception as error:  # a thread would swallow it
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_target_of_the_patch_alone(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = patch(build("timm_vit"), NEURONS, target=targets())
    fixed = outputs(model)
    with steered(model, ~targets()):
        assert outputs(duplicate(model)).equal(fixed)


@pytest.mark.parametrize("family", ["timm_vit", "hf_siglip", "open_clip_sequence_first", "torchvision_vit"])
def test_shapes_are_those_of_the_model_inside_and_outside(family: str) -> None:
    model = build(family)
    tower = find_tower(model)
    shapes: list[tuple[int, ...]] = []
    linear = tower.blocks[1].mlps[0].fc2
    linear.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    plain = outputs(model)
    patch(model, NEURONS)
    with steered(model, targets()), registers(model) as seen:
        assert outputs(model).shape == plain.shape
    assert shapes[0] == shapes[1]
    assert seen == []
    with steered(model, targets()):
        assert testreg.features(model, images()).shape == (2, 48, 4, 4)
        assert testreg.attention(model, images()).shape == (2, 4, 4, 4)
        tokens = torch.zeros(2, 17, 48)
        assert testreg.strip_registers(model, tokens) is tokens


def test_padding_takes_no_part() -> None:
    """SigLIP 2 hides padding by a mask: what is there does not give the value."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    config = Siglip2VisionConfig(
        hidden_size=48, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_patches=16, patch_size=16
    )
    model = patch(Siglip2VisionModel(config).eval(), NEURONS, target=torch.ones(1, 4, 4, dtype=torch.bool))
    pixels = torch.randn(1, 16, 768)
    mask = torch.ones(1, 16, dtype=torch.long)
    mask[:, 12:] = 0
    with torch.no_grad():
        one = model(pixels, mask, torch.tensor([[3, 4]])).last_hidden_state
        pixels[:, 12:] = 100 * torch.randn(1, 4, 768)
        other = model(pixels, mask, torch.tensor([[3, 4]])).last_hidden_state
    torch.testing.assert_close(one[:, :12], other[:, :12])


@pytest.fixture
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["timm_vit", "hf_clip", "open_clip_sequence_first"])
@pytest.mark.usefixtures("_fresh_dynamo")
@torch.no_grad()
def test_compiled_models_can_be_steered(family: str) -> None:
    model = patch(build(family), NEURONS)
    tower = torch.compile(getattr(model, "visual", model), fullgraph=True, backend="eager")
    moved = outputs(model)
    for masks in (targets(), ~targets()):
        torch.testing.assert_close(run(tower, images()), moved, rtol=1e-4, atol=1e-5)
        with steered(model, masks):
            torch.testing.assert_close(run(tower, images()), outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_models_are_steered_by_the_thread_that_says_so() -> None:
    model = patch(build("timm_vit"), NEURONS)
    tower = torch.compile(model, fullgraph=True, backend="eager")

    @torch.no_grad()
    def compiled(*masks: torch.Tensor) -> torch.Tensor:
        with steered(model, *masks) if masks else nullcontext():
            return run(tower, images())

    with torch.no_grad(), steered(model, targets()):
        expected = outputs(model)
    for masks in ((), (targets(),), ()):  # in a thread of its own, which has steered nothing before
        with ThreadPoolExecutor(1) as thread:
            moved, there = thread.submit(compiled).result(), thread.submit(compiled, targets()).result()
        torch.testing.assert_close(there, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(*masks), there if masks else moved, rtol=1e-4, atol=1e-5)
    with steered(model, targets()), ThreadPoolExecutor(1) as thread:
        torch.testing.assert_close(thread.submit(compiled).result(), moved, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_the_target_of_a_patch_is_exported(strict: bool) -> None:
    model = patch(build("timm_vit"), NEURONS, target=targets()[:1])
    program = torch.export.export(model, (images(),), strict=strict).module()
    torch.testing.assert_close(run(program, images()), outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steered_in_the_forward", [True, False])
def test_a_checkpointed_forward_is_recomputed_as_it_began(steered_in_the_forward: bool) -> None:
    plain, model = (patch(build("timm_vit").train(), NEURONS) for _ in range(2))
    model.set_grad_checkpointing(True)

    def loss_of(network: nn.Module) -> Tensor:
        if not steered_in_the_forward:
            return run(network, images()).square().sum()
        with steered(network, targets()):
            return run(network, images()).square().sum()

    loss = loss_of(model)
    if steered_in_the_forward:
        loss.backward()
    else:
        with steered(model, targets()):
            loss.backward()
    loss_of(plain).backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)


# Bad masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ([[True]], TypeError, "a tensor .*, got list"),
        (torch.ones(2, 4, 4), ValueError, r"torch.float32 \(2, 4, 4\)"),
        (torch.ones(4, 4, dtype=torch.bool), ValueError, r"\(B, h, w\)"),
        (torch.ones(0, 4, 4, dtype=torch.bool), ValueError, r"\(0, 4, 4\)"),
    ],
)
def test_no_masks_are_refused_before_anything_is_changed(target: Any, error: type[Exception], message: str) -> None:
    model = build("timm_vit")
    with pytest.raises(error, match=message):
        patch(model, NEURONS, target=target)
    assert not testreg.is_patched(model)
    patch(model, NEURONS)
    with pytest.raises(error, match=message), steered(model, target):
        pass


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4), "the target mask has 3 x 4 = 12 patches, and the images have 16"),
        ((3, 4, 4), "is of 3 images, and the batch has 2"),
    ],
)
def test_masks_of_other_images_are_refused(shape: tuple[int, ...], message: str) -> None:
    model = patch(build("open_clip_sequence_first"), NEURONS)
    moved = outputs(model)
    with pytest.raises(ValueError, match=message), steered(model, torch.ones(shape, dtype=torch.bool)):
        outputs(model)
    assert outputs(model).equal(moved)


def test_a_model_that_is_not_patched_cannot_be_steered() -> None:
    with pytest.raises(RuntimeError, match="not patched"), steered(build("timm_vit"), targets()):
        pass
