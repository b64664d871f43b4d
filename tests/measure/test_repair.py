"""Position embeddings that stand out: where they are, that they are named, and that they are replaced."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from marks import slow_except
from planting import plant
from tiny import BUILDERS, HF, HF_DINOV2, NEURONS, TIMM, TIMM_RECORDS, build, fresh
from torch import Tensor, nn

import testreg
from testreg.families import find_tower, position_embedding
from testreg.measure.repair import is_repaired
from testreg.report.diagnosis import write_diagnosis_report

WITHOUT = {"hf_dinov3"}  # rotary
PLANTED = (1, 2), (3, 0)  # rows and columns, of a grid of 4 x 4
FAMILIES = ["timm_vit", "hf_siglip", "hf_dinov2", "open_clip"]


def tokens_before_blocks(model: nn.Module, images: Tensor) -> Tensor:
    """What the first block gets, (B, T, C)."""
    tower, got = find_tower(model), []
    handle = tower.blocks[0].module.register_forward_pre_hook(
        lambda module, args, kwargs: got.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        tower.run(images)
    handle.remove()
    return tower.arranged(got[0], images)


def put(model: nn.Module, places: Any = PLANTED, norm: float = 300.0) -> None:
    """Make the position embeddings of some places huge, in one channel."""
    embedding = position_embedding(find_tower(model))
    assert embedding is not None
    numbers = torch.tensor([row * embedding.grid[1] + column for row, column in places])
    values = embedding.patches[numbers].clone()
    values[:, 7] += norm
    embedding.replace(numbers, values)


def smooth(model: nn.Module) -> nn.Module:
    """Give a model position embeddings as smooth as trained ones."""
    embedding = position_embedding(find_tower(model))
    assert embedding is not None
    down, across = torch.meshgrid(*map(torch.arange, embedding.grid), indexing="ij")
    waves = torch.linspace(0.1, 0.4, 24)
    angles = torch.cat([down.flatten()[:, None] * waves, across.flatten()[:, None] * waves], 1)
    embedding.replace(torch.arange(len(angles)), angles.cos())
    return model


def planted(name: str) -> nn.Module:
    model = smooth(fresh(name))
    put(model)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def look(model: nn.Module, images: Tensor) -> testreg.Diagnosis:
    return testreg.diagnose(model, images, progress=False)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in WITHOUT])
def test_an_embedding_is_that_of_its_patch_and_of_no_other(name: str, photos: Tensor) -> None:
    model = build(name)
    embedding, images = position_embedding(find_tower(model)), photos[:2]
    assert embedding is not None
    assert embedding.grid == (4, 4)
    before = tokens_before_blocks(model, images)
    put(model, [(1, 2)])
    changed = (tokens_before_blocks(model, images) != before).any(-1)  # (B, T)
    patch = find_tower(model).num_prefix + 1 * 4 + 2
    assert changed.nonzero().tolist() == [[0, patch], [1, patch]]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_diagnosis_names_the_cause_and_repair_removes_the_outliers(name: str, photos: Tensor) -> None:
    model = planted(name)
    found = look(model, photos)
    assert found.standing_embeddings is not None
    assert found.standing_embeddings.positions == list(PLANTED)
    assert "norms up to 30" in " ".join(found.notes)
    if name != "open_clip":  # the norm in front of the blocks makes all patches alike
        assert found.outliers is not None
        assert found.outliers.positions == list(PLANTED)
        assert found.verdict.endswith("(1, 2), (3, 0): a register does not fix them, testreg.repair(model) does")
    assert not found.repaired
    assert testreg.repair(model) is model
    now = look(model, photos)
    assert now.kind == "none"
    assert now.standing_embeddings is None
    assert now.notes[-1] == "Position embeddings of the model are repaired."


@pytest.mark.parametrize("name", FAMILIES)
def test_a_repaired_embedding_is_the_mean_of_its_neighbours_and_no_other_weight_changes(name: str) -> None:
    model = planted(name)
    embedding = position_embedding(find_tower(model))
    assert embedding is not None
    before, rows = state(model), embedding.patches.clone().unflatten(0, (4, 4))
    testreg.repair(model)
    around = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 3), (2, 1), (2, 2), (2, 3)]
    wanted = torch.stack([rows[place] for place in around]).mean(0)
    after = embedding.patches.unflatten(0, (4, 4))
    torch.testing.assert_close(after[1, 2], wanted)
    torch.testing.assert_close(after[3, 0], torch.stack([rows[2, 0], rows[2, 1], rows[3, 1]]).mean(0))
    now = model.state_dict()
    (changed,) = [key for key in before if not torch.equal(now[key], before[key])]
    assert int((now[changed] != before[changed]).flatten(0, -2).any(-1).sum()) == 2
    assert testreg.unrepair(model) is model
    assert same(model.state_dict(), before)
    assert not is_repaired(find_tower(model))


def test_neighbours_that_stand_out_too_are_left_out() -> None:
    """In a corner of 2 x 2 positions three are replaced first, and then the outermost by the mean of these."""
    model = planted("timm_vit")
    put(model, [(0, 0), (0, 1), (1, 0), (1, 1)])
    rows = model.pos_embed[0, 1:].detach().clone().unflatten(0, (4, 4))  # type: ignore[index]
    testreg.repair(model)
    now = model.pos_embed[0, 1:].detach().unflatten(0, (4, 4))  # type: ignore[index]
    assert int((now != rows).any(-1).sum()) == 6
    torch.testing.assert_close(now[0, 1], rows[0, 2])  # (1, 2) stands out
    torch.testing.assert_close(now[1, 1], torch.stack([rows[0, 2], rows[2, 0], rows[2, 1], rows[2, 2]]).mean(0))
    torch.testing.assert_close(now[0, 0], torch.stack([now[0, 1], now[1, 0], now[1, 1]]).mean(0))


@pytest.mark.parametrize("patch_first", [True, False])
def test_patch_and_repair_go_in_any_order(patch_first: bool, photos: Tensor) -> None:
    model, other = planted("hf_siglip"), planted("hf_siglip")
    before = state(model)
    testreg.patch(testreg.repair(other), NEURONS)
    steps = [lambda: testreg.patch(model, NEURONS), lambda: testreg.repair(model)]
    undo = [lambda: testreg.unpatch(model), lambda: testreg.unrepair(model)]
    for step in steps if patch_first else reversed(steps):
        step()
    with torch.no_grad():
        assert torch.equal(model(photos[:2])[0], other(photos[:2])[0])
    for step in undo:  # once in the order of the steps, and once in reverse
        step()
    assert same(model.state_dict(), before)


def test_images_of_another_size_get_repaired_embeddings(photos: Tensor) -> None:
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**{**HF_DINOV2, "image_size": 128})).eval()
    put(smooth(model), [(2, 5)])
    found = look(model, photos)  # on a grid of 4 x 4, from one of 8 x 8
    assert found.outliers is not None
    assert found.outliers.positions == [(0, 2), (1, 2), (1, 3)]  # interpolation spreads it
    assert found.outliers.is_repairable
    assert found.standing_embeddings is not None
    assert (found.standing_embeddings.positions, found.standing_embeddings.grid) == ([(2, 5)], (8, 8))
    assert "at (2, 5) of 8 x 8" in " ".join(found.notes)
    assert look(testreg.repair(model), photos).kind == "none"


def test_fixed_positions_that_no_embedding_makes_are_not_said_to_be_repairable(photos: Tensor) -> None:
    model = planted("timm_vit")
    step = torch.linspace(-300, 300, 48)
    model.blocks[0].mlp.register_forward_hook(  # type: ignore[union-attr, index]
        lambda module, args, out: out.index_put((torch.arange(len(out)), torch.tensor(1 + 4 * 2 + 3)), step)
    )
    found = look(model, photos)
    assert found.outliers is not None
    assert {each.position: each.is_repairable for each in found.outliers.fixed_positions}[2, 3] is False
    assert found.verdict.endswith("a register does not fix them")
    assert "testreg.repair(model)" in " ".join(found.notes)
    now = look(testreg.repair(model), photos)
    assert now.outliers is not None
    assert now.outliers.positions == [(2, 3)]


def test_calibrate_says_what_to_do_instead(photos: Tensor) -> None:
    with pytest.raises(testreg.ImmovableOutliersError, match=r"testreg\.repair\(model\) does"):
        testreg.calibrate(planted("timm_vit"), photos, progress=False)


def test_a_repaired_model_is_calibrated_like_any_other(photos: Tensor) -> None:
    model = fresh("timm_clip")
    neurons = plant(model, photos, num_neurons=4).neurons
    put(model, [(1, 2)], norm=3000.0)
    testreg.repair(model)
    assert look(model, photos).kind == "movable"
    with testreg.patched(model, neurons):
        assert look(model, photos).kind == "none"


def test_a_model_in_which_none_stands_out_is_left_alone() -> None:
    model = build("timm_vit")
    before = state(model)
    with pytest.raises(
        ValueError, match=r"no position embedding of VisionTransformer .* stands out \(the largest norm is 1"
    ):
        testreg.repair(model)
    assert same(model.state_dict(), before)
    assert not is_repaired(find_tower(model))


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_a_model_without_position_embeddings_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"no learned position embeddings .* testreg\.Family\(positions=\.\.\.\)"):
        testreg.repair(build(name))


def test_repairing_twice_and_undoing_what_was_not_done_are_errors() -> None:
    model = planted("timm_vit")
    with pytest.raises(RuntimeError, match="is not repaired"):
        testreg.unrepair(model)
    testreg.repair(model)
    with pytest.raises(RuntimeError, match="already repaired"):
        testreg.repair(model)


def test_what_changed_since_is_not_undone() -> None:
    model = testreg.repair(planted("timm_vit"))
    with torch.no_grad():
        model.pos_embed.mul_(2)  # type: ignore[union-attr, operator]
    after = state(model)
    with pytest.raises(RuntimeError, match="changed since"):
        testreg.unrepair(model)
    assert same(model.state_dict(), after)
    model.load_state_dict(planted("timm_vit").state_dict())
    testreg.unrepair(testreg.repair(model))
    assert same(model.state_dict(), planted("timm_vit").state_dict())


def test_copies_pickles_and_other_dtypes_can_be_undone() -> None:
    model = planted("hf_siglip")
    before = copy.deepcopy(model).half().state_dict()
    testreg.repair(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert same(testreg.unrepair(each.half()).state_dict(), before)


def test_a_grid_that_is_no_square() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", **{**TIMM, "img_size": (32, 128)}).eval()
    put(model, [(1, 5)])
    found = position_embedding(find_tower(model))
    assert found is not None
    assert found.grid == (2, 8)
    testreg.repair(model)
    around = [4, 5, 6, 8 + 4, 8 + 6]
    torch.testing.assert_close(model.pos_embed[0, 1 + 8 + 5], model.pos_embed[0, [1 + each for each in around]].mean(0))


def test_embeddings_of_clips_are_not_taken_for_those_of_a_square() -> None:
    """Four frames of 2 x 2 patches are 16 positions."""
    config = transformers.VivitConfig(**{**HF, "image_size": 32}, num_frames=4, tubelet_size=[1, 16, 16])
    assert position_embedding(find_tower(transformers.VivitModel(config))) is None


@pytest.mark.skipif(not TIMM_RECORDS, reason="this timm does not record what `save` needs")
@pytest.mark.parametrize("name", slow_except(["timm_vit", "hf_siglip"], "timm_vit"))
def test_a_patched_checkpoint_keeps_the_repair(name: str, photos: Tensor, tmp_path: Path) -> None:
    model = testreg.patch(testreg.repair(planted(name)), NEURONS)
    testreg.save(model, tmp_path / "patched")
    loaded = testreg.load(tmp_path / "patched")
    assert look(loaded, photos).standing_embeddings is None
    with torch.no_grad():
        assert torch.equal(torch.as_tensor(loaded(photos[:2])[0]), torch.as_tensor(model(photos[:2])[0]))
    given = planted(name)
    assert same(testreg.load(tmp_path / "patched", model=given).state_dict(), loaded.state_dict())
    with pytest.raises(RuntimeError, match="is not repaired"):
        testreg.unrepair(loaded)


def test_the_page_says_what_to_do(photos: Tensor, tmp_path: Path) -> None:
    model = planted("timm_vit")
    write_diagnosis_report(tmp_path / "page.html", look(model, photos), model, photos[:2])
    page = (tmp_path / "page.html").read_text()
    assert "but testreg.repair(model) does" in page
    assert "Crop or interpolate" not in page


def test_the_json_has_what_stands_out(photos: Tensor) -> None:
    found = look(planted("timm_vit"), photos)
    assert found.standing_embeddings is not None
    assert found.to_json()["standing_embeddings"] == dataclasses.asdict(found.standing_embeddings)
