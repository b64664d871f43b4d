"""What README and docs show runs as it stands, on tiny stand-ins of the models that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from tiny import HF, HF_TEXT, IMAGE, NEURONS, TIMM, build
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

import testreg
from testreg import RegisterNeurons
from testreg.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
MAX_WORDS = 1000
AUTO = ("AutoModel", "AutoProcessor", "AutoModelForImageTextToText")


def code(text: str, heading: str, language: str = "python") -> list[str]:
    """The blocks of code behind a heading, up to the next."""
    assert text.count(f"\n{heading}\n") == 1
    section = re.split(r"^## ", text.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_it_is_short() -> None:
    assert len(README.split()) <= MAX_WORDS


def test_its_links_work_elsewhere() -> None:
    """PyPI shows it too, where nothing is beside it."""
    links = re.findall(r"\]\(([^)]*)\)", README)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_ci_runs_its_tests_and_the_slow_ones_that_they_leave_out() -> None:
    (command,) = re.findall(r"^pip install .*\[dev\].*pytest.*$", README, re.MULTILINE)
    assert "-m" not in command
    assert "pytest -m slow" in README
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^eval (.*)$", run, re.MULTILINE) == ['"$command"', '"$tests -m slow"']


def files_of(pages: str | list[Any] | dict[str, Any]) -> list[str]:
    """The files of mkdocs' navigation, those of its sections included."""
    if isinstance(pages, str):
        return [pages]
    return [file for each in (pages.values() if isinstance(pages, dict) else pages) for file in files_of(each)]


def test_its_links_into_the_docs_lead_somewhere() -> None:
    names = set(files_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    for page, anchor in re.findall(r"testreg\.github\.io/testreg/(\w[\w-]*)/(?:#([\w-]+))?", README):
        assert f"{page}.md" in names
        if page in DOCS and anchor:
            headings = re.findall(r"^#+ (.*)$", DOCS[page], re.MULTILINE)
            anchors = [re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
            assert anchor in anchors


def timm_stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    overlay = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, IMAGE, IMAGE), "crop_pct": 1.0}
    model = timm.create_model("vit_base_patch16_clip_224", pretrained_cfg_overlay=overlay, **TIMM)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)


def clip_stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    vision, text = transformers.CLIPVisionConfig(**HF), transformers.CLIPTextConfig(**HF_TEXT, eos_token_id=2)
    config = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=32)
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    size = {"shortest_edge": IMAGE}
    transformers.CLIPImageProcessor(size=size, crop_size={"height": IMAGE, "width": IMAGE}).save_pretrained(
        folder / "clip"
    )
    load = transformers.AutoModel.from_pretrained
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda name: load(folder / "clip"))


def open_clip_stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    model = build("open_clip").train()
    made = model, open_clip.image_transform(IMAGE, is_train=False)
    monkeypatch.setattr(open_clip, "create_model_from_pretrained", lambda name, weights: made)


def llava_stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    text = transformers.LlamaConfig(**{**HF_TEXT, "max_position_embeddings": 64}, num_key_value_heads=4)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**HF).to_dict(), text_config=text.to_dict(), image_token_index=3
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()

    def process(images: Image.Image, text: str, return_tensors: str) -> dict[str, Tensor]:
        pixels = tv.to_dtype(tv.pil_to_tensor(images), torch.float32, scale=True)[None]
        return {"input_ids": torch.tensor([[1, *[3] * 16, 5, 6]]), "pixel_values": pixels}

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: process)


EXAMPLES: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], None], str | None, tuple[int, ...]]] = {
    "timm": (timm_stand_in, "timm:vit_large_patch14_dinov2.lvd142m", (1, 4, 4, 4)),
    "open_clip": (open_clip_stand_in, "open_clip:ViT-B-16/laion2b_s34b_b88k", ()),
    "llava": (llava_stand_in, None, (1, 4, 4)),
}


@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=list(EXAMPLES))
def test_from_a_model_to_a_map(number: int, tmp_path: Path, photos: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in, checkpoint, shape = list(EXAMPLES.values())[number]
    lines = code(README, "## From a model to a map")[number]
    assert len(lines.splitlines()) == 3
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    photo = tv.to_pil_image((photos[3] + 1) / 2)
    photo.save("photo.jpg")
    stand_in(monkeypatch, tmp_path)
    asked: list[Any] = []

    def resolve(neurons: Any, model: nn.Module) -> RegisterNeurons:
        asked.append(neurons)
        return RegisterNeurons.from_blocks(NEURONS)

    monkeypatch.setattr("testreg.register.resolve", resolve)
    names = {"testreg": testreg, "timm": timm, "open_clip": open_clip, "NAME": "", "photo": photo, "prompt": ""}
    values: dict[str, Any] = {**names, **{each: getattr(transformers, each) for each in AUTO}}
    exec(lines, values)
    assert testreg.is_patched(values["model"])
    if shape:
        assert values["maps" if "maps" in values else "dense"].shape == shape
    default = [name for name, each in testreg.bundled().items() if checkpoint in each.model.get("default_for", ())]
    if checkpoint is not None:
        assert asked[0] in (None, *default), "the neurons that are named are those of the checkpoint"
        assert default


def test_the_script_runs_as_it_stands(
    tmp_path: Path, photos: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has its imports, and names a model whose default is bundled and verified."""
    (script,) = code(README, "## A map of CLIP")
    assert len(script.splitlines()) <= 11
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    tv.to_pil_image((photos[3] + 1) / 2).save("photo.jpg")
    clip_stand_in(monkeypatch, tmp_path)
    asked: list[Any] = []

    def resolve(neurons: Any, model: nn.Module) -> RegisterNeurons:
        asked.append(neurons)
        return RegisterNeurons.from_blocks(NEURONS)

    monkeypatch.setattr("testreg.register.resolve", resolve)
    values: dict[str, Any] = {}
    exec(script, values)
    assert asked == [None]
    assert values["maps"].shape == (1, 4, 4, 4)
    assert values["dense"].shape == (1, HF["hidden_size"], 4, 4)
    assert 1 / 16 <= float(capsys.readouterr().out.split()[-1]) <= 1
    assert Path("before-after.png").stat().st_size > 10_000
    assert not testreg.is_patched(values["model"])
    name = re.search(r'from_pretrained\("(.*?)"\)', script)
    assert name is not None
    (default,) = (each for each in testreg.bundled().values() if f"hf:{name[1]}" in each.model["default_for"])
    assert default.verified


def test_a_family_of_your_own() -> None:
    (lines,) = code(DOCS["covered"], "## A family of your own")
    known, names = list(FAMILIES), dict[str, Any]()
    try:
        exec(lines, names)
    finally:
        FAMILIES[:] = known
    assert testreg.is_patched(names["model"])
    assert names["features"].shape == (2, 197, 64)


def test_the_neuron_json_of_the_docs_is_one() -> None:
    (text,) = code(DOCS["calibration"], "## The neuron JSON", "json")
    data = json.loads(text)
    data["top_k"] = 2  # the list is shortened, and so are these
    data["calibration"].update(curve=[], registers=[], rounds=[])
    assert RegisterNeurons.from_json(data).by_block() == {7: [2745], 8: [1620]}


def test_every_recipe_is_in_the_docs() -> None:
    recipes = {path.name for path in (ROOT / "docs" / "recipes").glob("*.py")}
    assert recipes == set(re.findall(r'--8<-- "recipes/(.*?)"', DOCS["recipes"]))


def test_every_public_name_is_in_the_reference() -> None:
    documented = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", DOCS["api"], re.MULTILINE)}
    assert documented == set(testreg.__all__)
