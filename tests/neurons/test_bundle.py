import warnings
from pathlib import Path

import open_clip
import pytest
import timm
import tiny
import torch
import transformers
from lists import fingerprint_of, neurons, rounded

import testreg
from testreg import RegisterNeurons, UnverifiedNeuronsWarning
from testreg.demo.run import planted_neurons
from testreg.families import find_tower
from testreg.neurons import Calibration, bundled, config_folder, resolve
from testreg.patching.state import patch_of

BUNDLED = bundled()
NAMES = sorted({name for one in BUNDLED.values() for name in one.model["names"]})
DEFAULT_NAMES = [(name, key) for key, one in BUNDLED.items() for name in one.model["default_for"]]
DINOV2_S = sorted(BUNDLED["dinov2-vits14-jroth-518"].model["names"])  # nothing shows that it needs registers
GELU = "timm:vit_base_patch16_clip_224.openai"  # on weights that were trained with QuickGELU
CALIBRATED_HERE = {"demo", "openai-clip-vitb16"}


def test_there_are_bundled_lists_and_every_file_is_one() -> None:
    assert len(BUNDLED) == 18 + len(CALIBRATED_HERE)
    assert {path.name for path in config_folder().iterdir()} == {f"{key}.json" for key in BUNDLED}


@pytest.mark.parametrize("key", sorted(BUNDLED.keys() - CALIBRATED_HERE))
def test_published_list_is_complete(key: str) -> None:
    one = BUNDLED[key]
    assert key == key.lower()
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert one.verified is False
    assert one.model["name"] == one.model["names"][0]
    assert set(one.model["default_for"]) <= set(one.model["names"])
    if key != "openai-clip-vitb16-jroth-224":
        assert "fingerprint" not in one.model, "nobody has had these weights at hand"
    assert one.provenance["source"].keys() >= {"repo", "path", "commit"}
    for field in ("id", "status", "note", "neuron_definition", "license"):
        assert one.provenance[field], field
    assert one.calibration.is_known
    one.check_fits(one.model["depth"], one.model["mlp_width"])
    assert one.by_block()


def test_the_demo_model_has_its_list(recwarn: pytest.WarningsRecorder) -> None:
    """Made by testreg on these very weights; it holds the planted neurons."""
    model = testreg.patch(testreg.demo_model())
    assert BUNDLED["demo"].verified
    found = patch_of(model).neurons.by_block()
    assert all(set(units) <= set(found[block]) for block, units in planted_neurons().items())
    assert not recwarn.list


def test_bundled_lists_are_written_as_save_writes(tmp_path: Path) -> None:
    for key, one in BUNDLED.items():
        one.save(tmp_path / "n.json")
        assert (tmp_path / "n.json").read_text() == (config_folder() / f"{key}.json").read_text(), key


def test_every_checkpoint_that_needs_registers_has_one_default() -> None:
    assert len({name for name, _ in DEFAULT_NAMES}) == len(DEFAULT_NAMES)
    assert sorted([*(name for name, _ in DEFAULT_NAMES), *DINOV2_S, GELU]) == NAMES


def test_the_list_of_clip_says_whose_it_is_and_how_it_was_made() -> None:
    """The published list for the same checkpoint stays, and is not the default."""
    ours, published = BUNDLED["openai-clip-vitb16"], BUNDLED["openai-clip-vitb16-jroth-224"]
    assert ours.verified
    assert (ours.top_k, ours.num_registers, ours.start, ours.model["activation"]) == (16, 4, "mean", "quick_gelu")
    assert set(ours.model["names"]) == set(published.model["names"]) == {*ours.model["default_for"], GELU}
    assert published.model["default_for"] == []
    assert ours.model["fingerprint"] == published.model["fingerprint"]
    assert "rounded to 8 bits" in ours.provenance["checkpoint"]
    assert "57c2164" in ours.provenance["checkpoint"]
    assert ours.provenance["source"]["command"].startswith("testreg calibrate hf:openai/clip-vit-base-patch16 ")


def test_gelu_on_weights_that_want_quickgelu_has_no_default() -> None:
    with torch.device("meta"):
        model = timm.create_model(GELU.removeprefix("timm:"), pretrained=False)
    with pytest.raises(
        ValueError,
        match=r"it computes gelu, but .* was trained with quick_gelu\. Load timm:vit_base_patch16_clip_quickgelu_224"
        r"\.openai instead, or name one of the lists of this checkpoint: openai-clip-",
    ) as caught:
        testreg.patch(model)
    assert set(str(caught.value).rpartition(": ")[2].split(", ")) == {
        "openai-clip-vitb16",
        "openai-clip-vitb16-jroth-224",
    }
    assert not testreg.is_patched(model)
    with pytest.warns(UserWarning, match="Load timm:vit_base_patch16_clip_quickgelu_224.openai instead"):
        testreg.patch(model, "openai-clip-vitb16")
    assert testreg.is_patched(model)


@pytest.mark.parametrize("name", DINOV2_S)
def test_without_a_default_the_lists_of_a_checkpoint_are_named(name: str) -> None:
    model = tiny.build("timm_vit")
    model.testreg_source = name
    with pytest.raises(ValueError, match=r"no default .*nothing shows that this checkpoint needs any") as caught:
        testreg.patch(model)
    assert all(key in str(caught.value) for key in BUNDLED if key.startswith("dinov2-vits14"))
    assert "dinov2-vitb14" not in str(caught.value)
    assert not testreg.is_patched(model)


def test_a_checkpoint_without_a_name_is_found_by_its_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = testreg.demo_model()
    del model.testreg_source
    with caplog.at_level("INFO", "testreg"):
        testreg.patch(model)
    assert patch_of(model).neurons == BUNDLED["demo"].truncate()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("testreg", "INFO")
    assert "the bundled list demo: 6 register neurons of testreg calibrate demo" in record.getMessage()
    assert record.getMessage().endswith(", verified")
    testreg.unpatch(model)
    with torch.no_grad():
        find_tower(model).blocks[0].mlps[0].fc2_linear.weight.neg_()
    with pytest.raises(ValueError, match="no bundled register neurons"):
        testreg.patch(model)


def test_patch_without_a_list_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch14_dinov2", pretrained=False)
    with (
        caplog.at_level("INFO", "testreg"),
        pytest.warns(UnverifiedNeuronsWarning, match="dinov2-vitb14-jroth-224-v2 are not verified") as caught,
    ):
        testreg.patch(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    (record,) = caplog.records
    assert "dinov2-vitb14-jroth-224-v2: 185 register neurons of jroth1414/test-time" in record.getMessage()
    assert record.getMessage().endswith(", not verified")


def test_only_lists_that_something_found_are_said_to_be_unverified(tmp_path: Path, caplog) -> None:
    by_hand = RegisterNeurons.from_blocks(tiny.NEURONS)
    by_hand.save(tmp_path / "n.json")
    found = RegisterNeurons(by_hand.ranking, calibration=Calibration(images=3))
    verified = RegisterNeurons(by_hand.ranking, calibration=Calibration(images=300), verified=True)
    verified.save(tmp_path / "verified.json")
    model = tiny.build("timm_vit")
    with warnings.catch_warnings(), caplog.at_level("INFO", "testreg"):
        warnings.simplefilter("error")
        for silent in (tiny.NEURONS, by_hand, tmp_path / "verified.json"):
            testreg.unpatch(testreg.patch(model, silent))
    assert not caplog.records, "the user knows which list was given"
    for given in (found, tmp_path / "n.json", RegisterNeurons.load(tmp_path / "n.json")):
        with pytest.warns(UnverifiedNeuronsWarning, match="not verified") as caught:
            testreg.unpatch(testreg.patch(model, given))
        assert len(caught) == 1


def test_provenance_is_unique() -> None:
    ids = [one.provenance["id"] for one in BUNDLED.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("key", BUNDLED)
def test_resolve_by_bundled_name(key: str) -> None:
    assert resolve(key, torch.nn.Identity()) == BUNDLED[key]


def test_unknown_bundled_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no bundled list 'dinov2-vitx'.*dinov2-vitl14-official-hub"):
        testreg.patch(tiny.build("timm_vit"), "dinov2-vitx")


def test_bundled_lists_say_which_models_they_are_for() -> None:
    text, html = repr(testreg.bundled()), testreg.bundled()._repr_html_()
    for name, each in BUNDLED.items():
        assert f"{name}  ({len(each)} neurons, " in text
        assert f"<td>{name}</td><td>{len(each)}</td>" in html
        for model in each.model["names"]:
            assert f"    {model}" in text
            assert model in html
    assert "hf:facebook/dinov2-large  (default)" in text


@pytest.mark.parametrize("name", ["demo", "dinov2-vitl14-official-hub"])
def test_load_takes_bundled_names(name: str) -> None:
    loaded = RegisterNeurons.load(name)
    assert loaded == BUNDLED[name]
    assert loaded.source == name


def test_a_file_comes_before_a_bundled_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    neurons().save("demo")
    assert RegisterNeurons.load("demo") == neurons()
    with pytest.raises(ValueError, match=r"no bundled list 'dem' .*: did you mean demo\?"):
        RegisterNeurons.load("dem")
    with pytest.raises(ValueError, match=r"no bundled list 'xyz' .*bundled: demo, dinov2"):
        RegisterNeurons.load("xyz")
    with pytest.raises(FileNotFoundError, match=r"no neuron JSON at dem\.json"):
        RegisterNeurons.load("dem.json")


def test_neurons_of_a_wrong_type() -> None:
    with pytest.raises(TypeError, match="got list"):
        testreg.patch(tiny.build("timm_vit"), [1, 2])


@pytest.mark.parametrize("name", sorted(name for name, _ in DEFAULT_NAMES if name.startswith("timm:")))
@pytest.mark.filterwarnings("ignore::testreg.UnverifiedNeuronsWarning")
def test_patch_without_a_list_takes_the_default_in_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name.removeprefix("timm:"), pretrained=False)
    expected = BUNDLED[dict(DEFAULT_NAMES)[name]]
    tower = find_tower(model)
    assert (tower.depth, tower.mlp_width) == (expected.model["depth"], expected.model["mlp_width"])
    testreg.patch(model)
    assert testreg.register.patch_of(model).neurons == expected.truncate()


@pytest.mark.filterwarnings("ignore::testreg.UnverifiedNeuronsWarning")
def test_patch_without_a_list_takes_the_default_in_transformers() -> None:
    with torch.device("meta"):
        model = transformers.Dinov2Model(transformers.Dinov2Config())
    model.config._name_or_path = "facebook/dinov2-base"
    testreg.patch(model)
    assert testreg.register.patch_of(model).neurons == BUNDLED["dinov2-vitb14-jroth-224-v2"]


@pytest.mark.filterwarnings("ignore::testreg.UnverifiedNeuronsWarning")
def test_patch_without_a_list_takes_the_default_of_the_name_that_it_was_loaded_by() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_clip_224", pretrained=False)
    model.testreg_source = "open_clip:ViT-B-16/laion2b_s34b_b88k"
    testreg.patch(model)
    expected = BUNDLED["openclip-vitb16-laion2b-bansal-aptos"]
    assert testreg.register.patch_of(model).neurons.ranking == expected.ranking[:10]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("open_clip:")])
def test_open_clip_names_exist(name: str) -> None:
    assert tuple(name.removeprefix("open_clip:").split("/")) in open_clip.list_pretrained()


def test_unknown_checkpoint_says_how_to_calibrate() -> None:
    model = tiny.build("hf_vit")
    model.config._name_or_path = "me/mine"
    with pytest.raises(ValueError, match=r"hf:me/mine.*testreg\.calibrate.*testreg calibrate MODEL --images"):
        testreg.patch(model)
    with pytest.raises(ValueError, match=r"this CLIP: it does not say which checkpoint it is\. Calibrate it"):
        testreg.patch(tiny.build("open_clip"))


def test_the_error_names_lists_of_the_same_shape_before_it_says_calibrate() -> None:
    with torch.device("meta"):
        model = transformers.Dinov2Model(transformers.Dinov2Config(num_hidden_layers=12, hidden_size=384))
    model.config._name_or_path = "/data/some-vits"
    fitting = ", ".join(key for key in BUNDLED if key.startswith("dinov2-vits14"))
    with pytest.raises(ValueError, match=rf"one of these lists, name it: {fitting}\. Otherwise calibrate it"):
        testreg.patch(model)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_copy_of_a_known_checkpoint_is_found_by_its_weights(
    bits: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two defaults, the one that is the same goes before the one that is similar."""
    model = tiny.build("hf_vit")
    model.config._name_or_path = "/data/a-copy"
    same = {"default_for": ["hf:it"], "fingerprint": fingerprint_of(model)}
    for block in find_tower(model).blocks:
        if bits is not None:
            rounded(block.mlps[0].fc2_linear.weight.data, bits)
    for name, entries in {"a": {**same, "fingerprint": fingerprint_of(tiny.build("hf_vit", 1))}, "b": same}.items():
        RegisterNeurons(((1, 3, None),), model=entries, verified=True).save(tmp_path / f"{name}.json")
    monkeypatch.setattr("testreg.neurons.configs.config_folder", lambda: tmp_path)
    assert resolve(None, model).source == "b"
    if bits is not None:
        exact = {**same, "fingerprint": fingerprint_of(model)}
        RegisterNeurons(((1, 3, None),), model=exact, verified=True).save(tmp_path / "c.json")
        assert resolve(None, model).source == "c"
