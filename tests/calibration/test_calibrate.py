import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from marks import slow_except
from PIL import Image
from planting import plant
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from tiny import BUILDERS, SPREAD_MLP, TIMM, build, fresh
from torch.utils.data import DataLoader, TensorDataset

import testreg
from testreg.calibration.budget import Budget
from testreg.calibration.calibrate import calibrate
from testreg.calibration.choose import Choice
from testreg.calibration.effects import EffectMeter
from testreg.calibration.errors import ImmovableOutliersError, NoOutliersError
from testreg.calibration.resume import CHUNK
from testreg.calibration.selection import Selection
from testreg.calibration.split import held_out_images
from testreg.cli.calibrate import summary as described
from testreg.families import find_tower
from testreg.measure.diagnosis import Outliers
from testreg.measure.outliers import Detection, OutlierRule, token_norms
from testreg.measure.ranking import best_neurons, statistics_of
from testreg.patching.state import patch_of
from testreg.records.calibration import FixedPositions

DATA = Path(__file__).parents[1] / "data"
# Most lists here are found on too few images to be verified.
pytestmark = pytest.mark.filterwarnings("ignore::testreg.UnverifiedNeuronsWarning")
PLANTABLE = [name for name in BUILDERS if "swiglu" not in name and name not in SPREAD_MLP]
QUICK = ("timm_clip", "timm_dinov2_reg4", "hf_siglip", "hf_dinov2", "open_clip_sequence_first", "torchvision_vit")


@pytest.fixture
def planted(photos):
    model = fresh("timm_clip")
    return model, plant(model, photos, num_neurons=4, decoys=True)


def as_set(by_block):
    return {(block, unit) for block, units in by_block.items() for unit in units}


def first(neurons, count):
    return {(block, unit) for block, unit, _ in neurons.ranking[:count]}


@pytest.mark.parametrize("seed", slow_except([0, 1], 0))
@pytest.mark.parametrize("name", slow_except(PLANTABLE, *QUICK))
def test_planted_neurons_are_found_and_patching_removes_their_outliers(name, seed, photos):
    model = fresh(name, seed)
    planted = plant(model, photos, num_neurons=4, decoys=True, seed=seed)
    tower = find_tower(model)
    before = token_norms(tower, photos)[..., tower.num_prefix :]
    limit = OutlierRule().limit(before)

    found = calibrate(model, photos, progress=False)
    assert first(found, found.top_k) == as_set(planted.neurons)
    assert found.calibration.onset_block == 2

    testreg.patch(model, found)
    after = token_norms(tower, photos)[..., tower.num_prefix :]
    made = (before > limit)[2:] & (before[2] > 2 * before[1])  # by the planted block, not texture that was there
    assert made.flatten(1).any(1).all()
    assert (after > limit)[2:][made].float().mean() < 0.05


@pytest.mark.parametrize("name", ["timm_clip", "hf_dinov2", "hf_siglip"])
def test_decoys_take_in_the_ranking_by_activation_but_not_the_default(name, photos):
    model = fresh(name)
    planted = plant(model, photos, num_neurons=4, decoys=True)
    ranked = {"held_out": 0, "top_k": 4, "progress": False}
    by_activation = calibrate(model, photos, score="activation", **ranked)
    by_contribution = calibrate(model, photos, **ranked)
    assert {planted.named_decoys["loud"], planted.named_decoys["idle"]} <= first(by_activation, 4)
    assert first(by_contribution, 4) == as_set(planted.neurons)


@pytest.mark.parametrize(("key", "sparse"), [("scores", False), ("scores_sparsity_filter", True)])
def test_released_ranking(key, sparse):
    with safe_open(DATA / "dinov2_tiny.safetensors", "pt") as file:
        weights = {k.removeprefix("weights."): file.get_tensor(k) for k in file.keys() if k.startswith("weights.")}  # noqa: SIM118
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=56, embed_dim=48, depth=4, num_heads=4, init_values=1.0
    )
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    with safe_open(DATA / "dinov2_tiny_calibration.safetensors", "pt") as file:
        images = file.get_tensor("images_uint8").permute(0, 3, 1, 2).float() / 255
        expected = file.get_tensor(key)  # (4, 192)
        threshold = float(file.metadata()["threshold"])
    found = calibrate(
        model,
        images,
        block=-2,
        threshold=threshold,
        max_block=-1,
        score="activation",
        sparsity_filter=sparse,
        top_k=192,
        held_out=0,
        batch_size=7,
        progress=False,
    )
    scores = torch.zeros(4, 192)
    for block, unit, score in found.ranking:
        scores[block, unit] = score
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["timm_vit", "hf_siglip", "open_clip_sequence_first", "hf_dinov2_swiglu"])
def test_activation_score_equals_a_ranking_from_whole_activations(name):
    """The pass recomputes activations at a few tokens; here they are all kept, and averaged with loops."""
    model = build(name)
    tower = find_tower(model)
    images = torch.randn(6, 3, 64, 64)
    hidden, handles = [], []
    for block in tower.blocks:
        handles.append(block.mlps[0].fc2.register_forward_pre_hook(lambda module, args: hidden.append(args[0])))
    norms = token_norms(tower, images)
    for handle in handles:
        handle.remove()
    threshold = norms[1].flatten().quantile(0.9).item()
    expected = torch.zeros(4, tower.mlp_width)
    with_outliers = [i for i in range(6) if (norms[1, i] > threshold).any()]
    for block in range(4):
        tokens = hidden[block].transpose(0, 1) if tower.sequence_first else hidden[block]
        for i in with_outliers:
            expected[block] += tokens[i][norms[1, i] > threshold].abs().mean(0) / len(with_outliers)
    found = calibrate(
        model,
        images,
        block=1,
        threshold=threshold,
        max_block=3,
        score="activation",
        top_k=99,
        held_out=0,
        progress=False,
    )
    assert len(found.ranking) > 500
    for block, unit, score in found.ranking:
        assert score == pytest.approx(expected[block, unit].item(), rel=1e-4)


@pytest.mark.parametrize("batch_size", slow_except([1, 7, 64], 7))
def test_scores_do_not_depend_on_the_batch_size(batch_size, planted, photos):
    model, _ = planted
    scores = [
        {
            (block, unit): score
            for block, unit, score in calibrate(model, photos, batch_size=size, progress=False).ranking
        }
        for size in (16, batch_size)
    ]
    common = scores[0].keys() & scores[1].keys()
    assert len(common) > 100
    assert all(scores[0][neuron] == pytest.approx(scores[1][neuron], rel=1e-3, abs=1e-4) for neuron in common)


def test_every_kind_of_images_gives_the_same_ranking(planted, photos, tmp_path):
    model, _ = planted
    pictures = as_pil(photos)
    for i, image in enumerate(pictures):
        (tmp_path / f"class{i % 3}").mkdir(exist_ok=True)
        image.save(tmp_path / f"class{i % 3}" / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not an image either")

    transform = ToTensor(64)
    tensors = torch.stack([transform(image) for image in pictures])
    dataset = TensorDataset(tensors, torch.zeros(len(tensors)))
    kinds = {
        "tensor": tensors,
        "generator": (image for image in tensors),
        "batches": tensors.split(4),
        "dataset of pairs": dataset,
        "dataloader": DataLoader(dataset, batch_size=8),
        "PIL": pictures,
        "folder": tmp_path,
        "folder name": str(tmp_path),
    }
    rankings = {}
    for kind, images in kinds.items():
        found = calibrate(model, images, transform=transform, top_k=4, progress=False)
        assert found.calibration.images + found.calibration.held_out == 45, kind
        assert found.calibration.unreadable_images == ("folder" in kind), kind
        rankings[kind] = [(block, unit) for block, unit, _ in found.ranking[:4]]
    assert len({tuple(ranking) for ranking in rankings.values()}) == 1


def test_num_images_is_a_seeded_sample_of_a_folder(planted, photos, tmp_path):
    from testreg.io.images import ImageStream

    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")

    def red(image):
        return torch.full((3, 1, 1), float(image.getpixel((0, 0))[0]))

    def read(seed):
        return [int(image[0, 0, 0]) for _, image in ImageStream(tmp_path, red, num_images=8, seed=seed).numbered()]

    assert len(set(read(0))) == 8
    assert read(0) == read(0) != read(1)
    assert sorted(read(0)) != list(range(8))


def test_blocks_may_be_given(planted, photos):
    model, planted_neurons = planted
    found = calibrate(model, photos, block=-1, max_block=1, progress=False)
    assert found.calibration.detection_block == 3
    assert found.calibration.onset_block == 2
    assert {block for block, _, _ in found.ranking} <= {0, 1}
    assert not first(found, len(found.ranking)) & as_set(planted_neurons.neurons)


def test_runs_under_autocast(planted, photos):
    model, planted_neurons = planted
    found = calibrate(model, photos, top_k=4, amp=torch.bfloat16, progress=False)
    assert first(found, 4) == as_set(planted_neurons.neurons)
    assert found.calibration.dtype == "bfloat16"


def test_the_model_is_left_as_it_was(planted, photos):
    model, _ = planted
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def hooks():
        return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]

    before = hooks()
    calibrate(model, photos, progress=False)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, interrupted(photos), progress=False)
    assert hooks() == before
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def interrupted(photos):
    yield from photos[:20]
    raise KeyboardInterrupt


def test_the_json_says_how_it_was_made(planted, photos, tmp_path):
    model, _ = planted
    calibrate(model, photos, top_k=4, progress=False).save(tmp_path / "neurons.json")
    data = json.loads((tmp_path / "neurons.json").read_text())
    assert data["verified"] is True
    assert data["top_k"] == 4
    assert data["model"]["depth"] == 4
    assert data["model"]["mlp_width"] == 192
    assert {"images", "image_size", "rule", "score", "detection_block", "onset_block", "max_block", "versions"} <= (
        data["calibration"].keys()
    )
    testreg.patch(model, tmp_path / "neurons.json")  # same weights: no warning, which would be an error here


@pytest.mark.parametrize("name", ["timm_vit", "hf_clip", "open_clip"])
def test_a_clean_model_has_nothing_to_fix(name, photos):
    with pytest.raises(NoOutliersError, match=r"no outliers: nothing to fix \(at most 0.* 23 images"):
        calibrate(build(name), photos, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": 4}, "block=4 is out of range: the model has 4 blocks"),
        ({"max_block": -5}, "max_block=-5 is out of range"),
        ({"score": "loudness"}, "score must be"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"threshold": -1.0}, "threshold of the outlier rule must be a positive number"),
        ({"threshold": 75.0, "rule": OutlierRule()}, "a threshold or a rule, not both"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"images": []}, "no image could be read from list"),
        ({"images": [torch.zeros(3, size, size) for size in (64, 64, 32)]}, "different shapes"),
        ({"images": [torch.zeros(3, 64, 64)]}, "a single image, and none to hold out"),
        ({"held_out": 0}, "held_out=0 no set of neurons can be measured: give top_k"),
        ({"target": 0}, "target must be positive"),
        ({"budget": -1.0}, "budget must be positive"),
        ({"transform": [None, None]}, "1 models and 2 transforms"),
        ({"images": torch.zeros(3, 64)}, "expected image tensors"),
    ],
)
def test_bad_arguments(arguments, message, photos):
    arguments = {"images": photos, **arguments}
    with pytest.raises(ValueError, match=message):
        calibrate(fresh("timm_clip"), arguments.pop("images"), progress=False, **arguments)


def test_bad_folders(tmp_path):
    model = fresh("timm_clip")
    with pytest.raises(FileNotFoundError, match=r"no folder of images at .*missing"):
        calibrate(model, tmp_path / "missing")
    with pytest.raises(ValueError, match="no images"):
        calibrate(model, tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"no image could be read from .*: all 2 were unreadable"):
        calibrate(model, tmp_path, progress=False)


def test_a_patched_model_is_refused(photos):
    model = testreg.patch(fresh("timm_clip"), {1: [0]})
    with pytest.raises(RuntimeError, match="patched: calibrate it before"):
        calibrate(model, photos)


def test_planting_refuses_what_it_cannot_do(photos):
    with pytest.raises(ValueError, match="needs a plain MLP"):
        plant(fresh("hf_dinov2_swiglu"), photos)
    with pytest.raises(ValueError, match="block must leave one before"):
        plant(fresh("timm_vit"), photos, block=3)


def as_pil(images):
    return [Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for image in images]


class ToTensor:
    """PIL image -> (3, size, size), in [-1, 1]."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        pixels = torch.frombuffer(bytearray(image.resize((self.size, self.size)).tobytes()), dtype=torch.uint8)
        return pixels.view(self.size, self.size, 3).permute(2, 0, 1) / 127.5 - 1


def facts_of(neurons):
    return replace(neurons.calibration, made_at=None)


def test_several_image_sizes_are_ranked_together_and_verified_each(planted, photos):
    model, planted_neurons = planted
    larger = copy.deepcopy(model)
    larger.set_input_size((96, 96))
    sizes = (64, 96)
    found = calibrate([model, larger], as_pil(photos), transform=[ToTensor(size) for size in sizes], progress=False)
    assert first(found, found.top_k) == as_set(planted_neurons.neurons)
    at_64, at_96 = found.calibration.verified_at
    assert (at_64.image_size, at_64.grid, at_64.images) == ((64, 64), (4, 4), 22)
    assert (at_96.image_size, at_96.grid, at_96.images) == ((96, 96), (6, 6), 22)
    changes = [each.effect.change_pooled for each in (at_64, at_96)]
    assert changes[0] != changes[1]
    assert found.calibration.chosen.change_pooled == max(changes)


def test_a_size_without_outliers_has_no_say_but_is_verified(planted, photos):
    model, planted_neurons = planted
    other = copy.deepcopy(model)

    def dark(image):
        return ToTensor(64)(image) * 0.1 - 0.8

    found = calibrate([other, model], as_pil(photos), transform=[dark, ToTensor(64)], progress=False)
    assert first(found, found.top_k) == as_set(planted_neurons.neurons)
    in_the_dark, in_the_light = found.calibration.verified_at
    assert in_the_dark.outlier_fraction < 1e-3 < in_the_light.outlier_fraction
    assert found.calibration.verdict.endswith("movable")


def test_models_of_several_sizes_must_be_one_checkpoint(photos):
    with pytest.raises(ValueError, match="one checkpoint at several image sizes, but their weights differ"):
        calibrate([fresh("timm_clip", seed) for seed in (0, 1)], photos, progress=False)


def test_held_out_images_have_no_part_in_the_ranking(planted, photos):
    model, _ = planted
    odd_changed = photos.clone()
    odd_changed[1::2] = odd_changed[1::2].flip(-1)
    first_run, second_run = (calibrate(model, images, progress=False) for images in (photos, odd_changed))
    assert first_run.ranking == second_run.ranking
    assert first_run.calibration.chosen != second_run.calibration.chosen
    read_again = held_out_images(photos, None, held_out=48, num_images=None, seed=0)
    assert torch.equal(torch.stack(read_again), photos[1::2])


def test_ranking_ends_when_it_is_stable(planted, photos):
    model, _ = planted
    many = photos.repeat(8, 1, 1, 1)  # 360
    early = calibrate(model, many, progress=False)
    assert early.calibration.stability.overlap == 1.0
    assert (early.calibration.images, early.calibration.held_out) == (96, 48)
    whole = calibrate(model, many, stability=None, progress=False)
    assert whole.calibration.images == 360 - 48


def test_a_budget_cuts_short_what_it_does_not_pay_for(planted, photos, monkeypatch):
    model, _ = planted
    many = photos.flip(0).repeat(8, 1, 1, 1)
    with pytest.warns(UserWarning, match="does not pay for 8 images"):
        at_once = calibrate(model, many, budget=1e-9, progress=False)
    assert (at_once.calibration.images, at_once.calibration.held_out) == (4, 4)
    assert len(at_once.calibration.curve) == 1
    assert at_once.calibration.out_of_time == ("images", "choosing")
    assert not at_once.verified
    assert "the --budget was too small for: all images but 8; further sets of neurons" in described(at_once)
    monkeypatch.setattr(Budget, "affordable_images", lambda *_: None)
    assert calibrate(model, many, budget=1e-9, progress=False).calibration.out_of_time == ("ranking", "choosing")
    monkeypatch.setattr(Budget, "affordable_images", lambda *_: 40)
    some = calibrate(model, many, budget=1e9, stability=None, progress=False)
    assert (some.calibration.images, some.calibration.held_out) == (20, 20)
    monkeypatch.undo()
    enough = calibrate(model, many, budget=1e9, progress=False)
    assert not enough.calibration.out_of_time
    assert enough.ranking == calibrate(model, many, progress=False).ranking


class Interrupted(torch.utils.data.Dataset):
    def __init__(self, images, at):
        self.images, self.at = images, at

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return self.images[index]


@pytest.mark.parametrize("score", slow_except(["contribution", "activation"], "contribution"))
def test_an_interrupted_run_goes_on_to_the_same_result(score, planted, photos, tmp_path):
    model, _ = planted
    many, state = photos.repeat(6, 1, 1, 1), tmp_path / "state.safetensors"
    options = {"score": score, "stability": None, "batch_size": 32, "progress": False}
    whole = calibrate(model, Interrupted(many, None), **options)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Interrupted(many, 230), resume=state, **options)
    with safe_open(state, "pt") as file:
        assert json.loads(file.metadata()["testreg"])["done"] == 144 + CHUNK
    resumed = calibrate(model, Interrupted(many, 150), resume=state, **options)  # 150 was read
    assert resumed.by_block() == whole.by_block()
    scores = [{neuron[:2]: neuron[2] for neuron in each.ranking} for each in (resumed, whole)]
    assert scores[0] == pytest.approx(scores[1])
    assert resumed.calibration.to_json().keys() == whole.calibration.to_json().keys()
    for key in ("images", "onset_block", "detection_block", "max_block", "verdict", "stability"):
        assert getattr(resumed.calibration, key) == getattr(whole.calibration, key), key
    assert resumed.calibration.chosen.to_json() == pytest.approx(whole.calibration.chosen.to_json())
    again = calibrate(model, Interrupted(many, 150), resume=state, **options)  # nothing is left to read
    assert again.ranking == resumed.ranking


def test_sets_that_were_measured_are_not_measured_again(planted, photos, tmp_path, monkeypatch):
    model, _ = planted
    state, measured, effect = tmp_path / "state.safetensors", [], EffectMeter.effect

    def counted(self, neurons, *registers):
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        measured.append((frozenset(neurons), *registers))
        return effect(self, neurons, *registers)

    monkeypatch.setattr(EffectMeter, "effect", counted)
    stop_at = None
    whole, sets = calibrate(model, photos, progress=False), list(measured)
    measured.clear()
    stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, photos, resume=state, progress=False)
    measured.clear()
    stop_at = None
    resumed = calibrate(model, photos, resume=state, progress=False)
    assert measured == sets[3:]
    assert resumed.by_block() == whole.by_block()
    assert resumed.calibration.chosen == whole.calibration.chosen


def test_a_list_under_which_maps_get_hotter_is_not_verified(planted, photos, monkeypatch):
    model, _ = planted
    many = photos.repeat(2, 1, 1, 1)
    assert calibrate(model, many, progress=False).verified
    effect = EffectMeter.effect
    hotter = lambda self, *given: replace(effect(self, *given), hottest=2 * self.effect_of_nothing.hottest)
    monkeypatch.setattr(EffectMeter, "effect", hotter)
    found = calibrate(model, many, progress=False)
    assert found.calibration.target_met
    assert not found.verified
    assert "maps got hotter: the hottest patch draws" in described(found)
    assert "not verified: that takes a target that is met, and clean maps" in described(found)


def test_the_list_says_how_many_registers_hold_it(planted, photos, monkeypatch):
    model, _ = planted
    effect = EffectMeter.effect

    def best_with_two(self, neurons, num_registers=1, start="zeros"):
        change = 0.1 * abs(num_registers - 2)
        return replace(effect(self, neurons, num_registers, start), change_pooled=change, change_patches=0.0)

    monkeypatch.setattr(EffectMeter, "effect", best_with_two)
    found = calibrate(model, photos, progress=False)
    assert found.num_registers == 2
    assert [(each.num_registers, each.start) for each in found.calibration.registers] == [
        *((1, "zeros"), (2, "zeros"), (3, "zeros"), (2, "mean"))
    ]
    assert found.calibration.verified_at[0].effect.num_registers == 2
    assert (
        "2 registers, each with all of the neurons: features (pooled and of patches) change by 0.100 and "
        in described(found)
    )
    with testreg.patched(model, replace(found, verified=True)):
        assert patch_of(model).num_registers == 2


def test_the_state_of_another_run_is_refused(planted, photos, tmp_path):
    model, _ = planted
    state = tmp_path / "state.safetensors"
    calibrate(model, photos, resume=state, progress=False)
    before = state.read_bytes()
    with pytest.raises(ValueError, match=r"state.safetensors is of another run: seed was 0, and is 1\. Name another"):
        calibrate(model, photos, resume=state, seed=1, progress=False)
    other = fresh("timm_clip", 1)
    plant(other, photos, num_neurons=4)
    with pytest.raises(ValueError, match="is of another run: weights was"):
        calibrate(other, photos, resume=state, progress=False)
    with pytest.raises(ValueError, match="is of another run: score was 'attribution', and is 'activation'"):
        calibrate(model, photos, resume=state, score="activation", progress=False)
    assert state.read_bytes() == before
    state.write_bytes(before[:100])
    with pytest.raises(ValueError, match=r"is not a saved state: .*Delete it"):
        calibrate(model, photos, resume=state, progress=False)
    with pytest.raises(ValueError, match="can be read again: not an iterator"):
        calibrate(model, iter(photos), resume=state, progress=False)


def set_run(saved, tensors):
    del saved["run"]


def set_done(done):
    def damage(saved, tensors):
        saved["done"] = done

    return damage


def set_tensor(name, change):
    def damage(saved, tensors):
        tensors[name] = change(tensors[name])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_run, "is damaged: it does not say of which run it is"),
        (lambda saved, tensors: saved.update(version=1), "was saved by another version of testreg. Delete it to start"),
        (lambda saved, tensors: saved.pop("version"), "was saved by another version of testreg. Delete it to start"),
        (lambda saved, tensors: saved.update(run=[]), "is damaged: it does not say of which run it is"),
        (lambda saved, tensors: saved["run"].pop("seed"), "is of another run: seed was None, and is 0"),
        (lambda saved, tensors: saved["run"].update(more="x" * 10**6), r"'more' was 'x{76}\.\.\., and is None"),
        (lambda saved, tensors: saved.pop("done"), "is damaged: it cannot have ended at image None"),
        (set_done(-1), "is damaged: it cannot have ended at image -1"),
        (set_done(127), "is damaged: it cannot have ended at image 127"),
        (set_done(128.0), r"is damaged: it cannot have ended at image 128\.0"),
        (set_done(128 + 64 * 10**30), "is damaged: it cannot have ended at image 64"),
        (lambda saved, tensors: tensors.pop("0.share"), "is damaged: share is missing, or does not fit"),
        (set_tensor("0.energy", lambda value: value[..., :-1]), "is damaged: energy is missing, or does not fit"),
        (set_tensor("0.energy", torch.Tensor.double), "is damaged: energy is missing, or does not fit the model"),
        (set_tensor("0.share", lambda value: value * float("nan")), "is damaged: share is not finite"),
        (set_tensor("0.num_images", lambda value: value + 1000), "is damaged: it cannot be of 2023 images"),
        (set_tensor("0.num_images", torch.zeros_like), "is damaged: it cannot be of 0 images"),
        (lambda saved, tensors: saved.pop("effects"), "is damaged: its effects are not valid"),
        (lambda saved, tensors: saved.update(effects={"1: 2.3": {"left": 0}}), "is damaged: its effects are not valid"),
    ],
)
def test_damaged_states_are_refused(damage, message, finished_state, photos, tmp_path):
    model, state = finished_state
    with safe_open(state, "pt") as file:
        saved = json.loads(file.metadata()["testreg"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage(saved, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    damaged = tmp_path / "state.safetensors"
    save_file(tensors, damaged, metadata={"testreg": json.dumps(saved)})
    before = damaged.read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        calibrate(model, photos, resume=damaged, progress=False)
    assert len(str(error.value)) < 400
    assert damaged.read_bytes() == before


@pytest.fixture(scope="module")
def finished_state(photos, tmp_path_factory):
    """A planted model, and the state of a run on it."""
    model = fresh("timm_clip")
    plant(model, photos, num_neurons=4)
    state = tmp_path_factory.mktemp("state") / "state.safetensors"
    calibrate(model, photos, top_k=4, resume=state, progress=False)
    return model, state


def with_fixed_artefact(model, row, column, norm):
    """A position embedding (or a whole one) far longer than a token."""
    with torch.no_grad():
        model.pos_embed[0, model.num_prefix_tokens + row * 4 + column] *= norm / model.pos_embed[0, 1].norm()


def test_fixed_positions_do_not_hide_the_neurons(photos):
    model = fresh("timm_vit")
    planted = plant(model, photos, num_neurons=4)
    with_fixed_artefact(model, 2, 3, norm=300)
    found = calibrate(model, photos, progress=False)
    assert first(found, found.top_k) == as_set(planted.neurons)
    assert found.calibration.verified_at[0].effect.remaining < 0.05
    assert found.calibration.onset_block == 2
    assert found.calibration.ignored == (FixedPositions((4, 4), ((2, 3),)),)
    assert re.fullmatch(
        r"outliers from block 2 \(MLP\), .* movable; besides, artefacts at \(2, 3\), where a register fixes nothing",
        found.calibration.verdict,
    )


def test_fixed_positions_alone_are_not_calibrated(photos):
    model = fresh("timm_vit")
    with_fixed_artefact(model, 2, 3, norm=300)
    with pytest.raises(ImmovableOutliersError, match=r"fixed-position artefacts from .* at \(2, 3\)"):
        calibrate(model, photos, progress=False)
    insisted = calibrate(model, photos, block=1, top_k=3, progress=False)
    assert insisted.calibration.target_met is False
    assert not insisted.verified
    assert "a register does not fix them" in insisted.calibration.verdict


def test_neurons_that_move_what_the_diagnosis_did_not_expect_say_so(planted, photos, monkeypatch):
    model, _ = planted
    monkeypatch.setattr(Outliers, "kind", "immovable")
    with pytest.raises(ImmovableOutliersError):
        calibrate(model, photos, progress=False)
    found = calibrate(model, photos, block=2, max_block=2, progress=False)
    assert found.calibration.target_met
    assert found.calibration.verdict.endswith("which these neurons move against the diagnosis")


@pytest.mark.parametrize(
    ("num_images", "top_k", "verified", "on_others"),
    [
        (64, None, True, True),  # 16 held-out images choose, and 16 verify
        (63, None, False, False),  # 31 do both
        (32, 4, True, True),  # nothing is chosen: all 16 verify
        (31, 4, False, True),
    ],
)
def test_a_list_is_verified_by_16_images_that_had_no_part_in_the_choice(
    num_images, top_k, verified, on_others, planted, photos
):
    model, _ = planted
    found = calibrate(model, photos.repeat(2, 1, 1, 1), num_images=num_images, top_k=top_k, progress=False)
    assert found.calibration.target_met
    assert found.verified is verified
    assert found.calibration.verified_on_others is on_others


def test_images_without_an_outlier_verify_nothing(planted, photos):
    model, _ = planted
    images = photos.repeat(2, 1, 1, 1)
    images[3::2] = 0.0  # every patch of such an image is alike: of the held-out images, one has outliers, and chooses
    found = calibrate(model, images, progress=False)
    assert found.calibration.verified_on_others
    assert found.calibration.verified_at[0].outlier_fraction == 0
    assert not found.verified


def test_a_list_that_misses_the_target_is_not_verified(planted, photos):
    model, _ = planted
    found = calibrate(model, photos, top_k=1, progress=False)
    assert found.calibration.target_met is False
    assert not found.verified


@pytest.mark.parametrize("number", [0, 1, 88, 89])
def test_an_image_that_is_not_finite_is_an_error(number, planted, photos):
    """Whether it is diagnosed, chosen on or verified on, or ranked later."""
    model, _ = planted
    images = photos.repeat(4, 1, 1, 1)
    images[number, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, images, stability=None, progress=False)


def test_neurons_of_quantized_weights_are_scored(planted, photos):
    quantization = pytest.importorskip("torchao.quantization")
    model, planted_neurons = planted
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    tower = find_tower(model)
    sums = statistics_of(tower, photos, range(len(photos)), Detection(OutlierRule(), 2), score="contribution").total()
    ranking = best_neurons(sums.scores(tower), 2, 4)
    assert as_set(planted_neurons.neurons) >= {neuron[:2] for neuron in ranking if neuron[0] == 2}
    assert ranking[0][:2] in as_set(planted_neurons.neurons)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded_under_autocast(dtype, planted, photos):
    """Only the forward is in half precision."""
    model, _ = planted
    tower, detection = find_tower(model), Detection(OutlierRule(), 2)
    images = photos.repeat(11, 1, 1, 1)
    with torch.autocast("cpu", dtype):
        norms = token_norms(tower, images)
        found, by_activation = (
            statistics_of(tower, images, range(len(images)), detection, score=score).total()
            for score in ("contribution", "activation")
        )
        shares = found.scores(tower)
    outlier = detection.outliers(norms, tower.num_prefix, (4, 4))[2]
    assert found.num_outliers == outlier.sum()
    assert found.num_with_outliers == outlier.any(1).sum()
    assert found.num_normal == 8 * len(images)
    assert torch.equal(shares, found.scores(tower))
    sums = found.tensors() | by_activation.tensors()
    for name in ("magnitude", "activation", "normal_activation", "direction"):
        value = sums[name]
        assert (value.to(dtype).float() != value).float().mean() > 0.9, name


@pytest.mark.parametrize("score", ["contribution", "activation"])
def test_every_score_leads_to_the_planted_neurons(score, planted, photos):
    """Decoys that rank high are dropped, because moving them does nothing to outliers."""
    model, planted_neurons = planted
    found = calibrate(model, photos, score=score, progress=False)
    assert first(found, found.top_k) == as_set(planted_neurons.neurons)
    dropped = {(block, unit) for block, unit, _ in found.calibration.dropped}
    decoys = planted_neurons.named_decoys
    assert dropped >= ({decoys["loud"], decoys["idle"], decoys["trap"]} if score == "activation" else set())
    assert not dropped & {(block, unit) for block, unit, _ in found.ranking}


def test_contributions_are_shares_of_the_outliers(photos):
    """Of all that the planted block adds, the four planted neurons write nearly everything."""
    model = fresh("timm_clip")
    planted = plant(model, photos, num_neurons=4)
    found = calibrate(model, photos, score="contribution", held_out=0, top_k=4, progress=False)
    shares = [score for block, unit, score in found.ranking if (block, unit) in as_set(planted.neurons)]
    assert sum(shares) == pytest.approx(1, abs=0.02)


def test_other_sizes_and_dtypes_than_verified_warn_once(planted, photos):
    model, _ = planted
    neurons = calibrate(model, photos, progress=False)
    larger = timm.create_model("vit_base_patch16_clip_224", num_classes=10, dynamic_img_size=True, **TIMM)
    larger.load_state_dict(model.state_dict())
    testreg.patch(larger.eval(), neurons)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        larger(photos[:1])
        larger(torch.zeros(1, 3, 80, 80))  # 25 patches
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="verified on images of 16 patches in float32.* 36 in float32"),
    ):
        larger(torch.zeros(1, 3, 96, 96))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        larger(torch.zeros(1, 3, 96, 96))
    testreg.unpatch(larger)
    testreg.patch(larger.to(torch.bfloat16), neurons)
    with torch.no_grad(), pytest.warns(UserWarning, match="used on 16 in bfloat16: they may do less there"):
        larger(photos[:1].bfloat16())
    testreg.patch(testreg.unpatch(larger).float(), neurons)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="16 in bfloat16"):
        larger(photos[:1])


@pytest.mark.parametrize("mechanism", slow_except(["triggers", "spread", "two_populations", "fading"], "spread"))
def test_mechanisms_that_are_spread_over_blocks_are_found(mechanism, photos, tmp_path):
    """By default, told nothing: under 5 % of the outliers are left after every block, and no decoy is moved."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **TIMM | {"depth": 8}).eval()
    planted = plant(model, photos, mechanism=mechanism, decoys=True, outlier_fraction=0.03)
    tower = find_tower(model)
    before = token_norms(tower, photos)[..., tower.num_prefix :]
    found = calibrate(model, photos, progress=False)
    with testreg.patched(model, found):
        after = token_norms(tower, photos)[..., tower.num_prefix :]
    rule = OutlierRule()
    left = after > rule.limit(before).maximum(rule.limit(after))
    assert left.sum((1, 2)).max() < 0.05 * (before > rule.limit(before)).sum((1, 2)).max()
    assert not first(found, found.top_k) & as_set(planted.decoys)
    added = {tuple(neuron[:2]) for each in found.calibration.rounds for neuron in each.added}
    assert first(found, found.top_k) & added
    found.save(tmp_path / "neurons.json")
    assert testreg.RegisterNeurons.load(tmp_path / "neurons.json") == found


def test_a_neuron_of_a_later_round_is_listed_once():
    """It has another score in the ranking of the first round, where it may be far behind."""
    first_ranking = ((2, 0, 0.9), (2, 1, 0.5), (3, 7, 0.01), (1, 4, 0.005))
    selection = Selection(((2, 0, 0.9), (3, 7, 0.6)), None, (), dropped=((1, 4, 0.3),), effects_by_num_registers=())
    choice = Choice(selection.neurons, first_ranking, 3, selection)
    assert choice.neurons + choice.not_chosen == ((2, 0, 0.9), (3, 7, 0.6), (2, 1, 0.5))
