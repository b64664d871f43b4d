"""The recipes of the docs run as a user runs them, on tiny models that the libraries load from a folder."""

from __future__ import annotations

import importlib.util
import json
import threading
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from reference import build as build_reference
from reference import forward_by_hand
from safetensors.torch import save_file
from tiny import HF, HF_TEXT, IMAGE, TIMM, TIMM_RECORDS, WIDTH
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

import testreg

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
NEURONS = {1: [3, 77, 150], 2: [0, 64, 191]}
GRID = (4, 4)
records = pytest.mark.skipif(not TIMM_RECORDS, reason="an older timm does not record what `save` needs")


def recipe(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_recipe_has_a_test() -> None:
    tested = Path(__file__).read_text()
    assert [path.stem for path in RECIPES.glob("*.py") if f'recipe("{path.stem}")' not in tested] == []


@pytest.fixture
def neurons(tmp_path: Path) -> str:
    testreg.RegisterNeurons.from_blocks(NEURONS).save(tmp_path / "neurons.json")
    return str(tmp_path / "neurons.json")


@pytest.fixture
def photo(photos: Tensor, tmp_path: Path) -> str:
    tv.to_pil_image((photos[3] + 1) / 2).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def classes(photos: Tensor, tmp_path: Path) -> Path:
    """Six photographs in two folders: flat colours added, so that they can be told apart."""
    for i, image in enumerate(photos[:6]):
        folder = tmp_path / "classes" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        tv.to_pil_image(image / 4 + 0.5 * (i % 2) + 0.25).save(folder / f"{i}.png")
    return tmp_path / "classes"


def of_timm(folder: Path, name: str = "vit_base_patch16_224", **options: Any) -> str:
    torch.manual_seed(0)
    overlay = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, IMAGE, IMAGE), "crop_pct": 1.0}
    model = timm.create_model(name, pretrained_cfg_overlay=overlay, **TIMM, **options).eval()
    testreg.save(testreg.patch(model, NEURONS), folder / "timm")
    return f"local-dir:{folder / 'timm'}"


def of_open_clip(folder: Path) -> str:
    """With the vocabulary of open_clip's own tokenizer."""
    torch.manual_seed(0)
    vision = {"image_size": IMAGE, "patch_size": 16, "width": WIDTH, "layers": 4, "head_width": 12}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 4, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.model.CLIP(**config)  # type: ignore[arg-type]
    (folder / "clip").mkdir()
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()},
        folder / "clip" / "open_clip_model.safetensors",
    )
    preprocess = {"size": [IMAGE, IMAGE], "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    return f"local-dir:{folder / 'clip'}"


def of_transformers(folder: Path, model: nn.Module, processor: Any) -> str:
    model.save_pretrained(folder / "hf")  # type: ignore[operator]
    processor.save_pretrained(folder / "hf")
    return str(folder / "hf")


def image_processor(kind: str = "CLIPImageProcessor") -> Any:
    sizes: dict[str, Any] = {"crop_size": {"height": IMAGE, "width": IMAGE}} if kind.startswith("CLIP") else {}
    size = {"shortest_edge": IMAGE} if sizes else {"height": IMAGE, "width": IMAGE}
    return getattr(transformers, kind)(size=size, **sizes)


def tokenizer() -> Any:
    """A word is one token of a few."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 3, "<unk>": 4, "a": 5, "photo": 6, "of": 7}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    inputs = ["input_ids", "attention_mask"]  # older releases add types of tokens, which CLIP and Llama do not take
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **special, model_max_length=16, model_input_names=inputs
    )
    found.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return found


def clip(folder: Path) -> str:
    torch.manual_seed(0)
    vision, text = transformers.CLIPVisionConfig(**HF), transformers.CLIPTextConfig(**HF_TEXT, eos_token_id=2)
    config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=32)
    processor = transformers.CLIPProcessor(image_processor(), tokenizer())
    return of_transformers(folder, transformers.CLIPModel(config).eval(), processor)


@records
def test_segmentation_with_dinov2(photos: Tensor, neurons: str, tmp_path: Path) -> None:
    """A head tells patches that were painted over."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i, image in enumerate(photos[:6]):
        mask = torch.zeros(1, IMAGE, IMAGE, dtype=torch.uint8)
        mask[:, 16 * (i % 3) : 16 * (i % 3) + 32, :32] = 1
        tv.to_pil_image(torch.where(mask.bool(), 1.0, (image + 1) / 4)).save(tmp_path / "images" / f"{i}.png")
        tv.to_pil_image(mask).save(tmp_path / "masks" / f"{i}.png")
    name = of_timm(tmp_path, "vit_base_patch14_dinov2")
    accuracy = recipe("dinov2_segmentation").main(name, str(tmp_path / "images"), str(tmp_path / "masks"), neurons)
    assert accuracy > 0.95


def test_clip_of_transformers(photo: str, neurons: str, tmp_path: Path) -> None:
    scores, attention = recipe("clip_transformers").main(clip(tmp_path), photo, neurons)
    assert scores.sum().isclose(torch.tensor(1.0))
    assert attention.shape == GRID


@torch.no_grad()
def test_clip_in_8_bits(classes: Path, neurons: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao", minversion="0.17")  # static scales with weights by channel; needs torch 2.11
    torch.manual_seed(0)
    module, model = recipe("int8_clip"), transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF))
    name = of_transformers(tmp_path, model.eval(), image_processor())
    quantised, exact = module.main(name, str(classes / "a"), neurons)
    assert nn.functional.cosine_similarity(quantised, exact).min() > 0.999
    assert not quantised.equal(exact)

    testreg.patch(model, NEURONS, num_registers=3, start="mean")
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))
    tower = model.vision_model
    entered = []  # what the linears of block 1 read, without registers
    handle = tower.encoder.layers[1].layer_norm1.register_forward_hook(lambda *seen: entered.append(seen[-1]))
    with testreg.hooks_without_registers(model):
        model(pixels)
    handle.remove()
    module.keep_registers_apart(model, pixels)
    module.quantise(model, pixels)
    parts = [each for each in tower.encoder.modules() if isinstance(each, module.RegistersInFloat)]
    assert len(parts) == 6 * (len(tower.encoder.layers) - 1)  # registers enter block 1
    scale = tower.encoder.layers[1].self_attn.q_proj.linear.weight.act_quant_scale.item()
    assert scale * 127 == entered[0].abs().max()
    testreg.unpatch(model)
    for part in parts:
        tokens, registers = torch.randn(2, 9, part.linear.in_features), torch.randn(2, 3, part.linear.in_features)
        small, large = (part(torch.cat([tokens, size * registers], 1)) for size in (1e-3, 1e3))
        assert small[:, :9].equal(large[:, :9])  # registers set no scale
        expected = nn.functional.linear(1e-3 * registers, part.linear.weight.dequantize(), part.linear.bias)
        torch.testing.assert_close(small[:, 9:], expected)  # which the tokens' scale would round to 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_clip_for_onnxruntime_in_8_bits(neurons: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    import onnx

    torch.manual_seed(0)
    module, model = recipe("int8_onnx"), transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF))
    name = of_transformers(tmp_path, model.eval(), image_processor())
    module.main(name, str(tmp_path / "clip.onnx"), neurons)
    types = [node.op_type for node in onnx.load(tmp_path / "clip.onnx").graph.node]
    assert types.count("MatMulInteger") >= 2 * 6 * len(model.vision_model.encoder.layers)  # tokens, and registers
    testreg.patch(model, neurons)
    session = runtime.InferenceSession(tmp_path / "clip.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 3):
        pixels = torch.randn(size, 3, IMAGE, IMAGE)
        (actual,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
        assert nn.functional.cosine_similarity(torch.from_numpy(actual), model(pixels).image_embeds).min() > 0.99


def test_clip_of_open_clip(photo: str, neurons: str, tmp_path: Path) -> None:
    scores, attention = recipe("clip_open_clip").main(of_open_clip(tmp_path), photo, neurons)
    assert scores.sum().isclose(torch.tensor(1.0))
    assert attention.shape == GRID


def test_open_vocabulary(photo: str, neurons: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = recipe("open_vocabulary").main(of_open_clip(tmp_path), photo, neurons)
    assert classes.shape == GRID
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("to_register", [False, True])
@pytest.mark.parametrize("method", ["sclip", "naclip", "clearclip"])
@torch.no_grad()
def test_open_vocabulary_sees_the_tokens_that_the_method_gives(method: Any, to_register: bool) -> None:
    """Against the blocks by hand, with the register among the keys if it is asked for."""
    module, model = recipe("open_vocabulary"), build_reference("open_clip").double()
    images = torch.randn(2, 3, IMAGE, IMAGE, dtype=torch.float64)
    texts = torch.randn(5, 32, dtype=torch.float64)
    plain = module.segment(model, images, texts, method)
    ranking = [(block, unit) for block, units in NEURONS.items() for unit in units]
    x = forward_by_hand("open_clip", model, images, ranking)[2]
    testreg.patch(model, NEURONS)
    with testreg.registers(model) as held:
        model.encode_image(images)
    found = module.segment(model, images, texts, method, to_register)
    x = module.last_block(model.visual.transformer.resblocks[-1], x, method, GRID, held[2] if to_register else None)
    patches = nn.functional.normalize(model.visual.ln_post(x[:, 1:]) @ model.visual.proj, dim=-1)
    expected = torch.einsum("bnd,cd->bcn", patches, nn.functional.normalize(texts, dim=-1))
    torch.testing.assert_close(found, expected.unflatten(-1, GRID))
    assert not found.allclose(plain, atol=1e-4)
    if to_register:
        assert not found.allclose(module.segment(model, images, texts, method), atol=1e-6)


@torch.no_grad()
def test_the_last_block_by_hand_is_the_libraries_own_where_attention_is_the_usual() -> None:
    """Its projections and heads are read rightly: with queries in the place of keys, SCLIP is the block itself."""
    module, block = recipe("open_vocabulary"), build_reference("open_clip").double().visual.transformer.resblocks[-1]
    width = block.attn.in_proj_weight.shape[1]
    for weight in (block.attn.in_proj_weight, block.attn.in_proj_bias):
        weight[width : 2 * width] = weight[:width]  # keys are queries: both halves of SCLIP are the same
    x = torch.randn(2, 17, WIDTH, dtype=torch.float64)
    doubled = module.last_block(block, x, "sclip", GRID, None)
    block.attn.out_proj.weight *= 2
    torch.testing.assert_close(doubled, block(x), rtol=1e-6, atol=1e-6)


def test_llava_maps(photo: str, neurons: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**{**HF_TEXT, "max_position_embeddings": 64}, num_key_value_heads=4)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**HF).to_dict(), text_config=text.to_dict(), image_token_index=3
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    processor = transformers.LlavaProcessor(
        image_processor(),
        tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    name, file = of_transformers(tmp_path, model, processor), tmp_path / "llava.png"
    found = recipe("llava_maps").main(name, photo, "what is it", neurons, str(file))
    assert found.shape == GRID
    assert Image.open(file).width > 300


@records
def test_fine_tuning_in_timm(classes: Path, neurons: str, tmp_path: Path) -> None:
    losses = recipe("timm_finetune").main(of_timm(tmp_path), str(classes), str(tmp_path / "out"), neurons, epochs=6)
    assert losses[-1] < 0.7 * losses[0]
    assert testreg.is_patched(testreg.load(tmp_path / "out"))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_lora(classes: Path, neurons: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=3)).eval()
    name = of_transformers(tmp_path, model, image_processor("ViTImageProcessor"))
    losses = recipe("lora").main(name, str(classes), str(tmp_path / "out"), neurons)
    assert losses[-1] < 0.7 * losses[0]
    merged = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    testreg.patch(merged, NEURONS)


@pytest.mark.slow
@records
def test_feature_server(photo: str, neurons: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    module, name = recipe("feature_server"), of_timm(tmp_path)
    server = module.serve(module.Features(name, neurons, backend="eager"), port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://localhost:{server.server_port}"
        with urllib.request.urlopen(url, Path(photo).read_bytes()) as answer:
            found = json.loads(answer.read())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    model = testreg.patch(timm.create_model(name, pretrained=True).eval(), NEURONS)
    expected = testreg.features(model, photo, norm=True)[0]
    assert found["shape"] == list(expected.shape)
    torch.testing.assert_close(torch.tensor(found["features"]).view(expected.shape), expected, rtol=1e-4, atol=1e-5)


@records
def test_features_of_a_folder(classes: Path, neurons: str, tmp_path: Path) -> None:
    module, name = recipe("folder_features"), of_timm(tmp_path)
    photo = classes / "b" / "3.png"
    found = module.main(f"timm:{name}", str(classes), str(photo), neurons, str(tmp_path / "f.safetensors"))
    assert (len(found), found[0]) == (5, (pytest.approx(1, abs=1e-5), "b/3.png"))
    assert [like.partition("/")[0] for _, like in found[:3]] == ["b"] * 3  # which are much brighter than the others
    model = testreg.patch(timm.create_model(name, pretrained=True).eval(), NEURONS)
    pooled = [testreg.features(model, classes / each, norm=True).mean((2, 3)) for each in ("b/3.png", found[1][1])]
    assert found[1][0] == pytest.approx(float(torch.cosine_similarity(*pooled)), abs=1e-4)


def test_clip_of_sentence_transformers(photo: str, neurons: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    library.SentenceTransformer(modules=[modules.CLIPModel(clip(tmp_path))], device="cpu").save(str(tmp_path / "st"))
    module = recipe("sentence_transformers_clip")
    scores = module.main(str(tmp_path / "st"), photo, neurons)
    assert scores.shape == (2,)
    plain = library.SentenceTransformer(str(tmp_path / "st"), device="cpu")
    encoded = plain.encode(Image.open(photo)), plain.encode(list(module.TEXTS))
    assert not plain.similarity(*encoded)[0].allclose(scores, atol=1e-5)


@records
def test_tools_that_hook_inside_the_blocks(tmp_path: Path, photo: str, neurons: str) -> None:
    pytest.importorskip("pytorch_grad_cam")
    fused = timm.layers.use_fused_attn()
    try:
        assert recipe("hooked_tools").main(of_timm(tmp_path), photo, neurons).shape == (1, IMAGE, IMAGE)
    finally:
        timm.layers.set_fused_attn(bool(fused))
