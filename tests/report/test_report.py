"""The report: what it measures, and the page as a browser sees it."""

import ast
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from planting import plant
from tiny import build, fresh

import testreg
from testreg.demo.run import crops, photographs, planted_neurons
from testreg.families import find_tower
from testreg.measure.outliers import OutlierRule, token_norms
from testreg.neurons import Calibration, RegisterNeurons
from testreg.records.calibration import Effect, FixedPositions, Round, Verification
from testreg.report.calibration_charts import curves_of_rounds, tables_of
from testreg.report.map_figures import feature_colours, figure, maps_before_and_after
from testreg.report.measure import measure_report
from testreg.report.page import page, write_report
from testreg.report.usage import python_lines

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")
HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> "quoted" $y^{ & \''
COMMAND = f"testreg calibrate MODEL --images '{HOSTILE}' -o neurons.json --report report.html"


def point(neurons, remaining, change):
    return {
        "neurons": neurons,
        "remaining": remaining,
        "worst_block": 2,
        "excess": remaining / 2,
        "change_pooled": change,
        "change_patches": change / 3,
        "agreement": 1 - change,
    }


def check(agreement=None, change_pooled=0.0):
    """What was measured at one image size, where no outliers are left."""
    effect = Effect(4, 0.0, 2, 0.0, change_pooled, 0.0, agreement)
    return Verification((64, 64), "float32", (4, 4), 40, 0.05, effect)


CURVE = [point(1, 0.8, 0.01), point(2, 0.4, 0.02), point(4, 0.01, 0.03), point(100, 0.0, 0.3)]
ENTRIES = {
    "images": 40,
    "held_out": 5,
    "source": HOSTILE,
    "rule": HOSTILE,
    HOSTILE: 1,
    "image_size": [64, 64],
    "seed": 0,
    "stability": {"overlap": 0.9, "neurons": 4},
    "target": 0.05,
    "target_met": False,
    "max_change": 0.1,
    "curve": [*CURVE, {**CURVE[3], HOSTILE: HOSTILE}],
    "chosen": CURVE[2],
    "dropped": [[3, 5, 0.1], [3, 6, None]],
    "verified_at": [
        {"image_size": [96, 64], "grid": [6, 4], "dtype": HOSTILE, "images": 5, "outlier_fraction": 0.05, **CURVE[2]}
    ],
    "versions": {"torch": "2.99", HOSTILE: HOSTILE},
}
CALIBRATION = Calibration.from_json(ENTRIES, "the calibration")


@pytest.fixture(scope="module")
def planted(photos):
    """A planted model, whose name is hostile, and its neurons with scores."""
    model = fresh("timm_clip")
    model.testreg_source = HOSTILE
    (block, units), *_ = plant(model, photos, num_neurons=4).neurons.items()
    ranking = tuple((block, unit, 1.0 / (i + 1)) for i, unit in enumerate(units))
    rest = tuple((3, unit, 0.01) for unit in range(30))
    return model, RegisterNeurons(ranking + rest, 4, calibration=CALIBRATION, provenance={"note": HOSTILE})


@pytest.fixture(scope="module")
def written(planted, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    model, neurons = planted
    write_report(folder / "report.html", model, neurons, photos, command=COMMAND, figures=folder / "a" / "figures")
    assert not testreg.is_patched(model)
    return folder


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what is in the page."""

    VOID = frozenset({"meta", "img", "br", "input"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def seen(written):
    return Page((written / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else_and_runs_nothing(seen, written):
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    for _, name, value in seen.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/", "#"))
    text = (written / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(text) < 3e6


def test_the_page_is_accessible(seen, written):
    ids = [value for _, name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert ("html", "lang", "en") in seen.attributes
    alts = [value for tag, name, value in seen.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == seen.tags.count("img") == 5 * 6
    alts += [value for tag, name, value in seen.attributes if (tag, name) == ("svg", "aria-label")]  # photographs
    assert len(set(alts)) == len(alts) == 5 * 7
    text = (written / "report.html").read_text(encoding="utf-8")
    charts = re.findall(r'<svg role="img" aria-labelledby="(\S+) (\S+)" ', text)
    assert len(charts) == 6
    labels = []
    for title, words in charts:
        found = re.search(rf'<title id="{title}">(.*?)</title><desc id="{words}">(.*?)</desc>', text)
        labels.append(f"{found[1]}. {found[2]}")
    assert len(labels) == len(set(labels))
    assert seen.attributes.count(("svg", "role", "img")) == 6 + 5
    assert seen.attributes.count(("svg", "aria-hidden", "true")) == 5 * 6
    for said in (
        "Norms after each block. Before, the largest patch norm peaks at ",
        "Outlier patches after each block. Before, at most ",
        "After block 2. Histogram of patch norms over the median norm of their image: before from ",
        "outliers, at the worst block 0.8 at 1 and 0 at 100; excess norm 0.4 at 1 and 0 at 100. Chosen: 4.",
    ):
        assert sum(said in label for label in labels) == 1
    assert seen.tags.count("h1") == 1
    assert {value for tag, name, value in seen.attributes if (tag, name) == ("th", "scope")} == {"col"}


def test_maps_lie_over_their_photographs_and_open_enlarged(seen):
    ids = {value for _, name, value in seen.attributes if name == "id"}
    links = [(tag, value) for tag, name, value in seen.attributes if name == "href" and value.startswith("#image-")]
    assert {value[1:] for _, value in links} <= ids
    below = [value for tag, value in links if tag == "use"]
    assert below == [f"#image-{i}-photograph-pixels" for i in range(1, 6) for _ in range(6)]
    opened = [value for tag, value in links if tag == "a"]
    for kind in ("norms", "attention", "features"):
        for side in ("before", "after"):
            assert opened.count(f"#image-2-{kind}-{side}") == 2  # from itself, and from the other side
    assert opened.count("#image-2") == 7  # which closes it


def test_charts_have_tables(seen, planted, photos):
    report = measure_report(*planted, photos)
    tables = tables_of(report)
    assert [row[0] for row in tables["norms"].rows] == ["0", "1", "2", "3"]
    row = tables["norms"].rows[2]
    assert row[1] == f"{report.norms_before.largest[2]:.4g}"
    assert row[5] == f"{100 * report.before.blocks[2].after_mlp.outlier_fraction:.4g}"
    largest = tables["histograms"].rows[0]
    assert largest[:2] == ["2", "before"]
    assert largest[-1] == f"{report.norms_before.ratios[2].max():.4g}"
    for cell in (*row, *largest):
        assert cell in seen.texts


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("timm:vit_a", "model = timm.create_model('vit_a', pretrained=True).eval()"),
        ("hf:org/name", "model = transformers.AutoModel.from_pretrained('org/name').eval()"),
        ("open_clip:ViT-B-16/openai", "model = open_clip.create_model('ViT-B-16', pretrained='openai').eval()"),
        ("hub:a/b/c", "model = torch.hub.load('a/b', 'c').eval()"),
        ("torchvision:vit_b_16", "model = torchvision.models.get_model('vit_b_16', weights='DEFAULT').eval()"),
        ("demo", "model = testreg.demo_model()"),
        ("VisionTransformer", "# model: the VisionTransformer that was calibrated, loaded as you always do"),
        ("hf:a'); import os; ('", """model = transformers.AutoModel.from_pretrained("a'); import os; ('").eval()"""),
        ("a\nimport os", "# model: the a import os that was calibrated, loaded as you always do"),
    ],
)
def test_the_lines_that_use_it_are_those_of_the_models_library(name, line):
    lines = python_lines(name, "neurons.json")
    assert lines[1] == line
    assert lines[2] == "testreg.patch(model, 'neurons.json')"
    assert len(ast.parse("\n".join(lines)).body) == 2 if line.startswith("#") else 3


def test_the_page_says_how_to_use_it(planted, photos, seen):
    assert "testreg.patch(model, 'neurons.json')" in seen.text
    assert "--neurons neurons.json -o patched" in seen.text
    text = Page(page(measure_report(*planted, photos[:3]), file="elsewhere/n.json")).text
    assert "testreg.patch(model, 'elsewhere/n.json')" in text


ROUNDS = (
    Round(1, ((2, 17, 0.5), (2, 5, 0.4), (1, 9, None)), (), Effect(3, 0.41, 2, 0.3, 0.01, 0.02)),
    Round(2, tuple((3, i, None) for i in range(20)), (), Effect(4, 0.02, 2, 0.01, 0.01, 0.02)),
)


def test_rounds_of_calibration(planted, photos):
    model, neurons = planted
    curve = [Effect(n, 1 / n, 2, 0.5 / n, n / 100, n / 200) for n in (1, 2, 4)]
    rounds = (replace(ROUNDS[0], curve=tuple(reversed(curve))), ROUNDS[1])
    report = measure_report(model, replace(neurons, calibration=Calibration(rounds=rounds)), photos[:2])
    assert curves_of_rounds(report.facts) == {"round 1": curve}
    text = Page(page(report)).text
    for said in ("Rounds", "(2, 17) (2, 5) (1, 9)", "0.41", "(3, 7) and 12 more", "Excess norm that each round left"):
        assert said in text
    assert "Round 1, 1 at 1 and 0.25 at 4 neurons." in text
    assert "Rounds" not in Page(page(measure_report(model, neurons, photos[:2]))).text


def test_the_page_says_what_was_found(seen, planted):
    for text in (
        HOSTILE,
        COMMAND,
        "4 register neurons: all of the outlier patches are gone",
        "Before : outliers from block 2 (MLP)",
        "After : no outliers",
        "measured on 45 images held out",
        "did not meet its target",
        "4 in block 2; 34 were ranked",
        "90 % of the best 4",
        "torch 2.99",
        "96 x 64",
        "2 ranked, but left out",
    ):
        assert re.sub(r"\s+", " ", text) in seen.text
    for _, unit, _ in planted[1].ranking[:4]:
        assert str(unit) in seen.texts
    headings = ("Use it", "Maps", "Token norms", "Trade-off", "The neurons", "How it was made")
    assert [text for text in seen.texts if text in headings] == list(headings)
    assert "synthetic" not in seen.text


@pytest.mark.parametrize("name", ["norms", "histograms", "curve", "maps"])
def test_pictures_for_papers(name, written):
    with Image.open(written / "a" / "figures" / f"{name}.png") as picture:
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert picture.width > 2000
        assert min(low for low, _ in picture.convert("RGB").getextrema()) < 128  # something is drawn


def test_the_headline_is_the_heading_and_says_what_got_worse(planted, photos, written):
    model, neurons = planted
    headline = "4 register neurons: all of the outlier patches are gone"
    found = re.search(r"<h1>(.*)</h1>", (written / "report.html").read_text(encoding="utf-8"))
    assert found[1].replace("\N{NO-BREAK SPACE}", " ") == (
        f"{headline}, but the head changes its mind on 3 % of the images"
    )
    facts = Calibration(max_change=0.1, verified_at=(check(change_pooled=0.05), check(change_pooled=0.3)))
    report = measure_report(model, replace(neurons, calibration=facts), photos)
    assert report.headline == f"{headline}, but the pooled feature changes by 0.3"
    blocks = list(report.after.blocks)
    blocks[1] = replace(blocks[1], after_mlp=replace(blocks[1].after_mlp, outlier_fraction=0.5))
    worse = replace(report, after=replace(report.after, blocks=blocks))
    assert worse.drawbacks == ["there are more outliers after block 1", "the pooled feature changes by 0.3"]
    assert replace(report, neurons=replace(neurons, calibration=Calibration())).headline == headline


def test_figures_are_those_of_the_model(planted, photos):
    model, neurons = planted
    report = measure_report(model, neurons, list(photos))
    tower = find_tower(model)
    plain = token_norms(tower, photos)[..., tower.num_prefix :]
    with testreg.patched(model, replace(neurons, verified=True)), testreg.registers(model) as registers:
        patched = token_norms(tower, photos)[..., tower.num_prefix :]
    assert report.block == 2
    for norms, measured, fraction in zip(
        (plain, patched), (report.norms_before, report.norms_after), report.outliers, strict=True
    ):
        outliers = norms[2] > OutlierRule().limit(norms[2])
        assert fraction == pytest.approx(outliers.float().mean().item())
        assert torch.equal(measured.outliers, outliers.sum(1))
        torch.testing.assert_close(measured.largest, norms.amax(-1).mean(-1))
        torch.testing.assert_close(measured.ratios[3], norms[3] / norms[3].median(-1, keepdim=True).values)
    assert report.norms_before.registers is None
    on_registers = torch.stack(registers).norm(dim=-1).mean((1, 2))
    torch.testing.assert_close(report.norms_after.registers, on_registers)
    counts = report.norms_before.outliers
    shown = [int((photos == photo).flatten(1).all(1).nonzero()[0]) for photo in report.photographs]
    assert sorted(counts[shown].tolist()) == sorted(counts.tolist())[-5:]
    assert not report.before.patched


def test_fixed_positions_that_calibration_left_out_do_not_count(photos):
    model = fresh("timm_vit")
    plant(model, photos, num_neurons=4, fixed_position=(2, 3))
    found = testreg.calibrate(model, photos, progress=False)
    report = measure_report(model, found, photos[1::2])
    assert report.ignored == [(2, 3)]
    assert report.headline == "4 register neurons: all of the outlier patches are gone"
    assert report.before.verdict.endswith("movable")
    assert report.after.kind == "none"
    assert "Artefacts at the fixed positions (2, 3) are not counted here" in Page(page(report)).text
    counted = measure_report(model, RegisterNeurons(found.ranking, found.top_k), photos[1::2])
    assert counted.ignored == []
    assert (report.norms_before.outliers == counted.norms_before.outliers - 1).all()
    assert "gone" not in counted.headline or "all of" not in counted.headline


def test_positions_on_another_grid_are_not_ignored(planted, photos):
    model, neurons = planted
    facts = Calibration(ignored=(FixedPositions((5, 4), ((2, 3),)),))
    assert measure_report(model, replace(neurons, calibration=facts), photos[:2]).ignored == []


@pytest.mark.parametrize(
    ("agreement", "shown"), [(0.9, True), (0.98, True), (0.99, False), (1.0, False), (None, False)]
)
def test_a_head_that_disagrees_is_shown(agreement, shown, planted, photos):
    model, neurons = planted
    facts = Calibration(verified_at=(check(agreement=agreement),))
    text = Page(page(measure_report(model, replace(neurons, calibration=facts), photos[:2]))).text
    assert ("of the held-out images another class" in text) is shown
    assert ("head agrees" in text) is (agreement is not None)


@pytest.mark.parametrize("verified", [False, True])
def test_a_list_that_is_not_verified_says_so(verified, planted, photos):
    model, neurons = planted
    facts = replace(CALIBRATION, target_met=True, verified_on_others=verified)
    given = replace(neurons, calibration=facts, verified=verified)
    text = Page(page(measure_report(model, given, photos[:2]))).text
    assert ("Not verified: that takes clean maps on 16 held-out images" in text) is not verified
    assert ("Verified on other images" in text) is verified
    assert ("was chosen on others still" in text) is verified


def test_the_rule_is_the_callers(planted, photos):
    report = measure_report(*planted, photos, rule=OutlierRule(threshold=1e9))
    assert report.headline == "No outliers: nothing to fix"
    assert "norm &gt; 1e+09" in page(report)


def test_a_list_that_says_nothing_about_itself(planted, photos):
    model, neurons = planted
    text = page(measure_report(model, RegisterNeurons.from_blocks(neurons.by_block()), photos[:3]))
    assert {"Trade-off", "synthetic"} & set(Page(text).texts) == set()
    assert "measured on the 3 images that this report was given" in Page(text).text


def test_the_demo_model_is_called_planted():
    images = crops(photographs(96), 64, 32)[:3]
    report = measure_report(testreg.demo_model(64), RegisterNeurons.from_blocks(planted_neurons()), images)
    assert "A planted model: it was trained around outliers" in page(report)


def test_a_synthetic_model_is_called_so(planted, photos):
    model, neurons = planted
    made = RegisterNeurons(neurons.ranking, 4, provenance={"synthetic": True})
    assert "A synthetic model: it shows the mechanism" in page(measure_report(model, made, photos[:3]))


def test_neurons_that_do_little(planted, photos):
    model, neurons = planted
    report = measure_report(
        model, RegisterNeurons.from_blocks({3: [unit for _, unit, _ in neurons.ranking[4:]]}), photos
    )
    assert report.headline == "30 register neurons: the outliers stay"


def test_the_model_is_left_as_it_was(planted, photos, tmp_path):
    model, neurons = planted
    with pytest.raises(ValueError, match="expected image tensors"):
        write_report(tmp_path / "report.html", model, neurons, photos[0])
    assert not testreg.is_patched(model)
    model.train()
    write_report(None, model, neurons, photos[:2], figures=tmp_path / "figures")
    assert model.training
    model.eval()
    assert not testreg.is_patched(model)
    with (
        testreg.patched(model, replace(neurons, verified=True)),
        pytest.raises(RuntimeError, match="already patched"),
    ):
        write_report(tmp_path / "report.html", model, neurons, photos)
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]


@pytest.mark.parametrize("name", ["hf_siglip", "open_clip_sequence_first", "hf_dinov2_registers"])
def test_other_families(name, photos, tmp_path):
    write_report(tmp_path / "report.html", build(name), RegisterNeurons.from_blocks({1: [3]}), photos[:2])
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).tags.count("img") == 2 * 6


def test_feature_colours(planted, photos):
    model, neurons = planted
    with testreg.patched(model, replace(neurons, verified=True)):
        before, after = maps_before_and_after(model, photos, attention=False)
    assert before.attention is None
    first, second = feature_colours(before, after)
    assert first.shape == (45, 4, 4, 3)
    assert 0 <= first.min() < first.max() <= 1
    same = feature_colours(before, before)
    assert torch.equal(*same)
    after.features[0, 0, 0] *= 1e4  # an outlier more takes no colour from the others
    _, third = feature_colours(before, after)
    assert (third - second)[1:].abs().max() < 0.1
    without_attention = figure(photos[:1], before, after, HOSTILE)
    assert len(without_attention.axes) == 5
    assert without_attention.get_supxlabel() == "Norms: one logarithmic scale for before and after"


def test_a_picture_says_which_maps_have_a_scale_of_their_own(planted, photos):
    model, neurons = planted
    with testreg.patched(model, replace(neurons, verified=True)):
        before, after = maps_before_and_after(model, photos[:1])
    page = figure(photos[:1], before, after, "")
    assert "Attention: each map from its least to its largest value" in page.get_supxlabel()
    assert [axis.get_title() for axis in page.axes][1:4] == ["norms before", "norms after", "attention before"]
    assert not any(tick for axis in page.axes for tick in (*axis.get_xticks(), *axis.get_yticks()))


# As a browser sees it -------------------------------------------------------------------------------------------------

INSPECT = """
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument;
    const map = page.querySelector(".map");
    page.getElementById("overlay").click();
    const opacity = getComputedStyle(map).opacity;
    const before = map.getBoundingClientRect().width;
    frame.contentWindow.location.hash = map.closest("figure").id;
    const enlarged = map.getBoundingClientRect().width;
    frame.contentWindow.location.hash = "";
    return {
      opacity: opacity,
      enlarged: enlarged / before,
      width: frame.contentWindow.innerWidth,
      needed: page.documentElement.scrollWidth,
      loaded: [...page.images].filter(image => image.complete && image.naturalWidth > 0).length,
      charts: [...page.querySelectorAll(".charts svg")].filter(svg => svg.getBoundingClientRect().height > 150).length,
      scripts: page.scripts.length,
      title: page.title,
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
};
"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no headless browser is installed (one of {', '.join(BROWSERS)})")
    return found


def opened(browser, text, folder):
    """What Chromium finds in the page `text` on a phone and on a desk, and what it logs."""
    frames = [f'<iframe width="{width}" height="800" srcdoc="{html.escape(text)}"></iframe>' for width in (390, 1200)]
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><style>iframe {{border: 0}}</style><pre id="found"></pre>'
        f"<script>{INSPECT}</script>{''.join(frames)}",
        encoding="utf-8",
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}/user"]
    command = [browser, *flags, "--dump-dom", wrapper.as_uri()]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    return json.loads(html.unescape(found[1])), [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_in_chromium(browser, written, tmp_path):
    frames, console = opened(browser, (written / "report.html").read_text(encoding="utf-8"), tmp_path)
    assert console == []
    assert [frame["width"] for frame in frames] == [390, 1200]
    for frame in frames:
        assert frame["needed"] <= frame["width"]
        assert (frame["loaded"], frame["charts"], frame["scripts"]) == (30, 6, 0)
        assert frame["opacity"] == "0.6"
        assert frame["enlarged"] > 1.8
        assert frame["title"] == f"testreg: {HOSTILE}"


@pytest.mark.slow
def test_chromium_would_notice(browser, written, tmp_path):
    """The test above can fail: a foreign picture is not loaded, an error logged, a wide line seen."""
    text = (written / "report.html").read_text(encoding="utf-8")
    broken = text.replace("<main>", '<main><img src="http://localhost:9/a.png" alt=""><p style="width: 900px">wide</p>')
    frames, console = opened(browser, broken.replace("max-width: 46rem;", ""), tmp_path)
    assert "Content Security Policy" in "".join(console)
    assert frames[0]["needed"] > 390
    assert frames[0]["loaded"] == 30
