"""The page of a diagnosis."""

import re

import pytest
import torch
from planting import plant
from test_report import HOSTILE, Page, browser, opened  # noqa: F401
from tiny import build, fresh

import testreg
from testreg.measure.diagnosis import ATTENTION_LEGEND, LEGEND
from testreg.report.diagnosis import write_diagnosis_report


@pytest.fixture(scope="module")
def planted(photos):
    model = fresh("timm_clip")
    model.testreg_source = HOSTILE
    plant(model, photos, num_neurons=4)
    return model


def written(model, images, folder, **options):
    found = testreg.diagnose(model, images, progress=False)
    write_diagnosis_report(folder / "d.html", found, model, images, **options)
    return found, (folder / "d.html").read_text(encoding="utf-8")


def test_the_page_says_what_was_found_and_what_to_do(planted, photos, tmp_path):
    found, text = written(planted, photos, tmp_path, command=f"testreg diagnose {HOSTILE}")
    seen = Page(text)
    headline = re.search(r"<h1>(.*)</h1>", text)[1].replace("\N{NO-BREAK SPACE}", " ")
    assert headline == "O" + found.verdict[1:]
    for said in ("testreg calibrate", HOSTILE, "Measured on 45 images at 64 x 64.", *found.notes):
        assert re.sub(r"\s+", " ", said) in seen.text
    assert seen.tags.count("img") == 5 * 3
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "before" not in seen.text
    rows = re.findall(r"<tr><td>(\d)</td><td>(.*?)</td>", text)
    stream = [(str(i), f"{block.after_mlp.median_norm:.4g}") for i, block in enumerate(found.blocks)]
    attention = [(str(i), f"{100 * sum(block.prefix_attention):.4g}") for i, block in enumerate(found.blocks)]
    assert rows == stream + attention
    for term, meaning in LEGEND + ATTENTION_LEGEND:
        assert f"{term} {meaning}" in seen.text or f"{term}{meaning}" in seen.text


def test_the_images_with_most_outliers_are_shown(planted, photos, tmp_path):
    flat = torch.zeros(1, 3, 64, 64)
    _, text = written(planted, torch.cat([flat, photos[:5]]), tmp_path)
    assert text.count('class="maps single"') == 5
    _, fewer = written(planted, photos[:2], tmp_path)
    assert fewer.count('class="maps single"') == 2


def test_nothing_to_fix(photos, tmp_path):
    found, text = written(fresh("timm_clip"), photos[:9], tmp_path)
    assert found.kind == "none"
    assert "<h1>No outliers: nothing to fix" in text
    assert "There is nothing to fix: registers would change this model and make nothing better" in Page(text).text
    assert "testreg calibrate" not in text


def test_a_patched_model_needs_nothing_more(photos, tmp_path):
    model = fresh("timm_clip")
    with testreg.patched(model, plant(model, photos, num_neurons=4).neurons):
        found, text = written(model, photos, tmp_path)
        assert testreg.is_patched(model)
    assert found.kind == "none"
    assert "The registers do their work." in text
    assert "the model being patched" in text


@pytest.mark.parametrize("name", ["hf_siglip", "open_clip_sequence_first", "hf_dinov2_registers"])
def test_other_families(name, photos, tmp_path):
    _, text = written(build(name), photos[:2], tmp_path)
    assert Page(text).tags.count("img") == 2 * 3


def test_images_of_the_first_ones_size_are_shown(planted, photos, tmp_path):
    found = testreg.diagnose(planted, photos[:2], progress=False)
    write_diagnosis_report(tmp_path / "d.html", found, planted, [photos[0], torch.zeros(3, 64, 80), photos[1]])
    assert (tmp_path / "d.html").read_text(encoding="utf-8").count('class="maps single"') == 2
    with pytest.raises(ValueError, match="give one at least"):
        write_diagnosis_report(tmp_path / "none.html", found, planted, [])
    assert not (tmp_path / "none.html").exists()


def test_in_chromium(browser, planted, photos, tmp_path):  # noqa: F811
    _, text = written(planted, photos, tmp_path)
    frames, console = opened(browser, text, tmp_path)
    assert console == []
    for frame in frames:
        assert frame["needed"] <= frame["width"]
        assert (frame["loaded"], frame["charts"], frame["scripts"]) == (15, 2, 0)
        assert frame["title"] == f"testreg: {HOSTILE}"
