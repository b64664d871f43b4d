"""Maps of attention and features, against a softmax that is written out in float64 and the blocks by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from coverage.registry import registry
from reference import LAYOUTS, attend, block_outputs, build, forward_by_hand, layer_norm
from tiny import IMAGE, PATCH, TIMM, WIDTH, fresh
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

import testreg
from testreg.families import find_tower

RANKING = ((1, 3), (2, 127), (1, 120), (2, 0), (0, 5), (3, 9))
NEURONS = testreg.RegisterNeurons(tuple((block, unit, None) for block, unit in RANKING))
GRID = (IMAGE // PATCH,) * 2
all_families = pytest.mark.parametrize("family", LAYOUTS)


def images(height: int = IMAGE, width: int = IMAGE) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def mapped(weights: Tensor, prefix: int, query: str, grid: tuple[int, int] = GRID) -> Tensor:
    """Weights (B, heads, T, T) -> (B, heads, h, w)."""
    patches = slice(prefix, prefix + grid[0] * grid[1])
    row = weights[:, :, 0] if query == "cls" else weights[:, :, patches].mean(2)
    return row[..., patches].unflatten(-1, grid)


@pytest.mark.parametrize("registers", [0, 2])
@all_families
@torch.no_grad()
def test_attention_and_features_are_those_by_hand(family: str, registers: int) -> None:
    model, layout = build(family).double(), LAYOUTS[family]
    queries = ["cls", "mean"] if layout.prefix else ["mean"]
    weights: list[Tensor] = []
    if registers:
        tokens = forward_by_hand(family, model, images(), RANKING, num_registers=registers, attentions=weights)
        testreg.patch(model, NEURONS, num_registers=registers)
    elif layout.rope is None:
        tokens = block_outputs(family, model, images())
        entering = [tokens.entry, *tokens[:-1]]
        for module, x in zip(layout.blocks(model), entering, strict=True):
            block = layout.read(module)
            weights.append(attend(layer_norm(x, block.norm1), block)[1])
    else:
        pytest.skip("rotations are written out with registers alone")
    for block in (2, -1):
        for query in queries:
            found = testreg.attention(model, images(), block, query=query)  # type: ignore[arg-type]
            torch.testing.assert_close(found, mapped(weights[block], layout.prefix, query))
        patches = tokens[block][:, layout.prefix :]
        torch.testing.assert_close(testreg.features(model, images(), block), patches.mT.unflatten(-1, GRID))
    if layout.prefix:
        found = testreg.attention(model, images())
        torch.testing.assert_close(found, mapped(weights[-1], layout.prefix, "cls"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


MASKS = torch.zeros(2, *GRID, dtype=torch.bool)
MASKS[0, 1, 2:], MASKS[1, 3, 0] = True, True


@pytest.mark.parametrize("family", ["timm_dinov2_reg4", "open_clip_sequence_first", "hf_siglip"])
@torch.no_grad()
def test_attention_of_and_to_registers_of_patches_and_rolled_out(family: str) -> None:
    """Against the weights (B, heads, T, T) by hand, of CLS, trained registers, patches and two registers."""
    model, prefix = build(family).double(), LAYOUTS[family].prefix
    weights: list[Tensor] = []
    forward_by_hand(family, model, images(), RANKING, num_registers=2, attentions=weights)
    testreg.patch(model, NEURONS, num_registers=2)
    trained = find_tower(model).num_trained_registers
    registers = [*range(prefix - trained, prefix), prefix + 16, prefix + 17]
    patches = slice(prefix, prefix + 16)

    def expect(found: Tensor, rows: Tensor) -> None:
        torch.testing.assert_close(found, rows[..., patches].unflatten(-1, GRID))

    drawn = weights[2]
    expect(testreg.attention(model, images(), 2, query="register"), drawn[:, :, registers].mean(2))
    expect(testreg.attention(model, images(), 2, query=(1, 2)), drawn[:, :, prefix + 6])
    expect(testreg.attention(model, images(), 2, query=MASKS[0]), drawn[:, :, [prefix + 6, prefix + 7]].mean(2))
    of_each = torch.stack([drawn[0, :, [prefix + 6, prefix + 7]].mean(1), drawn[1, :, prefix + 12]])
    expect(testreg.attention(model, images(), 2, query=MASKS, batch_size=1), of_each)
    expect(testreg.attention(model, images(), 2, query=MASKS), of_each)
    found = testreg.attention(model, images(), 2, query="mean", to="registers")
    torch.testing.assert_close(found, drawn[:, :, patches].mean(2)[..., registers])
    own = testreg.attention(model, images(), 2, query="register", to="registers")
    torch.testing.assert_close(own, drawn[:, :, registers].mean(2)[..., registers])

    flow = torch.eye(drawn.shape[-1], dtype=torch.float64)
    for each in weights[:3]:
        flow = 0.5 * (each.mean(1) + torch.eye(drawn.shape[-1])) @ flow
    expect(testreg.attention(model, images(), 2, query=(1, 2), rollout=True), flow[:, None, prefix + 6])
    expect(testreg.attention(model, images(), 2, query="register", rollout=True), flow[:, None, registers].mean(2))
    expect(testreg.attention(model, images(), 2, query=MASKS, rollout=True)[1:], flow[1:, None, prefix + 12])
    default = flow[:, None, 0] if prefix else flow[:, None, patches].mean(2)
    expect(testreg.attention(model, images(), 2, rollout=True), default)


def test_attention_where_registers_enter_a_later_block() -> None:
    neurons, weights = {2: [3], 3: [5]}, list[Tensor]()
    model = build("timm_dinov2_reg4").double()
    forward_by_hand(
        "timm_dinov2_reg4", model, images(), [(2, 3), (3, 5)], num_registers=2, start="mean", attentions=weights
    )
    testreg.patch(model, neurons, num_registers=2, start="mean")
    assert [each.shape[-1] for each in weights] == [21, 21, 23, 23]
    to_registers = [weights[block][:, :, 0, [1, 2, 3, 4, *range(21, length)]] for block, length in ((1, 21), (2, 23))]
    for block, expected in zip((1, 2), to_registers, strict=True):
        torch.testing.assert_close(testreg.attention(model, images(), block, to="registers"), expected)
    flow = torch.eye(21, dtype=torch.float64)
    for each in weights[:2]:
        flow = 0.5 * (each.mean(1) + torch.eye(21)) @ flow
    flow = torch.cat([flow, *[flow[:, 5:].mean(1, keepdim=True)] * 2], 1)  # registers enter as the mean patch
    for each in weights[2:]:
        flow = 0.5 * (each.mean(1) + torch.eye(23)) @ flow
    for query, rows in (("cls", flow[:, 0]), ("register", flow[:, [1, 2, 3, 4, 21, 22]].mean(1))):
        found = testreg.attention(model, images(), query=query, rollout=True)
        torch.testing.assert_close(found, rows[:, 5:].unflatten(-1, GRID)[:, None])

    without_trained = testreg.patch(build("timm_vit"), neurons, start="mean")
    asked: list[dict[str, Any]] = [{"query": "register"}, {"to": "registers"}, {"query": "register", "rollout": True}]
    for options in asked:
        with pytest.raises(ValueError, match="registers enter block 2 of this model: there are none in block 1"):
            testreg.attention(without_trained, images().float(), 1, **options)


def test_queries_that_do_not_fit() -> None:
    model = build("timm_vit")
    plain: list[dict[str, Any]] = [{"query": "register"}, {"to": "registers"}, {"query": "register", "rollout": True}]
    for options in plain:
        with pytest.raises(ValueError, match="has no registers: call"):
            testreg.attention(model, images(), **options)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"query": (4, 0)}, "out of range: the images have 4 x 4 patches"),
        ({"query": torch.ones(3, 4, dtype=torch.bool)}, "a mask of patches is bool"),
        ({"query": torch.zeros(4, 4, dtype=torch.bool)}, "the mask has no patch"),
        ({"query": "registers"}, "query must be"),
        ({"to": "cls"}, "to must be"),
        ({"query": "pool", "rollout": True}, "is no token of a block"),
        ({"to": "registers", "rollout": True}, "leave to='registers' out"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            testreg.attention(model, images(), **options)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (40, 70)])
@torch.no_grad()
def test_images_that_are_not_square_or_are_padded(size: tuple[int, int], patched: bool) -> None:
    """timm pads 40 x 70 pixels to 48 x 80: 3 x 5 patches."""
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_base_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, **TIMM)
    model, grid = model.double().eval(), (-(-size[0] // PATCH), -(-size[1] // PATCH))
    if patched:
        testreg.patch(model, NEURONS)
    entered: list[Tensor] = []
    model.blocks[-1].attn.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    found = testreg.attention(model, images(*size))
    query, key, _ = model.blocks[-1].attn.qkv(entered[0]).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(found, mapped(weights, 1, "cls", grid))
    assert found.shape == (2, 4, *grid)
    assert testreg.features(model, images(*size)).shape == (2, WIDTH, *grid)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("family", ["hf_vit", "hf_clip", "hf_dinov3"])
def test_any_kernel_gives_the_same_maps_and_stays(family: str, kernel: str) -> None:
    model = testreg.patch(build(family), NEURONS)
    expected = testreg.attention(model, images().float(), 1)
    model.set_attn_implementation(kernel)
    torch.testing.assert_close(testreg.attention(model, images().float(), 1), expected)
    assert model.config._attn_implementation == kernel


def test_unfused_attention_of_timm_and_open_clip() -> None:
    model: Any = testreg.patch(build("timm_vit"), NEURONS)
    expected = testreg.attention(model, images())
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(testreg.attention(model, images()), expected)


@pytest.mark.parametrize("family", ["timm_siglip", "hf_siglip"])
@torch.no_grad()
def test_the_pooling_query_of_siglip(family: str) -> None:
    """Against the weights of nn.MultiheadAttention, or written out from what enters timm's pooling."""
    model: Any = testreg.patch(build(family), NEURONS).double()
    if family == "hf_siglip":
        head = model.head if hasattr(model, "head") else model.vision_model.head
        kept: list[Any] = []
        head.attention.register_forward_pre_hook(lambda module, args: kept.append(args))
        found = testreg.attention(model, images())
        expected = head.attention(*kept[-1], average_attn_weights=False)[1][:, :, 0]
    else:
        pool, entered = model.attn_pool, []
        pool.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        found = testreg.attention(model, images())
        query = pool.q(pool.latent).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        key = pool.kv(entered[-1][-2:]).unflatten(-1, (2, pool.num_heads, -1))[:, :, 0].transpose(1, 2)
        query, key = pool.q_norm(query), pool.k_norm(key)
        expected = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0]
    torch.testing.assert_close(found, expected.unflatten(-1, GRID))
    torch.testing.assert_close(found, testreg.attention(model, images(), query="pool"))
    assert found.sum((-2, -1)).allclose(torch.ones(2, found.shape[1]).double())
    assert not found.allclose(testreg.attention(model, images(), query="mean"))


OTHERS = (
    *("radio", "vit_base_r26_s32_224", "vit_srelpos_small_patch16_224", "naflexvit_base_patch16_gap"),
    *("BeitModel [shared bias]", "Sapiens2Model", "Siglip2VisionModel", "Aimv2VisionModel", "BridgeTowerModel"),
    *("Idefics3ForConditionalGeneration", "clip ViT-B/32", "dino_vits16"),
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_give_each_image_its_own_maps(name: str) -> None:
    model = next(each.build() for (_, known), each in registry().items() if known == name)
    tower = find_tower(model)
    made_for = getattr(getattr(tower.module, "patch_embed", None), "img_size", None)  # timm takes no other
    size = made_for or [4 * edge for edge in tower.patch_size]
    both = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    before = testreg.features(model, both)
    testreg.patch(model, {0: [1], 1: [2]})
    for each in (testreg.attention, testreg.features):
        found = each(model, both)
        assert found.shape[-2:] == tower.grid(both)
        alone = torch.cat([each(model, both[:1]), each(model, both[1:])])
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-4)
    assert testreg.features(model, both).shape == before.shape
    weights = testreg.attention(model, both, query="mean")
    assert (weights > 0).all()
    assert (weights.sum((-2, -1)) < 1).all()  # the register has its share


@torch.no_grad()
def test_packed_images_are_measured_one_by_one() -> None:
    if not hasattr(transformers, "RadioConfig"):
        pytest.skip("an older transformers has no Radio")
    config = transformers.RadioConfig(
        hidden_size=48, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=16
    )
    torch.manual_seed(0)
    model = testreg.patch(transformers.RadioModel(config).eval(), {1: [3], 2: [7]})
    both = images().float()
    for each in (testreg.attention, testreg.features):
        torch.testing.assert_close(each(model, both), torch.cat([each(model, both[:1]), each(model, both[1:])]))
    assert testreg.attention(model, both).shape == (2, 4, 4, 4)


@torch.no_grad()
def test_the_final_norm_is_the_libraries_own() -> None:
    x = images().float()
    for family, normed in (
        ("timm_vit", lambda model: model.forward_features(x)[:, 1:]),
        ("hf_dinov2", lambda model: model(x).last_hidden_state[:, 1:]),
        ("dinov2", lambda model: model.forward_features(x)["x_norm_patchtokens"]),
        ("torchvision_vit", lambda model: None),
        ("hf_clip", lambda model: None),
    ):
        model = testreg.patch(build(family), NEURONS)
        found = testreg.features(model, x, norm=True)
        if (expected := normed(model)) is not None:
            torch.testing.assert_close(found, expected.mT.unflatten(-1, GRID))
        assert not found.allclose(testreg.features(model, x))
    model = timm.create_model("vit_base_patch16_224", final_norm=False, **TIMM).eval()
    with pytest.raises(ValueError, match="has no norm behind its last block: pass norm=False"):
        testreg.features(model, x, norm=True)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i, image in enumerate(images(80, 72).float()):
        tv.to_pil_image(image.sigmoid()).save(tmp_path / f"{'ba'[i]}.png")
    return tmp_path


def test_images_of_every_kind(pictures: Path) -> None:
    overlay = {"input_size": (3, IMAGE, IMAGE), "crop_pct": 1.0}
    model = timm.create_model("vit_base_patch16_224", pretrained_cfg_overlay=overlay, **TIMM).eval()
    paths = sorted(pictures.iterdir())  # in the order of their names
    expected = testreg.features(model, pictures)
    assert expected.shape == (2, WIDTH, *GRID)
    for source in (paths, list(map(str, paths)), [testreg.io.decoding.open_image(path) for path in paths]):
        assert testreg.features(model, source).equal(expected)
    for one in (paths[1], testreg.io.decoding.open_image(paths[1])):
        torch.testing.assert_close(testreg.features(model, one), expected[1:])
    assert not testreg.attention(model, paths).allclose(testreg.attention(model, paths[::-1]))


def test_bad_arguments(pictures: Path) -> None:
    model = build("timm_siglip")
    for arguments, message in (
        ({"block": 4}, "block=4 is out of range: the model has 4 blocks"),
        ({"query": "cls"}, "has no CLS token: pass query='pool' or query='mean'"),
        ({"query": "all"}, "query must be"),
        ({"query": "pool", "block": 1}, "looks at the last block's tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            testreg.attention(model, images(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected images \(B, 3, h, w\)"):
        testreg.features(model, images()[0])
    (pictures / "c.png").write_text("no image")
    with pytest.raises(ValueError, match="1 of the images could not be read"):
        testreg.features(model, pictures, transform=lambda image: tv.pil_to_tensor(image) / 255)
    qwen = transformers.Qwen2VLConfig().vision_config
    qwen.depth, qwen.embed_dim, qwen.num_heads, qwen.hidden_size = 2, 32, 4, 32
    tower = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(qwen)
    with pytest.raises(ValueError, match=r"takes no batch of images \(B, 3, h, w\)"):
        testreg.attention(tower, images().float(), query="mean")


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", ["timm_vit", "hf_vit"])
def test_overlapping_patches_are_laid_out_as_they_lie(family: str, patched: bool) -> None:
    """The stride of the embedding was made smaller, as for dense descriptors: 7 x 7 patches of 16 pixels."""
    model: Any = build(family)
    position = torch.randn(1, 50, WIDTH, generator=torch.Generator().manual_seed(1))
    if family == "timm_vit":
        model.patch_embed.proj.stride, model.pos_embed = (8, 8), torch.nn.Parameter(position)
    else:
        model.embeddings.patch_embeddings.projection.stride = (8, 8)
        model.embeddings.position_embeddings = torch.nn.Parameter(position)
    if patched:
        testreg.patch(model, NEURONS)
    batch, kept = images().float(), list[Tensor]()
    with find_tower(model).blocks[-1].module.register_forward_hook(lambda module, args, output: kept.append(output)):
        found = testreg.features(model, batch)
    assert found.shape == (2, WIDTH, 7, 7)
    torch.testing.assert_close(found.flatten(2).mT, kept[0][:, 1:])
    assert testreg.attention(model, batch).shape == (2, 4, 7, 7)


@pytest.mark.parametrize("patched", [False, True])
def test_tokens_that_are_no_grid_of_patches_are_refused(patched: bool) -> None:
    model: Any = build("timm_vit")
    if patched:
        testreg.patch(model, NEURONS)
    model.patch_embed.register_forward_hook(lambda module, args, output: torch.cat([output, output[:, :3]], 1))
    model.pos_embed = torch.nn.Parameter(torch.zeros(1, 20, WIDTH))
    batch = images().float()
    for measure in (testreg.features, testreg.attention, lambda model, batch: testreg.diagnose(model, list(batch))):
        with pytest.raises(ValueError, match=r"makes 40 tokens of 2 images .*says 34: 1 prefix tokens and a grid of 4"):
            measure(model, batch)


# strip_registers -----------------------------------------------------------------------------------------------------


def test_registers_are_stripped_by_hand() -> None:
    model = testreg.patch(build("timm_vit"), NEURONS, num_registers=2)
    tokens = torch.arange(2 * 5.0).view(2, 5, 1)
    assert testreg.strip_registers(model, tokens)[..., 0].tolist() == [[0, 1, 2], [5, 6, 7]]
    weights = torch.arange(16.0).view(1, 1, 4, 4)
    assert testreg.strip_registers(model, weights).tolist() == [[[[0, 1], [4, 5]]]]
    with testreg.disabled(model):
        assert testreg.strip_registers(model, tokens) is tokens
    for wrong in (tokens[0], weights[..., :3], weights[0, 0]):
        with pytest.raises(ValueError, match="expected tokens"):
            testreg.strip_registers(model, wrong)
    assert testreg.strip_registers(testreg.unpatch(model), tokens) is tokens


def test_registers_that_enter_a_later_block_are_stripped_there() -> None:
    model = testreg.patch(build("timm_vit"), {2: [3]}, start="mean")
    tokens = torch.arange(3.0).view(1, 3, 1)
    with pytest.raises(ValueError, match="enter block 2, and blocks in front of it have none: pass block="):
        testreg.strip_registers(model, tokens)
    for block, length in ((0, 3), (1, 3), (-3, 3), (2, 2), (-1, 2)):
        assert testreg.strip_registers(model, tokens, block=block).shape[1] == length
    with pytest.raises(ValueError, match="block=4 is out of range"):
        testreg.strip_registers(model, tokens, block=4)


def test_registers_of_a_sequence_first_tower_are_stripped_from_the_first_axis() -> None:
    model = testreg.patch(build("open_clip_sequence_first"), NEURONS)
    tokens = torch.arange(6.0).view(3, 2, 1)  # (T+R, B, C)
    assert testreg.strip_registers(model, tokens)[..., 0].tolist() == [[0, 1], [2, 3]]


def test_registers_of_packed_images_lie_behind_each() -> None:
    config = transformers.Qwen2VLConfig().vision_config
    config.depth, config.embed_dim, config.num_heads, config.hidden_size = 2, 32, 4, 32
    tower = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config)
    testreg.patch(tower, {0: [3]})
    tokens = torch.arange(7.0).view(7, 1)  # 2 and 3 tokens, a register behind each
    assert testreg.strip_registers(tower, tokens, [2, 3])[:, 0].tolist() == [0, 1, 3, 4, 5]
    with pytest.raises(ValueError, match="packs images in one sequence: pass lengths"):
        testreg.strip_registers(tower, tokens)
    with pytest.raises(ValueError, match="2 images of 6 tokens do not fit"):
        testreg.strip_registers(tower, tokens, [3, 3])


@pytest.mark.parametrize("family", ["timm_vit", "hf_clip", "open_clip_sequence_first"])
def test_a_hook_inside_a_block_sees_what_a_hook_behind_it_sees(family: str) -> None:
    model: Any = testreg.patch(build(family), NEURONS)
    block = find_tower(model).blocks[-1].module
    norm = (
        block.norm2 if hasattr(block, "norm2") else block.layer_norm2 if hasattr(block, "layer_norm2") else block.ln_2
    )
    inside: list[Tensor] = []
    with norm.register_forward_hook(lambda module, args, output: inside.append(output)):
        expected = testreg.features(model, images().float())
    stripped = testreg.strip_registers(model, inside[0])
    assert stripped.shape[find_tower(model).sequence_first ^ 1] == 17
    assert stripped.numel() == 2 * 17 * WIDTH
    assert expected.shape == (2, WIDTH, *GRID)


def test_what_a_block_gives_has_no_registers_to_strip(photos: Tensor) -> None:
    model, seen = fresh("timm_vit"), []
    hook = lambda module, args, output: seen.append(testreg.strip_registers(model, output).shape[1])
    with testreg.patched(model, {1: [3]}):
        handles = [model.blocks[1].register_forward_hook(hook), model.blocks[1].mlp.register_forward_hook(hook)]
        model(photos[:2])
    for handle in handles:
        handle.remove()
    assert seen == [17, 17]
