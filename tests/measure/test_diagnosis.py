import dataclasses
import json
import math

import pytest
import timm
import torch
import transformers
from marks import slow_except
from planting import plant
from tiny import HF, TIMM, build, fresh
from torch.overrides import _len_torch_function_stack

import testreg
from testreg.families import find_tower
from testreg.measure.conclusion import MASSIVE, conclude
from testreg.measure.diagnose import diagnose
from testreg.measure.diagnosis import ATTENTION_LEGEND, LEGEND, QUANTILES, AttentionHead, BlockDiagnosis
from testreg.measure.observation import Observations, neighbour_cosine, observe
from testreg.measure.outliers import OutlierRule
from testreg.measure.sampling import far_queries, sample

NORM_BEFORE_MLP = {
    "timm_vit": "norm2",
    "timm_dinov2": "norm2",
    "timm_eva": "norm2",
    "hf_clip": "layer_norm2",
    "hf_dinov2": "norm2",
    "open_clip": "ln_2",
    "open_clip_sequence_first": "ln_2",
    "torchvision_vit": "ln_2",
}


@pytest.fixture
def planted(photos):
    model = fresh("timm_clip")
    plant(model, photos, num_neurons=4)
    return model


def timm_model(name):
    torch.manual_seed(0)
    return timm.create_model(name, **TIMM).eval()


def with_high_positions(photos):
    """A model whose position embeddings are huge at rows and columns (1, 1) and (2, 3), in channel 7."""
    model = fresh("timm_vit")
    with torch.no_grad():
        model.pos_embed[0, [1 + 5, 1 + 11], 7] = 50.0
    return model


def look(model, images, **options):
    return diagnose(model, images, progress=False, **options)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", ["timm_vit", "timm_clip", "hf_dinov2", "hf_siglip", "open_clip_sequence_first"])
def test_planted_outliers_are_movable_and_from_their_mlp(name, block, photos):
    model = fresh(name)
    plant(model, photos, block=block, num_neurons=4, outlier_fraction=0.02)
    found = look(model, photos)
    assert found.kind == "movable"
    assert (found.outliers.onset_block, found.outliers.onset_part) == (block, "MLP")
    assert found.outliers.fraction == pytest.approx(0.02, abs=0.01)
    assert found.outliers.mlp_share > 0.9
    assert found.outliers.fixed_positions == []
    assert (
        found.verdict == f"outliers from block {block} (MLP), {100 * found.outliers.fraction:.1f} % of patches, movable"
    )


def test_what_happens_to_planted_outliers(planted, photos):
    found = look(planted, photos)
    assert found.outliers.fade_block is None
    assert found.blocks[1].after_mlp.outlier_fraction == found.blocks[2].after_attention.outlier_fraction == 0
    assert found.blocks[3].outlier_attention > 3 * found.blocks[2].after_mlp.outlier_fraction  # half of the heads
    with torch.no_grad():  # the last block takes back what outliers have
        planted.blocks[3].register_forward_hook(lambda module, args, out: torch.nn.functional.normalize(out, dim=-1))
    assert look(planted, photos).outliers.fade_block == 3


@pytest.mark.parametrize("name", ["timm_vit", "timm_dinov2_reg4", "hf_clip", "open_clip"])
def test_a_clean_model_has_nothing_to_fix(name, photos):
    found = look(build(name), photos)
    assert found.outliers is None
    assert found.kind == "none"
    assert found.verdict == "no outliers: nothing to fix"


def test_high_position_embeddings_are_fixed_position_artefacts(photos):
    found = look(with_high_positions(photos), photos)
    positions = found.outliers.fixed_positions
    assert [(each.row, each.column, each.images) for each in positions] == [(1, 1, 1.0), (2, 3, 1.0)]
    assert all(each.embedding_ratio > 2 for each in positions)
    assert found.outliers.fixed_share > 0.9
    assert found.kind == "fixed"
    assert found.verdict == (
        "fixed-position artefacts from position embeddings that stand out at (1, 1), (2, 3): "
        "a register does not fix them, testreg.repair(model) does"
    )
    standing = found.embedding_positions
    assert [(each.row, each.column, each.ratio) for each in standing] == [
        (each.row, each.column, each.embedding_ratio) for each in positions
    ]
    assert f"up to {max(each.ratio for each in standing):.1f} x the median norm: (1, 1), (2, 3)." in " ".join(
        found.notes
    )
    (channel, share), *_ = found.embedding.massive_channels
    assert channel == 7
    assert share > 0.5


def test_few_images_say_nothing_about_positions(photos):
    found = look(with_high_positions(photos), photos[:4])
    assert found.outliers.fixed_share is None
    assert found.kind == "immovable"
    assert any("fewer than 8 images" in note for note in found.notes)


def test_positions_are_compared_among_images_of_one_size(photos):
    model = fresh("hf_dinov2")
    plant(model, photos, num_neurons=4)
    wide = torch.cat([photos[:10], photos[10:20]], -1)
    found = look(model, [*photos, *wide], batch_size=1)
    assert found.images == 55
    assert found.outliers.fixed_positions == look(model, photos).outliers.fixed_positions == []
    assert found.kind == "movable"


def test_outliers_that_attention_makes_are_not_movable(photos):
    model = fresh("timm_vit")
    step = torch.linspace(-100, 100, 48)

    def write(module, args, out):
        chosen = args[0][:, 1:, 0].argmax(1) + 1
        return out.index_put((torch.arange(len(out)), chosen), step)

    model.blocks[1].attn.register_forward_hook(write)
    found = look(model, photos)
    assert (found.outliers.onset_block, found.outliers.onset_part) == (1, "attention")
    assert found.outliers.mlp_share < 0.1
    assert found.verdict == (
        "outliers from block 1 (attention), 6.2 % of patches, not made by MLPs: a register does not move them"
    )


def test_a_prefix_token_takes_the_role(photos):
    model = build("timm_dinov2_reg4")
    with torch.no_grad():
        model.reg_token[0, 1] = 100.0  # prefix token 2, behind CLS
        model.blocks[3].attn.qkv.weight.zero_()
    found = look(model, photos)
    (role,) = found.prefix_roles
    assert role.token == 2
    assert role.ratio == found.blocks[role.block].after_mlp.prefix_ratio[2] > 5
    assert role.attention == max(block.prefix_attention[2] for block in found.blocks) >= 1 / 21 - 1e-6  # evenly
    assert role.is_register
    assert found.trained_registers == 4
    assert found.verdict.startswith(
        "no outliers: nothing to fix (their role is taken by trained register (prefix token 2), "
    )


@pytest.mark.parametrize("name", NORM_BEFORE_MLP)
def test_the_stream_after_attention_is_what_the_norm_before_the_mlp_gets(name, photos):
    model = (timm_model("eva02_base_patch14_224") if name == "timm_eva" else build(name)).double()
    tower = find_tower(model)
    seen = []
    handles = [
        getattr(block.module, NORM_BEFORE_MLP[name]).register_forward_pre_hook(
            lambda module, args: seen.append(tower.batch_first(args[0]))
        )
        for block in tower.blocks
    ]
    with torch.no_grad():
        tower.run(photos)
    for handle in handles:
        handle.remove()
    found = look(model, photos)
    for block, tokens in zip(found.blocks, seen, strict=True):
        norms = tokens.norm(dim=-1)
        median = norms[:, tower.num_prefix :].median(1).values
        assert block.after_attention.median_norm == pytest.approx(median.mean().item(), rel=1e-6)
        assert block.after_attention.prefix_ratio == pytest.approx(
            (norms[:, : tower.num_prefix] / median[:, None]).mean(0).tolist(), rel=1e-6
        )


def test_where_attention_and_mlp_are_not_added_in_turn_the_block_is_looked_at_as_one(photos):
    model = timm_model("vit_large_patch14_xp_224")
    found = look(model, photos)
    assert all(block.after_attention is None for block in found.blocks)
    assert "What attention adds and what the MLP adds is not told apart in every block." in found.notes
    with torch.no_grad():
        model.blocks[1].register_forward_hook(
            lambda module, args, out: out.index_put(
                (torch.arange(len(out)), args[0][..., 0].argmax(1)), torch.linspace(-100, 100, 48)
            )
        )
    found = look(model, photos)
    assert found.verdict.startswith("outliers from block 1, ")
    assert found.outliers.mlp_share is None


@pytest.mark.parametrize("name", ["two branches", "norms behind both"])
def test_after_attention_in_other_kinds_of_blocks(name, photos):
    kind = {"two branches": "vit_base_patch16_18x2_224", "norms behind both": "vit_base_patch16_rpn_224"}[name]
    model = timm_model(kind)
    seen = []
    for block in model.blocks:
        mlp = block.ffns[0].norm if name == "two branches" else block.mlp
        mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = look(model, photos, batch_size=45)
    for block, tokens in zip(found.blocks, seen, strict=True):
        median = tokens[:, model.num_prefix_tokens :].norm(dim=-1).median(1).values
        assert block.after_attention.median_norm == pytest.approx(median.mean().item(), rel=1e-5)


def test_all_figures_equal_a_plain_recomputation(planted, photos):
    """The pass adds up sums in vectors; here every patch is looked at for itself, in float64."""
    model, rule = planted.double(), OutlierRule()
    with torch.no_grad():
        model.pos_embed[0, 1 + 5, 7] = 0.5
    tower = find_tower(model)
    states, weights = [], []
    for block in model.blocks:
        block.norm2.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        block.register_forward_hook(lambda module, args, out: states.append(out))
        block.attn.qkv.register_forward_hook(lambda module, args, out: weights.append(attention(out)))
    model.blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        tower.run(photos)
    assert len(states) == 9
    found = look(model, photos, batch_size=45)

    ours = [found.embedding]
    for block in found.blocks:
        ours += [block.after_attention, block.after_mlp]
    outliers = [[outliers_of(image, rule) for image in state] for state in states[:9]]
    for place, state, outlier in zip(ours, states, outliers, strict=False):
        check_place(place, state, outlier)
    for i, block in enumerate(found.blocks):
        drawn = weights[i].mean((1, 2))  # (B, T)
        to_outliers = [sum(drawn[b, 1 + n] for n in at) for b, at in enumerate(outliers[2 * i])]
        assert block.outlier_attention == pytest.approx(float(sum(to_outliers)) / 45, rel=1e-5, abs=1e-9)
        assert block.prefix_attention == pytest.approx([drawn[:, 0].mean().item()], rel=1e-5)


def attention(qkv):
    query, key, _ = qkv.unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4)  # (B, heads, T, 12) each
    return (query @ key.transpose(-2, -1) / 12**0.5).softmax(-1)


def outliers_of(image, rule):
    """Numbers of the patches of an image (T, C) that are outliers."""
    norms = image[1:].norm(dim=-1)
    limit = rule.limit(norms[None])[0]
    return [n for n in range(len(norms)) if norms[n] > limit]


def check_place(place, state, outlier):
    ratios, medians, prefix, cosines, columns = [], [], [], {True: [], False: []}, []
    for image, at in zip(state, outlier, strict=True):
        norms = image.norm(dim=-1)
        median = norms[1:].median()
        medians.append(median)
        prefix.append(norms[0] / median)
        ratios.append(norms[1:] / median)
        columns += [image[1 + n] for n in at]
        for n in range(16):
            neighbours = [m for m in range(16) if abs(m // 4 - n // 4) + abs(m % 4 - n % 4) == 1]
            similarity = [torch.cosine_similarity(image[1 + n], image[1 + m], dim=0) for m in neighbours]
            cosines[n in at].append(sum(similarity) / len(similarity))
    every = torch.cat(ratios)
    close = lambda value: pytest.approx(float(value), rel=1e-5)  # norms are taken in float32
    mean = lambda values: close(sum(values) / len(values))
    assert place.median_norm == mean(medians)
    assert place.prefix_ratio == [mean(prefix)]
    assert place.max_over_median == mean([each.max() for each in ratios])
    assert place.outlier_fraction == sum(map(len, outlier)) / (16 * 45)
    assert place.normal_cosine == mean(cosines[False])
    centred = every - every.mean()
    assert place.kurtosis == pytest.approx(float(centred.pow(4).mean() / centred.square().mean() ** 2), rel=1e-2)
    for level, value in zip(QUANTILES, place.quantiles, strict=True):
        expected = every.quantile(level, interpolation="lower").item()
        above = every.quantile(level, interpolation="higher").item()
        assert expected / 1.006 <= value <= above * 1.006
    if not columns:
        assert place.outlier_ratio is place.outlier_cosine is None
        assert place.massive_channels == []
        return
    assert place.outlier_cosine == mean(cosines[True])
    assert place.outlier_ratio == mean([ratios[b][n] for b, at in enumerate(outlier) for n in at])
    tokens = torch.stack(columns)
    average = tokens.mean(0).abs()
    massive = [c for c in average.argsort(descending=True).tolist()[:3] if average[c] > MASSIVE * average.median()]
    share = tokens.square().sum(0) / tokens.square().sum()
    assert [channel for channel, _ in place.massive_channels] == massive
    assert [value for _, value in place.massive_channels] == [close(share[channel]) for channel in massive]


# Attention ------------------------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """Two heads, with given weights (2, T, T) and values (2, T, 2), that add nothing to the stream."""

    def __init__(self, weights, values):
        super().__init__()
        self.weights, self.values = weights, values

    def forward(self, tokens, **kwargs):
        none = tokens.new_zeros(len(tokens), *self.values.shape)
        values = self.values.expand_as(none)
        torch.nn.functional.scaled_dot_product_attention(none, none, values, self.weights.log())
        return torch.zeros_like(tokens)


def test_attention_to_outliers_by_hand(photos):
    """Tokens 6 and 12 of 17 are outliers. Head 0 gives half of its attention to the first, and their values are zero;
    head 1 gives nine tokens the first and eight the second, and their values have three times the norm of others."""
    model = with_high_positions(photos)
    weights, values = torch.full((2, 17, 17), 0.5 / 15), torch.ones(2, 17, 2) / 2**0.5
    weights[0, :, 6], weights[0, :, 12] = 0.5, 0.0
    weights[1], weights[1, :9, 6], weights[1, 9:, 12] = 0.04, 0.4, 0.4
    weights[1, :9, 12] = weights[1, 9:, 6] = 0.0
    values[0, [6, 12]] = 0.0
    values[1, [6, 12]] = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    model.blocks[2].attn = Attention(weights, values)
    found = look(model, photos)
    assert [(each.row, each.column) for each in found.outliers.fixed_positions] == [(1, 1), (2, 3)]
    block = found.blocks[2]
    first, second = block.heads
    close = lambda value: pytest.approx(value, rel=1e-5)
    assert (first.outlier_attention, second.outlier_attention) == (close(0.5), close(0.4))
    assert block.outlier_attention == close(0.45)
    assert (first.value_ratio, second.value_ratio) == (0.0, close(3.0))
    assert block.value_ratio == close(0.4 / 0.9 * 3.0)
    assert first.broadcast_rank is None  # nothing is taken, so there is no direction
    shares = [3 / (3 + 8**0.5), 8**0.5 / (3 + 8**0.5)]
    assert second.broadcast_rank == close(math.exp(-sum(share * math.log(share) for share in shares)))
    assert block.broadcast_rank is None or block.broadcast_rank == second.broadcast_rank
    columns = []
    for key in range(16):
        near = [1 + n for n in range(16) if abs(n // 4 - key // 4) <= 1 and abs(n % 4 - key % 4) <= 1]
        far = [query for query in range(17) if query not in near]
        columns.append(weights[:, far, 1 + key].mean())
    columns = torch.stack(columns)
    assert block.column_ratio == close(float(columns.max() / columns.median()))


def test_which_queries_are_far_from_which_patches():
    far = far_queries(torch.tensor([0, 1, 6, 7]), (2, 3), 1)  # CLS, the first and the last patch, a register
    assert far.tolist() == [[True] * 6, [False, False, True] * 2, [True, False, False] * 2, [True] * 6]


@pytest.mark.parametrize("name", ["timm_clip", "hf_clip", "open_clip", "open_clip_sequence_first", "hf_dinov2"])
@pytest.mark.parametrize("no_op", [True, False])
def test_a_no_op_sink_is_told_from_one_that_broadcasts(name, no_op, photos):
    model = fresh(name)
    ((block, units),) = plant(model, photos, num_neurons=4).neurons.items()
    tower = find_tower(model)
    direction = tower.blocks[block].mlps[0].columns[:, units[0]].detach()
    direction = direction / direction.norm()
    if no_op:
        for each in tower.blocks:  # values see nothing of what outliers are
            (weight,) = values_of(each.module, name)
            weight -= torch.outer(weight @ direction, direction)
    found = look(model, photos)
    sink = found.outliers.sink
    assert sink.kind == ("no-op" if no_op else "broadcast")
    assert sink.block > block
    assert sink.head < 2  # half of the heads are planted to attend to outliers
    assert sink.head_attention == found.blocks[sink.block].heads[sink.head].outlier_attention > 0.1
    assert sink.value_ratio < 0.15 if no_op else sink.value_ratio > 0.4
    words = "a no-op sink." if no_op else f"effectively {sink.broadcast_rank:.1f} dimensions of a head."
    assert found.notes[1].endswith(words)


@torch.no_grad()
def values_of(block, name):
    """The weight (C, C) by which a block makes values, to be changed in place."""
    for key, parameter in block.named_parameters():
        parameter.requires_grad_(False)
        if key.endswith(("qkv.weight", "in_proj_weight")):
            yield parameter[2 * parameter.shape[1] :]
        elif key.endswith(("v_proj.weight", "value.weight")):
            yield parameter


def test_a_sample_stands_for_all_tokens():
    tokens, share = sample(5 + 200 + 2, 5, 205)  # five prefix tokens, two registers
    assert tokens[:7].tolist() == [0, 1, 2, 3, 4, 205, 206]
    patches = tokens[7:]
    assert len(patches) == len(set(patches.tolist())) == 64
    assert ((patches >= 5) & (patches < 205)).all()
    assert share.sum() == pytest.approx(1.0)
    assert share[0] == pytest.approx(1 / 207)
    assert share[-1] == pytest.approx(200 / 64 / 207)
    sample.cache_clear()
    assert torch.equal(sample(207, 5, 205)[0], tokens)
    few, share = sample(17, 1, 17)
    assert sorted(few.tolist()) == list(range(17))
    assert share.tolist() == pytest.approx([1 / 17] * 17)


@pytest.mark.parametrize("name", ["timm_clip", "hf_clip", "open_clip"])
def test_a_sample_of_the_queries_gives_nearly_what_all_give(name, photos, monkeypatch):
    torch.manual_seed(0)
    model = fresh(name)
    plant(model, photos, num_neurons=4)
    whole = look(model, photos)
    monkeypatch.setattr("testreg.measure.sampling.NUM_QUERIES", 6)
    sample.cache_clear()
    found = look(model, photos)
    sample.cache_clear()
    assert found.attention_queries == whole.attention_queries == 64
    for block, expected in zip(found.blocks, whole.blocks, strict=True):
        assert block.after_mlp == expected.after_mlp
        assert block.outlier_attention == pytest.approx(expected.outlier_attention, abs=0.02)
        assert block.prefix_attention == pytest.approx(expected.prefix_attention, abs=0.02)
    block, expected = (each.blocks[whole.outliers.sink.block] for each in (found, whole))
    assert block.heads != expected.heads  # it is a sample
    assert block.value_ratio == pytest.approx(expected.value_ratio, rel=0.05)


def test_attention_need_not_be_measured(planted, photos):
    tower = find_tower(planted)
    found = conclude(planted, [observe(tower, photos.split(16), OutlierRule(), attention=False)], OutlierRule())
    whole = look(planted, photos)
    assert all(block.heads is block.outlier_attention is block.column_ratio is None for block in found.blocks)
    assert found.attention_queries is found.outliers.sink is None
    assert [block.after_mlp for block in found.blocks] == [block.after_mlp for block in whole.blocks]
    assert found.verdict == whole.verdict


# Positions ------------------------------------------------------------------------------------------------------------


def fine_model():
    """A model with a grid of 8 x 8 patches, whose border is less than half of them."""
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", **{**TIMM, "patch_size": 8}).eval()


def adding(row_and_column_of):
    """A hook of an MLP that adds a huge vector at a position of each image."""

    def write(module, args, out):
        positions = [row_and_column_of(number) for number in range(len(out))]
        patches = torch.tensor([1 + 8 * row + column for row, column in positions])
        return out.index_put((torch.arange(len(out)), patches), torch.linspace(-100, 100, 48))

    return write


def plain_images():
    """In which no patch is more than another."""
    return torch.randn(45, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_fixed_positions_in_the_border_are_named():
    model = fine_model()
    model.blocks[1].mlp.register_forward_hook(adding(lambda number: (0, 7)))
    found = look(model, plain_images())
    assert [each.in_border for each in found.outliers.fixed_positions] == [True]
    assert found.outliers.border_share == 1.0
    assert found.verdict == (
        "fixed-position artefacts in the border from block 1 (MLP) at (0, 7): a register does not fix them"
    )
    with torch.no_grad():
        model.pos_embed[0, [1 + 8 * 3 + 4, 1 + 8 * 7 + 2], 7] = 50.0
    found = look(model, plain_images())
    assert {(each.row, each.column): each.in_border for each in found.outliers.fixed_positions}[3, 4] is False
    assert "in the border" not in found.verdict


def test_outliers_anywhere_in_the_border():
    model = fine_model()
    model.blocks[1].mlp.register_forward_hook(adding(lambda number: (number % 8, 7 * (number % 2))))
    found = look(model, plain_images(), batch_size=16)
    assert found.outliers.fixed_positions == []
    assert found.outliers.border_share == 1.0
    assert found.kind == "movable"
    assert "100% of them lie in the outermost rows and columns." in found.notes


def test_a_border_of_most_patches_says_nothing(photos):
    found = look(with_high_positions(photos), photos)
    assert found.outliers.border_share is None
    assert not any(each.in_border for each in found.outliers.fixed_positions)


def test_position_embeddings_that_no_block_shows(photos):
    model = with_high_positions(photos)
    model.blocks[0].register_forward_hook(lambda module, args, out: torch.nn.functional.normalize(out, dim=-1))
    found = look(model, photos)
    assert found.kind == "none"
    assert [(each.row, each.column) for each in found.embedding_positions] == [(1, 1), (2, 3)]
    assert found.notes[0].startswith("Position embeddings stand out in front of the first block")
    assert look(model, photos[:4]).embedding_positions == []
    assert look(build("timm_vit"), photos).embedding_positions == []


def test_neighbour_cosine_of_a_single_patch_or_row():
    assert neighbour_cosine(torch.ones(1, 1, 4), torch.full((1, 1), 2.0), (1, 1)).tolist() == [[0.0]]
    row = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
    assert neighbour_cosine(row, row.norm(dim=-1), (1, 3)).tolist() == [[0.0, 0.5, 1.0]]


@pytest.mark.parametrize("batch_size", slow_except([1, 7, 64], 7))
def test_the_batch_size_does_not_matter(batch_size, planted, photos):
    expected, found = (look(planted, photos, batch_size=size).to_json() for size in (16, batch_size))
    assert found["verdict"] == expected["verdict"]
    for (name, value), (other, reference) in zip(leaves(found), leaves(expected), strict=True):
        assert name == other
        if isinstance(reference, float):  # quantiles may fall into the next bin
            reference = pytest.approx(reference, rel=0.011 if "quantiles" in name else 1e-3, abs=1e-6)
        assert value == reference, name


def leaves(value, name=""):
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, list | tuple):
        value = list(enumerate(value))
    else:
        return [(name, value)]
    return [leaf for key, part in value for leaf in leaves(part, f"{name}.{key}")]


def test_json(planted, photos, tmp_path):
    found = look(planted, photos)
    found.save(tmp_path / "diagnosis.json")
    data = json.loads((tmp_path / "diagnosis.json").read_text())
    assert leaves(data) == leaves(found.to_json())
    assert data["format"] == "testreg-diagnosis"
    assert data["verdict"] == found.verdict
    assert len(data["blocks"]) == 4
    assert data["images"] == 45
    assert data["image_size"] == [64, 64]
    assert list(tmp_path.iterdir()) == [tmp_path / "diagnosis.json"]


def test_the_table_has_a_line_for_each_block(planted, photos):
    found = look(planted, photos)
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[2:7]] == ["embedding", "0", "1", "2", "3"]
    assert [line.split()[0] for line in lines[10:14]] == ["0", "1", "2", "3"]
    terms = [term for term, _ in LEGEND + ATTENTION_LEGEND]
    assert [line.split("  ")[1] for line in lines[15:]] == terms
    unseen = [dataclasses.replace(block, outlier_attention=None) for block in found.blocks]
    assert len(dataclasses.replace(found, blocks=unseen).table().splitlines()) == 7 + 1 + len(LEGEND)


def test_the_table_fits_a_terminal(planted, photos):
    found = look(planted, photos)
    assert max(map(len, found.table().splitlines())) <= 80
    enormous = dataclasses.replace(
        found.embedding,
        median_norm=1234567.0,
        quantiles=[0.5, 0.9, 1.1, 123456.0],
        max_over_median=1e7,
        kurtosis=98765.4,
        outlier_fraction=1.0,
        outlier_cosine=-0.5,
        normal_cosine=-0.25,
        prefix_ratio=[54321.0],
    )
    heads = [AttentionHead(1.0, 123456.0, 123456.0)] * 99
    block = BlockDiagnosis(enormous, enormous, 1.0, [0.5, 0.5], 123456.0, 123456.0, 123456.0, heads)
    table = dataclasses.replace(found, embedding=enormous, blocks=[block] * 100).table().splitlines()
    assert max(map(len, table)) <= 80
    assert " ".join(table[102].split()) == "99 1e+06 1e+05 1e+07 54321 98765 100 100 -0.25 -0.50"
    assert " ".join(table[205].split()) == "99 100 100 100 1e+05 1e+05 1e+05"


def test_a_diagnosis_in_three_lines(planted, photos):
    found = look(planted, photos)
    first, second, third = repr(found).splitlines()
    assert first == f"Diagnosis: {found.verdict}"
    assert second.endswith(": 4 blocks, 45 images at 64 x 64")
    assert third == f"  {found.notes[0]}"
    named = dataclasses.replace(found, model={**found.model, "name": "<b>\n\x1b[31m"}, patched=True)
    assert len(repr(named).splitlines()) == 3
    assert ", patched: 4 blocks" in repr(named)
    assert "<b>" not in named._repr_html_()
    assert f"<td>{found.blocks[3].after_mlp.median_norm:.4g}</td>" in found._repr_html_()
    assert len(found) == 4
    assert found.to_json()["verdict"] == found.verdict


def test_a_diagnosis_draws_norms_and_outliers(planted, photos):
    found = look(planted, photos)
    norms, outliers = found.plot().axes
    assert list(norms.lines[1].get_ydata()) == [block.after_mlp.median_norm for block in found.blocks]
    assert list(outliers.lines[0].get_ydata()) == [100 * block.after_mlp.outlier_fraction for block in found.blocks]
    assert len(outliers.lines) == 2
    unseen = dataclasses.replace(found, blocks=[dataclasses.replace(found.blocks[0], outlier_attention=None)] * 4)
    assert len(unseen.plot().axes[1].lines) == 1


def test_massive_channels_are_in_the_notes(planted, photos):
    found = look(planted, photos)
    channels = found.blocks[found.outliers.block].after_mlp.massive_channels
    assert (len(channels) > 0) == any("squared norm" in note for note in found.notes)
    after = dataclasses.replace(found.blocks[3].after_mlp, massive_channels=[(7, 0.9), (1, 0.05)])
    blocks = [*found.blocks[:3], dataclasses.replace(found.blocks[3], after_mlp=after)]
    notes = dataclasses.replace(found, blocks=blocks, outliers=dataclasses.replace(found.outliers, block=3)).notes
    assert "Of their squared norm, most is in few channels: 7 (90%), 1 (5%)." in notes


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_is_left_as_it_was(patched, planted, photos):
    if patched:
        testreg.patch(planted, {2: [0, 1]})
    planted.train()
    state = {key: value.clone() for key, value in planted.state_dict().items()}

    def traces():
        return [
            (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(module.__dict__))
            for module in planted.modules()
        ]

    before = traces()
    look(planted, photos)
    with pytest.raises(KeyboardInterrupt):
        look(planted, interrupted(photos))
    with pytest.raises(AssertionError, match="doesn't match model"):  # within the forward
        look(planted, torch.zeros(2, 3, 32, 32))
    assert traces() == before
    assert _len_torch_function_stack() == 0
    assert planted.training
    assert all(torch.equal(value, state[key]) for key, value in planted.state_dict().items())


def interrupted(photos):
    yield from photos[:20]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "name", slow_except(["timm_clip", "hf_clip", "open_clip_sequence_first"], "open_clip_sequence_first")
)
def test_a_patched_model_has_no_outliers_left(name, photos):
    model = fresh(name)
    plant(model, photos, num_neurons=4)
    before = look(model, photos)
    testreg.patch(model, testreg.calibrate(model, photos, progress=False))
    after = look(model, photos)
    assert before.kind == "movable"
    assert after.kind == "none"
    assert after.patched
    assert not before.patched
    assert all(block.after_attention is not None for block in after.blocks)  # without the register, which is behind
    assert all(block.outlier_attention == 0 for block in after.blocks)
    with testreg.disabled(model):
        assert look(model, photos).outliers == before.outliers


def test_the_threshold_of_a_rule(planted, photos):
    found = look(planted, photos, rule=OutlierRule(threshold=math.pi))
    assert found.rule == "norm > 3.14159"
    assert found.blocks[0].after_mlp.outlier_fraction == 1
    assert found.blocks[0].after_mlp.normal_cosine is None


def test_half_precision(planted, photos):
    assert look(planted.bfloat16(), photos).kind == "movable"


def test_sums_do_not_overflow_under_autocast(planted, photos):
    """The excess of the outliers of a batch is above what float16 holds, 65,504."""
    with torch.no_grad():
        planted.blocks[2].mlp.fc2.weight *= 2000
    plain = look(planted, photos, batch_size=45).outliers
    with torch.autocast("cpu", torch.bfloat16):
        found = look(planted, photos, batch_size=45).outliers
    assert (found.block, found.onset_block, found.onset_part) == (plain.block, plain.onset_block, plain.onset_part)
    assert found.mlp_share == pytest.approx(plain.mlp_share, abs=1e-4)


def test_an_image_that_is_not_finite(planted, photos):
    images = photos.clone()
    images[20, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        look(planted, images)


def test_a_tower_for_videos_says_that_it_takes_no_images():
    model = transformers.VideoMAEModel(transformers.VideoMAEConfig(**HF, num_frames=2)).eval()
    with pytest.raises(ValueError, match="takes no batch of images"):
        look(model, torch.zeros(2, 3, 64, 64))


def test_bad_arguments(planted, photos):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        look(planted, photos, batch_size=0)
    with pytest.raises(ValueError, match="no image could be read"):
        look(planted, [])
    with torch.no_grad():
        planted.blocks[1].mlp.fc2.bias[0] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        look(planted, photos)


def course(fractions: list[float], strongest: int, embedding: float = 0.0) -> str:
    """The note on where outliers are, of a diagnosis with these shares of outliers after the blocks."""
    found = hand_made(fractions, strongest, embedding)
    return found.notes[0]


def hand_made(
    fractions: list[float], strongest: int, embedding: float = 0.0, *, patched: bool = False
) -> testreg.Diagnosis:
    """The diagnosis that follows from 1000 patches an image with these shares of outliers, of excess norm 1 each, and
    2 after the strongest block."""
    depth = len(fractions)
    model = timm.create_model("vit_base_patch16_224", **{**TIMM, "depth": depth})
    if patched:
        testreg.patch(model, {0: [1]})
    sums = Observations(depth)
    sums.image_size = [64, 64]
    shares = [embedding, *(share for each in fractions for share in (each, each))]
    for place, share in zip(sums.hook_points, shares, strict=True):
        zeros = dict.fromkeys(("outlier_ratio", "outlier_cosine", "normal_cosine"), torch.tensor(0.0))
        one = {"images": torch.tensor(1.0), "patches": torch.tensor(1000.0), "outliers": torch.tensor(1000 * share)}
        more = {"median": torch.tensor(1.0), "maximum": torch.tensor(1.0), "moments": torch.ones(4)}
        arrays = {"histogram": torch.ones(9), "channels": torch.ones(4), "channel_energy": torch.ones(4)}
        place |= {**zeros, **one, **more, **arrays, "prefix": torch.ones(1)}
    for block, share in enumerate(fractions):
        sums.excess[block, 2 * block + 1 :] = share
    sums.excess[strongest, 2 * strongest + 2] = 2
    sums.positions[(4, 4)] |= {"images": torch.tensor(1.0), "outliers": torch.zeros(depth, 16)}
    return conclude(model, [sums], testreg.OutlierRule())


def test_where_outliers_appear_are_strongest_and_end_is_what_the_table_says() -> None:
    real = [0, 0, 0, 0, 0, 0.025, 0.055, 0.063, 0.06, 0.054, 0.054, 0.04]  # as OpenAI's CLIP ViT-B/16 has them
    assert course(real, 7) == (
        "Outliers appear after block 5, are strongest after block 7, and are still there after block 11, the last "
        "(4.0 % of the patches)."
    )
    assert hand_made(real, 7).verdict.startswith("outliers from block 5 (MLP), 6.3 % of patches")
    assert course([0, 0.02, 0.0005, 0.03, 0, 0.01], 3) == (
        "Outliers appear after block 3, where they are strongest, and are gone after block 4."
    )
    assert course([0, 0.01, 0.02], 2) == "Outliers appear after block 1, and are strongest after block 2, the last."
    assert course([0.01, 0.02, 0], 1, embedding=0.01) == (
        "Outliers are there in front of the first block, are strongest after block 1, and are gone after block 2."
    )


def test_what_a_patch_leaves_is_not_movable() -> None:
    plain, patched = (hand_made([0, 0.001, 0], 1, patched=patched) for patched in (False, True))
    assert (plain.kind, patched.kind) == ("movable", "left")
    assert patched.verdict == "outliers from block 1 (MLP), 0.1 % of patches, left by the registers"
