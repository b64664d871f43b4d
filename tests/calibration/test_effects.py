from dataclasses import replace

import pytest
import torch
from planting import plant
from reference import forward_by_hand
from test_calibrate import as_set
from tiny import fresh, packed, photograph_crops

import testreg
from testreg.calibration.effects import EffectMeter, what_is_wrong_with_maps, worst_of
from testreg.families import find_tower
from testreg.measure.outliers import Detection, OutlierRule, token_norms
from testreg.records.calibration import Effect, PlainAttention, Verification

RULE = OutlierRule()


def test_worst_of():
    at_224 = Effect(5, 0.2, 3, 0.1, 0.01, 0.04, 0.9)
    at_518 = Effect(5, 0.1, 7, 0.3, 0.02, 0.03, 0.8)
    assert worst_of([at_224, at_518]) == Effect(5, 0.2, 3, 0.3, 0.02, 0.04, 0.8)
    without_head = replace(at_518, agreement=None)
    assert worst_of([at_224, without_head]).agreement == 0.9
    assert worst_of([without_head]).agreement is None


def bright_in_front(model, patch):
    """A patch of every image is far longer than the others after block 0, and back to normal after block 1."""

    def add(module, args, out, sign):
        out[:, model.num_prefix_tokens + patch, 5] += sign * 300.0

    model.blocks[0].register_forward_hook(lambda *given: add(*given, sign=1))
    model.blocks[1].register_forward_hook(lambda *given: add(*given, sign=-1))


def test_what_lies_in_front_of_the_onset_does_not_count():
    """No neuron of block 2 reaches it, even where an outlier that they do remove will be."""
    images = photograph_crops()[:10]
    model = fresh("timm_clip")
    planted = plant(model, images, num_neurons=4)
    tower = find_tower(model)
    norms = token_norms(tower, images)[2, :, 1:]
    bright_in_front(model, int((norms > RULE.limit(norms)).sum(0).argmax()))
    meter = EffectMeter(model, tower, packed(images), Detection(RULE, 2), 2, batch_size=5)
    effect = meter.effect([(2, unit, None) for unit in planted.neurons[2]])
    assert effect.remaining == 0
    assert effect.worst_block >= 2


def test_a_set_does_not_look_better_for_beginning_late():
    """Its blocks from the onset on have all their outliers, though it cannot reach them."""
    images = photograph_crops()[:10]
    model = fresh("timm_clip")
    planted = plant(model, images, num_neurons=6, two_blocks=True)
    meter = EffectMeter(model, find_tower(model), packed(images), Detection(RULE, 2), 1, batch_size=5)
    neurons = [(block, unit, None) for block, units in planted.neurons.items() for unit in units]
    assert meter.effect(neurons).remaining == 0
    late = meter.effect([each for each in neurons if each[0] == 2])
    assert (late.remaining, late.worst_block) == (1, 1)


def test_outliers_that_a_set_makes_count_from_the_onset_on():
    images = photograph_crops()[:10]
    model = fresh("timm_clip")
    planted = plant(model, images, num_neurons=4)
    meter = EffectMeter(model, find_tower(model), packed(images), Detection(RULE, 2), 2, batch_size=5)
    model.blocks[3].register_forward_hook(
        lambda module, args, out: out.index_fill(1, torch.tensor([3]), 50.0) if testreg.is_patched(model) else None
    )
    effect = meter.effect([(2, unit, None) for unit in planted.neurons[2]])
    assert effect.remaining > 1
    assert effect.worst_block == 3


@pytest.mark.parametrize("patched", [False, True])
def test_norms_that_are_not_finite_are_an_error(patched):
    """NaN exceeds no limit: it would pass for an outlier that is gone."""
    images = list(photograph_crops()[:4])
    model = fresh("timm_clip")
    plant(model, torch.stack(images), num_neurons=4)
    model.blocks[3].register_forward_hook(
        lambda module, args, out: out * float("nan") if testreg.is_patched(model) is patched else None
    )
    with pytest.raises(ValueError, match="the norms of the tokens are not finite"):
        EffectMeter(model, find_tower(model), packed(images), Detection(RULE, 2), 2, batch_size=4).effect(
            [(2, 0, None)]
        )


@pytest.mark.parametrize("name", ["timm_clip", "hf_siglip", "open_clip_sequence_first"])
def test_effect_by_hand(name):
    """Every figure of an effect, computed with loops from the norms and features of the two models."""
    images = photograph_crops()[:10]
    model = fresh(name)
    planted = plant(model, images, num_neurons=4)
    tower = find_tower(model)
    neurons = [(block, unit, None) for block, unit in sorted(as_set(planted.neurons))[:2]]
    meter = EffectMeter(model, tower, packed(images), Detection(RULE, 2), 2, batch_size=3)
    effect = meter.effect(neurons)

    def norms_and_tokens():
        kept = []
        handle = tower.blocks[-1].module.register_forward_hook(lambda *args: kept.append(args[-1]))
        norms = token_norms(tower, images)[..., tower.num_prefix :]
        handle.remove()
        tokens = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        return norms, tower.batch_first(tokens).detach()

    before, tokens_before = norms_and_tokens()
    testreg.patch(model, testreg.RegisterNeurons(tuple(neurons)))
    after, tokens_after = norms_and_tokens()
    testreg.unpatch(model)
    limit, limit_after = RULE.limit(before), RULE.limit(after)
    left, kept = [0.0, 0.0], [0.0, 0.0]  # in front of the onset nothing is counted
    for block in (2, 3):
        outliers = before[block] > limit[block]
        now = (after[block] > limit[block].maximum(limit_after[block])).sum().item()
        left.append(now / max(outliers.sum().item(), 1e-3 * outliers.numel()))
        excess = excess_before = 0.0
        for i in range(10):
            median, median_after = before[block, i].median(), after[block, i].median()
            normal = median + 5 * 1.4826 * (before[block, i] - median).abs().median()
            normal_after = median_after + 5 * 1.4826 * (after[block, i] - median_after).abs().median()
            for n in outliers[i].nonzero().flatten().tolist():
                excess += max((after[block, i, n] / normal_after - 1).item(), 0)
                excess_before += max((before[block, i, n] / normal - 1).item(), 0)
        kept.append(excess / excess_before)
    share = (before[2] > limit[2]).float().mean().item()
    assert meter.outlier_fraction == pytest.approx(share)
    assert effect.neurons == 2
    assert effect.remaining == pytest.approx(max(left))
    assert effect.worst_block == left.index(max(left))
    assert effect.agreement is None  # without a head
    assert effect.excess == pytest.approx(max(kept), rel=1e-4)
    assert 0.1 < effect.excess < 0.9
    if tower.num_prefix:
        first, second = tokens_before[:, 0], tokens_after[:, 0]
        centre = first.mean(0)
        cosine = torch.cosine_similarity(first - centre, second - centre, dim=-1).mean().item()
        assert effect.change_pooled == pytest.approx(1 - cosine, abs=1e-5)
    assert 0 < effect.change_patches < 0.5
    assert not testreg.is_patched(model)


@pytest.mark.parametrize("num_registers", [1, 3])
@pytest.mark.parametrize("name", ["timm_clip", "hf_siglip", "open_clip_sequence_first"])
def test_attention_and_likeness_by_hand(name, num_registers):
    """The figures of maps, with loops, from the forward by hand with explicit registers."""
    images = photograph_crops()[:5]
    model = fresh(name)
    neurons = sorted(as_set(plant(model, images, num_neurons=4).neurons))[:2]
    tower = find_tower(model)
    meter = EffectMeter(model, tower, packed(images), Detection(RULE, 2), 2, batch_size=3)
    effect = meter.effect([(*neuron, None) for neuron in neurons], num_registers)
    norms = token_norms(tower, images)[..., tower.num_prefix :]
    former = (norms > RULE.limit(norms))[2:].any(0)  # (B, N)

    def by_hand(moved, num_registers):
        weights = []
        with torch.no_grad():
            outputs = forward_by_hand(name, model, images, moved, num_registers=num_registers, attentions=weights)
        patches = slice(tower.num_prefix, tower.num_prefix + former.shape[1])
        drawn = weights[3].mean((1, 2))[:, patches]  # of block 3, the only one behind the onset
        of_last = weights[3][:, :, 0] if tower.num_prefix else weights[3][:, :, patches].mean(2)
        row = of_last.mean(1)[:, patches]
        unlike = []
        for tokens in outputs[2:]:
            grid = tokens[:, patches].unflatten(1, meter.grid)
            distances = []
            for i, row_of, column in former.unflatten(1, meter.grid).nonzero().tolist():
                near = [(row_of + 1, column), (row_of - 1, column), (row_of, column + 1), (row_of, column - 1)]
                near = [(r, c) for r, c in near if 0 <= r < meter.grid[0] and 0 <= c < meter.grid[1]]
                cosines = [torch.cosine_similarity(grid[i, row_of, column], grid[i, r, c], dim=0) for r, c in near]
                distances.append(1 - sum(cosines) / len(near))
            unlike.append(sum(distances) / len(distances))
        hottest = row.amax(1) / row.sum(1)
        return drawn[former].mean() / drawn[~former].mean(), hottest, torch.stack(unlike)

    before, after = by_hand([], 0), by_hand(neurons, num_registers)
    figures = [meter.effect_of_nothing.sink, meter.effect_of_nothing.hottest]
    assert figures == pytest.approx([float(before[0]), float(before[1].mean())], rel=1e-4)
    assert (meter.effect_of_nothing.hotter, meter.effect_of_nothing.unlike) == (0, 1)
    assert [effect.sink, effect.hottest] == pytest.approx([float(after[0]), float(after[1].mean())], rel=1e-4)
    assert effect.hotter == pytest.approx(float((after[1] > 1.01 * before[1]).float().mean()))
    assert effect.unlike == pytest.approx(float((after[2] / before[2]).mean()), rel=1e-3)
    assert effect.num_registers == num_registers


def test_attention_that_cannot_be_seen_is_unknown():
    images = photograph_crops()[:4]
    model = fresh("timm_clip")
    plant(model, images, num_neurons=4)
    for block in model.blocks:
        block.attn.forward = hidden_attention(block.attn)
    effect = EffectMeter(model, find_tower(model), packed(images), Detection(RULE, 2), 2, batch_size=4).effect(
        [(2, 0, None)]
    )
    assert (effect.sink, effect.hottest, effect.hotter) == (None, None, None)
    assert effect.unlike == pytest.approx(1, abs=0.1)


def hidden_attention(attention):
    """The same without any function that tells attention."""

    def forward(x, **_):
        query, key, value = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query * attention.scale @ key.mT).exp()
        return attention.proj(((weights / weights.sum(-1, keepdim=True)) @ value).transpose(1, 2).flatten(2))

    return forward


def check(sink, hottest, before):
    effect = Effect(5, 0.0, 3, 0.0, 0.01, 0.01, None, 1, sink, hottest)
    return Verification((224, 224), "float32", (14, 14), 20, 0.05, effect, before)


@pytest.mark.parametrize(
    ("verification", "words"),
    [
        (check(None, None, None), []),
        (check(None, None, PlainAttention(None, None)), []),
        (check(0.6, 0.04, PlainAttention(24.0, 0.13)), []),
        (check(1.4, 0.14, PlainAttention(24.0, 0.13)), []),
        (check(2.0, 0.04, PlainAttention(24.0, 0.13)), ["still draw 2.0 times"]),
        (
            check(5.0, 0.388, PlainAttention(24.0, 0.099)),
            ["still draw 5.0 times", "hotter: the hottest patch draws 38.8% of the attention, 9.9% before"],
        ),
    ],
)
def test_what_is_wrong_with_maps(verification, words):
    said = what_is_wrong_with_maps(verification)
    assert len(said) == len(words)
    assert all(word in each for word, each in zip(words, said, strict=True))


def test_moving_nothing_that_matters_changes_nothing():
    images = list(photograph_crops()[:6])
    model = fresh("timm_clip")
    planted = plant(model, torch.stack(images), num_neurons=4)
    tower = find_tower(model)
    with torch.no_grad():
        tower.blocks[3].mlps[0].columns[:, 7] = 0
    meter = EffectMeter(model, tower, packed(images), Detection(RULE, 2), 2, batch_size=4)
    effect = meter.effect([(3, 7, None)])
    assert effect.remaining == pytest.approx(1, abs=0.02)
    assert effect.excess == pytest.approx(1, abs=0.01)
    everything = meter.effect([(2, unit, None) for unit in planted.neurons[2]])
    assert everything.remaining == 0
    assert everything.excess < 0.01


def test_a_part_measures_its_own_images():
    images, runs = list(photograph_crops()[:8]), []
    model = fresh("timm_clip")
    neurons = [(2, unit, None) for unit in plant(model, torch.stack(images), num_neurons=4).neurons[2]]
    whole = EffectMeter(model, find_tower(model), packed(images), Detection(RULE, 2), 2, batch_size=8)
    model.blocks[3].register_forward_hook(lambda module, args, out: runs.append(len(out)))
    half, _ = whole.split(4)
    half.effect(neurons)
    whole.effect(neurons)
    assert runs == [4, 8]


def test_the_given_head_is_asked():
    images = list(photograph_crops()[:8])
    model = fresh("timm_clip")
    plant(model, torch.stack(images), num_neurons=4)
    tower = find_tower(model)

    def head(model, images):
        """Class 0 for the plain model, and for a patched one class 1 of every image but the first."""
        model(images)
        scores = torch.zeros(len(images), 2)
        scores[1:, 1] = float(testreg.is_patched(model))
        return scores

    meter = EffectMeter(model, tower, packed(images), Detection(RULE, 2), 2, batch_size=4, head=head)
    assert meter.effect([(2, 0, None)]).agreement == pytest.approx(2 / 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_head_gets_images_as_the_model_takes_them(dtype):
    images = list(photograph_crops()[:4].double())
    model = fresh("timm_clip").to(dtype)
    meter = EffectMeter(model, find_tower(model), packed(images), Detection(RULE, 2), 2, batch_size=3, head=run)
    assert meter.effect([(2, 0, None)]).agreement == 1


def run(model, images):
    return model(images)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda model, images: torch.zeros(len(images), 2), r"the head ran 0 blocks of a tower of 4: it must run"),
        (lambda model, images: model(images) + model(images), r"the head ran 8 blocks of a tower of 4"),
        (lambda model, images: model(images)[0], r"must give scores \(4, classes\) for 4 images, got of shape \(10,\)"),
        (lambda model, images: (model(images),), r"must give scores \(4, classes\) for 4 images, got a tuple"),
    ],
)
def test_heads_that_are_none(head, message):
    images = list(photograph_crops()[:4])
    model = fresh("timm_clip")
    with pytest.raises(ValueError, match=message):
        EffectMeter(model, find_tower(model), packed(images), Detection(RULE, 2), 2, batch_size=4, head=head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_figures_under_autocast_are_those_of_its_norms(dtype):
    """The forward is what autocast makes of it; what is summed up afterwards is not rounded."""
    images = photograph_crops()[:10]
    model = fresh("timm_clip")
    neurons = [(2, unit, None) for unit in plant(model, images, num_neurons=4).neurons[2]]
    tower = find_tower(model)
    plain = EffectMeter(model, tower, packed(images), Detection(RULE, 2), 2, batch_size=10)
    with torch.autocast("cpu", dtype):
        meter = EffectMeter(model, tower, packed(images), Detection(RULE, 2), 2, batch_size=10)
        effect = meter.effect(neurons)
    assert meter.outlier_fraction == pytest.approx(plain.outlier_fraction, abs=0.01)
    assert meter.plain_sums["excess"][2].item() == pytest.approx(plain.plain_sums["excess"][2].item(), rel=0.1)
    assert effect.remaining == 0
    assert effect.excess < 0.01
