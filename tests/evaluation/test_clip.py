"""Zero-shot classification and typographic attacks, with tiny CLIPs of random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from scenes import RANDOM, Transform, labelled, tiny_model, write_image
from tiny import HF, HF_TEXT

from testreg.evaluation import typographic, zeroshot
from testreg.evaluation.clip import class_embeddings, encode_texts, names_of, tokenizer_of
from testreg.evaluation.labels import Labelled
from testreg.evaluation.preparing import Normalisation
from testreg.evaluation.samples import Sample
from testreg.evaluation.typographic import Attack, WithBox, as_kind, written_on
from testreg.io.loading import LoadedModel

OPTIONS: dict[str, Any] = {"progress": False, "resamples": 5}


def letters(texts: list[str]) -> torch.Tensor:
    """Texts as numbers of letters, the highest at the end, where CLIP reads them."""
    rows = [[*[ord(each) % 97 for each in text][:15], 98] for text in texts]
    return torch.tensor([row + [0] * (16 - len(row)) for row in rows])


def tiny_clip(name: str) -> LoadedModel:
    if name == "open_clip":
        return tiny_model("open_clip")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        vision_config=HF, text_config=HF_TEXT | {"eos_token_id": 98, "bos_token_id": 1}, projection_dim=32
    )
    return LoadedModel(transformers.CLIPModel(config).eval(), Transform(), name)


def reader_of(name: str) -> Any:
    return letters if name == "open_clip" else lambda texts: {"input_ids": letters(texts)}


@pytest.mark.parametrize("name", ["open_clip", "hf_clip"])
def test_images_are_classified_by_text(name: str, tmp_path: Path) -> None:
    result = zeroshot.evaluate(
        tiny_clip(name), labelled(tmp_path), neurons=RANDOM, templates="simple", tokenizer=reader_of(name), **OPTIONS
    )
    assert set(result.metrics["patched"]) == {"top1", "top5"}
    assert result.metrics["plain"]["top5"] == 1  # of two classes
    assert (result.protocol["images"], result.protocol["classes"]) == (8, 2)


@pytest.mark.parametrize("name", ["open_clip", "hf_clip"])
def test_embeddings_are_the_librarys(name: str) -> None:
    loaded = tiny_clip(name)
    model: Any = loaded.model
    texts = ["a cat", "a dog", "the cat", "the dog"]
    with torch.no_grad():
        found = encode_texts(model, reader_of(name), texts, torch.device("cpu"))
        if name == "open_clip":
            expected = model.encode_text(letters(texts), normalize=True)
        else:
            expected = model(input_ids=letters(texts), pixel_values=torch.zeros(1, 3, 64, 64)).text_embeds
    assert torch.allclose(found, expected, atol=1e-6)
    means = class_embeddings(
        model, reader_of(name), ["cat", "dog"], [lambda c: f"a {c}", lambda c: f"the {c}"], torch.device("cpu")
    )
    mean = (expected[0] + expected[2]) / 2
    assert torch.allclose(means[0], mean / mean.norm(), atol=1e-6)


def test_a_model_without_texts_is_refused(tmp_path: Path) -> None:
    for task in (zeroshot, typographic):
        with pytest.raises(ValueError, match="encodes no texts: this needs a whole CLIP"):
            task.evaluate(tiny_model(), labelled(tmp_path / task.__name__), **OPTIONS)
    with pytest.raises(ValueError, match="its tokenizer is not known: pass tokenizer="):
        tokenizer_of("CLIP")


def test_names_of_classes() -> None:
    assert names_of(Labelled({"": [Sample("", Path(), 1)]}, ["cat", "polar_bear"]), None) == ["cat", "polar bear"]
    assert names_of(Labelled({"": []}, None), "imagenet") == list(open_clip.IMAGENET_CLASSNAMES)
    synsets = [f"n{i:08}" for i in range(1000)]
    assert names_of(Labelled({"": []}, synsets), None)[0] == "tench"


def test_a_tokenizer_by_name() -> None:
    tokens = tokenizer_of("open_clip:ViT-B-32/openai")(["a photo of a cat"])
    assert tokens.shape == (1, 77)


def test_words_are_written_where_the_box_is() -> None:
    grey = Image.new("RGB", (224, 224), (128, 128, 128))
    for seed in range(5):
        image, (left, top, right, bottom) = written_on(grey, "polar bear", seed)
        changed = np.asarray(image) != 128
        rows, columns = np.nonzero(changed.any(-1))
        assert left <= columns.min() <= left + 2
        assert right - 2 <= columns.max() + 1 <= right
        assert top <= rows.min()
        assert rows.max() < bottom
        assert image.size == grey.size
    assert written_on(grey, "a", 0)[1] == written_on(grey, "a", 0)[1] != written_on(grey, "a", 1)[1]
    _, (left, top, right, bottom) = written_on(Image.new("RGB", (64, 64)), "a very long name of a class", 0)
    assert 0 <= left < right <= 64
    assert 0 <= top < bottom <= 64


def test_the_word_can_be_painted_over_and_found(tmp_path: Path) -> None:
    sample = Sample("0", write_image(tmp_path / "0.png", 0), Attack(0, 1, "dog", 3))
    clean, attacked, painted = (
        np.asarray(as_kind(sample, kind, 64).open()) for kind in ("clean", "attacked", "painted")
    )
    boxed = np.asarray(as_kind(sample, "boxed", 64).open())
    word = boxed[..., 3] == 0
    assert (boxed[..., :3] == attacked).all()
    assert (clean != attacked).any(-1)[~word].sum() == 0
    assert len({tuple(each) for each in painted[word]}) == 1
    assert len({as_kind(sample, kind, 64).name for kind in ("clean", "attacked", "painted", "boxed")}) == 4
    made = WithBox(Normalisation((0.0,) * 3, (1.0,) * 3), 64)(as_kind(sample, "boxed", 64).open())
    assert (made[3] == 1).numpy().tolist() == word.tolist()


def test_attacks_with_and_without_defence(tmp_path: Path) -> None:
    result = typographic.evaluate(
        tiny_clip("open_clip"), labelled(tmp_path), neurons=RANDOM, size=64, tokenizer=letters, **OPTIONS
    )
    plain, patched = result.metrics["plain"], result.metrics["patched"]
    assert np.isnan(plain["accuracy_defended"])
    assert np.isfinite(patched["accuracy_defended"])
    for column in (plain, patched):
        assert column["attack_success"] == pytest.approx(1 - column["accuracy_attacked"])  # of two classes
    assert result.save_figures(tmp_path)[0].name == "typographic-attacks.png"


def test_rta_100_by_its_file_names(tmp_path: Path) -> None:
    for i, name in enumerate(("label=cat_text=dog", "label=dog_text=red fox")):
        write_image(tmp_path / f"{name}.png", i)
    result = typographic.evaluate(
        tiny_clip("open_clip"), tmp_path, neurons=RANDOM, size=64, tokenizer=letters, **OPTIONS
    )
    assert (result.protocol["images"], result.protocol["classes"]) == (2, 3)
    assert np.isnan(result.metrics["patched"]["accuracy_defended"])  # nobody says where the word is
    assert np.isnan(result.metrics["plain"]["accuracy_clean"])
    assert 0 <= result.metrics["plain"]["attack_success"] <= 1
    write_image(tmp_path / "label=cat.png", 0)
    with pytest.raises(ValueError, match=r"label=cat.png is not named label=X_text=Y"):
        typographic.evaluate("no such model", tmp_path, **OPTIONS)


def test_one_class_cannot_be_attacked(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "0.png", 0)
    with pytest.raises(ValueError, match="an attack needs at least two classes"):
        typographic.evaluate("no such model", tmp_path, **OPTIONS)


def test_attacks_on_an_image_tower_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF, projection_dim=32)).eval()
    loaded = LoadedModel(tower, Transform(), "tower")
    options = {"size": 64, "means": True, **OPTIONS}
    result = typographic.evaluate(loaded, labelled(tmp_path), neurons=RANDOM, **options)
    assert result.protocol["compared"] == "means of photographs"
    assert np.isfinite(result.metrics["patched"]["accuracy_defended"])
    same = labelled(tmp_path / "same")
    for image in (same / "val").glob("*/*"):
        image.write_bytes((same / "train" / image.parent.name / image.name).read_bytes())
    found = typographic.evaluate(loaded, same, num_images=2, seed=1, **options)  # of each class one, its own mean
    assert found.metrics["plain"]["accuracy_clean"] == 1
    with pytest.raises(ValueError, match=r"train has no photograph of \w+: take more images"):
        typographic.evaluate(loaded, same, num_images=1, **options)
    write_image(tmp_path / "rta" / "label=cat_text=dog.png", 0)
    with pytest.raises(ValueError, match="RTA-100 has no photographs without words"):
        typographic.evaluate(loaded, tmp_path / "rta", **options)
