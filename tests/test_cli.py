"""The command line as a user runs it: on local folders, offline, in its own process where that matters."""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import itertools
import json
import logging
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import timm
import torch
from PIL import Image
from planting import plant
from ranks import torchrun
from safetensors import safe_open
from tiny import IMAGE, TIMM, TIMM_RECORDS, fresh, photograph_crops
from torchvision.transforms.v2 import functional as tv

import testreg
from testreg.cli import calibrate, main, show
from testreg.cli.invocation import Invocation
from testreg.cli.show import _box, _touched_patches
from testreg.io.rows import Writer
from testreg.measure.score import Score
from testreg.neurons.notices import warn_of_unverified
from testreg.records.calibration import Effect
from testreg.report import map_figures

records = pytest.mark.skipif(not TIMM_RECORDS, reason="this timm cannot rebuild a model of unusual size")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs and their mirror images, a planted timm model as its library saves it, and one without outliers."""
    root = tmp_path_factory.mktemp("cli")
    photos = photograph_crops()
    (root / "photos").mkdir()
    for i, photo in enumerate(torch.cat([photos, photos.flip(-1)])):  # enough to verify on 16 that do not choose
        tv.to_pil_image((photo + 1) / 2).save(root / "photos" / f"{i:02}.png")
    (root / "photos" / "broken.jpg").write_bytes(b"no image")
    model = timm.create_model(
        "vit_base_patch16_clip_224",
        num_classes=0,
        pretrained_cfg_overlay={"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 64, 64), "crop_pct": 1.0},
        **TIMM,
    )
    clean = fresh("timm_clip")
    clean.pretrained_cfg["input_size"] = (3, IMAGE, IMAGE)
    timm.models.save_for_hf(clean, root / "clean", model_args=TIMM, safe_serialization=True)
    planted = plant(model.eval(), photos, num_neurons=4)
    timm.models.save_for_hf(model, root / "model", model_args=TIMM, safe_serialization=True)
    (root / "planted.json").write_text(json.dumps(planted.neurons))
    os.mkfifo(root / "fifo.jpg")
    return root


@pytest.fixture(scope="module")
def calibrated(folder):
    output = folder / "neurons.json"
    model, photos = str(folder / "model"), str(folder / "photos")
    assert main(["calibrate", model, "--images", photos, "-o", str(output), "--top-k", "4", "--batch-size", "7"]) == 0
    return output


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "testreg", *arguments], capture_output=True, text=True, **options)


def test_diagnose_prints_the_verdict_first(folder, tmp_path, capsys):
    arguments = ["diagnose", str(folder / "model"), "--images", str(folder / "photos"), "--batch-size", "7"]
    assert main([*arguments, "--json", str(tmp_path / "diagnosis.json")]) == 0
    verdict, *table = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"outliers from block 2 \(MLP\), \d\.\d % of patches, movable", verdict)
    assert [line.split()[0] for line in table[4:8]] == ["0", "1", "2", "3"]
    assert json.loads((tmp_path / "diagnosis.json").read_text())["verdict"] == verdict


@records
def test_diagnose_of_several_models_is_one_table(folder, calibrated, tmp_path, capsys):
    models = [str(folder / "model"), str(tmp_path / "patched"), str(folder / "clean")]
    assert main(["apply", models[0], "--neurons", str(calibrated), "-o", models[1], "--quiet"]) == 0
    capsys.readouterr()
    arguments = ["diagnose", *models, "--images", str(folder / "photos")]
    assert main([*arguments, "--json", str(tmp_path / "all.json")]) == 0
    verdicts, table = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert [line.rpartition(" ")[2] for line in verdicts] == ["movable", "fix", "fix"]
    found = json.loads((tmp_path / "all.json").read_text())
    assert [each["name"] for each in found] == models
    assert [each["images"] for each in found] == [90] * 3
    assert [each["kind"] for each in found] == ["movable", "none", "none"]
    assert found[0] == {
        "name": models[0],
        **testreg.diagnose(
            testreg.load_model(models[0]).model, folder / "photos", progress=False, num_images=200
        ).to_json(),
    }
    worst = found[0]["blocks"][found[0]["outliers"]["block"]]["after_mlp"]
    assert table[2].split()[4:6] == [f"{100 * worst['outlier_fraction']:.1f}", f"{worst['max_over_median']:.1f}"]
    assert main([*arguments, "--report", str(tmp_path / "report.html")]) == 1
    assert "a report shows one model" in capsys.readouterr().err


def test_diagnose_by_another_rule(folder, capsys):
    photos = str(folder / "photos")
    assert main(["diagnose", str(folder / "model"), "--images", photos, "--rule", "mixture", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rule"].startswith("norm in the upper of two components")


@records
def test_diagnose_exit_codes_of_what_registers_do_not_fix(folder, tmp_path, capsys):
    photos = ["--images", str(folder / "photos"), "--json", "-"]
    assert main(["diagnose", str(folder / "clean"), *photos]) == 3
    assert json.loads(capsys.readouterr().out)["kind"] == "none"
    model = timm.create_model(f"local-dir:{folder / 'clean'}", pretrained=True)
    with torch.no_grad():
        model.pos_embed[0, [1 + 5, 1 + 11], 7] = 100.0
        model.norm_pre.weight.fill_(0.0)  # this norm would even them out
        model.norm_pre.weight[7] = 1.0
    timm.models.save_for_hf(model, tmp_path / "fixed", safe_serialization=True)
    assert main(["diagnose", str(tmp_path / "fixed"), *photos]) == 4
    assert json.loads(capsys.readouterr().out)["kind"] == "fixed"


def test_calibrate_finds_the_planted_neurons(folder, calibrated):
    neurons = testreg.RegisterNeurons.load(calibrated)
    (block, units), *_ = json.loads((folder / "planted.json").read_text()).items()
    assert {(block, unit) for block, unit, _ in neurons.truncate().ranking} == {(int(block), unit) for unit in units}
    assert neurons.calibration.images + neurons.calibration.held_out == 90
    assert neurons.calibration.unreadable_images == 1


def test_the_script_is_the_command(folder, calibrated, tmp_path, monkeypatch):
    script = os.path.join(os.path.dirname(__file__), "..", "scripts", "calibrate.py")
    arguments = [str(folder / "model"), "--images", str(folder / "photos"), "-o", str(tmp_path / "n.json")]
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--top-k", "4"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(script, run_name="__main__")
    assert exited.value.code == 0
    by_script, by_command = (testreg.RegisterNeurons.load(path) for path in (tmp_path / "n.json", calibrated))
    assert by_script.by_block() == by_command.by_block()


@records
def test_apply_then_load(folder, calibrated, tmp_path, capsys):
    output = tmp_path / "patched"
    assert main(["apply", str(folder / "model"), "--neurons", str(calibrated), "-o", str(output)]) == 0
    assert "patched checkpoint" in capsys.readouterr().out
    loaded = testreg.load(output)
    original = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), testreg.patch(original, calibrated)(images), rtol=0, atol=0)


def test_show_draws_a_picture(folder, calibrated, tmp_path, capsys):
    photos = [str(folder / "photos" / f"{i:02}.png") for i in (0, 1)]
    output = tmp_path / "picture.png"
    assert main(["show", str(folder / "model"), *photos, "--neurons", str(calibrated), "-o", str(output)]) == 0
    assert "outlier patches" in capsys.readouterr().out
    with Image.open(output) as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_show_steers_outliers_onto_a_box(folder, calibrated, tmp_path):
    photos, output = [str(folder / "photos" / f"{i:02}.png") for i in range(12)], tmp_path / "picture.png"
    command = ["show", str(folder / "model"), *photos, "--neurons", str(calibrated), "-o", str(output)]
    norms = {}
    for name, more in (("register", []), ("steered", ["--steer", "0,0,0.5,0.3"])):
        assert main([*command, *more, "--json", str(tmp_path / f"{name}.json")]) == 0
        norms[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert norms["steered"]["steered_onto"] == [0, 0, 0.5, 0.3]
    assert norms["register"]["steered_onto"] is None
    assert norms["steered"]["before"] == norms["register"]["before"]
    assert norms["steered"]["after"]["max_over_median"] > 1.2 * norms["register"]["after"]["max_over_median"]


def test_show_of_principal_components(folder, calibrated, tmp_path, monkeypatch, capsys):
    drawn = {}

    def principal_figure(images, sides, title, **options):
        drawn.update(sides=sides, title=title, **options)
        drawn["axes"] = (figure := real(images, sides, title, **options)).axes
        return figure

    real = map_figures.principal_figure
    monkeypatch.setattr(map_figures, "principal_figure", principal_figure)
    output, photos = tmp_path / "pca.png", [str(folder / "photos" / f"{i:02}.png") for i in range(9)]
    arguments = ["show", str(folder / "model"), *photos, "--neurons", str(calibrated), "-o", str(output)]
    assert main([*arguments, "--pca", "--foreground", "--block", "-2"]) == 0
    assert Image.open(output).width > 500
    assert len(drawn["axes"]) == 2 * 3 * 8  # nine images in lines of eight: photograph, before, after
    assert drawn["title"].endswith("principal components of the patches after block 2")
    assert drawn["foreground"]
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    torch.testing.assert_close(drawn["sides"]["before"].permute(0, 3, 1, 2), testreg.features(model, photos, 2))
    testreg.patch(model, calibrated)
    torch.testing.assert_close(drawn["sides"]["after"].permute(0, 3, 1, 2), testreg.features(model, photos, 2))
    assert main([*arguments, "--foreground"]) == 1
    assert "--foreground belongs to --pca" in capsys.readouterr().err
    assert main([*arguments, "--block", "-30"]) == 1
    assert "--block -30 is out of range: " in capsys.readouterr().err


def test_a_box_is_of_patches_that_it_touches():
    target = _touched_patches(_box("0,0.25,0.5,0.3"), (4, 4))
    assert target.shape == (1, 4, 4)
    assert target.nonzero().tolist() == [[0, 1, 0], [0, 1, 1]]
    assert _touched_patches(_box("0,0,1,1"), (3, 5)).all()


@pytest.mark.parametrize(
    "box", ["0,0,1", "a,0,1,1", "0,0,112,112", "0.5,0,0.5,1", "0,1,1,0.5", "nan,0,1,1", "-1,0,1,1"]
)
def test_no_boxes(box, tmp_path):
    with pytest.raises(ValueError, match="--steer takes"):
        _box(box)
    assert main(["show", "no such model", "none.png", "-o", str(tmp_path / "p.png"), f"--steer={box}"]) == 1


@records
def test_show_of_a_patched_checkpoint(folder, calibrated, tmp_path):
    patched, output = str(tmp_path / "patched"), str(tmp_path / "picture.png")
    photo = str(folder / "photos" / "00.png")
    assert main(["apply", str(folder / "model"), "--neurons", str(calibrated), "-o", patched]) == 0
    assert main(["show", patched, photo, "-o", output]) == 0


def test_no_outliers_is_exit_code_3_and_no_file(folder, tmp_path, capsys):
    output = tmp_path / "neurons.json"
    arguments = [str(folder / "clean"), "--images", str(folder / "photos"), "-o", str(output)]
    assert main(["calibrate", *arguments]) == 3
    assert "nothing to fix" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_demo_finds_what_was_planted_and_says_that_it_was(tmp_path, capsys, monkeypatch):
    # A third of the time of its own sizes, at which tests/demo ranks, patches and diagnoses.
    for name, value in {"IMAGE_SIZE": 80, "CROP_SIZE": 64, "STRIDE": 21}.items():
        monkeypatch.setattr(f"testreg.demo.run.{name}", value)
    assert main(["demo", "-o", str(tmp_path / "demo.png")]) == 0
    out = capsys.readouterr().out
    assert "around a planted outlier mechanism" in out
    assert "6 register neurons, 6 of the 6 planted ones among them" in out
    before, after = (float(value.rstrip("%")) for value in out.split("outlier patches")[1].split()[:2])
    assert after < 0.05 * before
    assert (tmp_path / "demo.png").stat().st_size > 50_000


def test_list_names_the_models(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "not verified" in out
    assert "timm:vit_large_patch14_dinov2.lvd142m  (default)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "resnet", "--images", "{photos}", "-o", "{out}"], "'resnet' is neither a checkpoint folder"),
        (["calibrate", "{model}", "--images", "{root}/none", "-o", "{out}"], "no folder of images at"),
        (["calibrate", "{model}", "--images", "{photos}", "-o", "{root}/none/n.json"], "there is no folder"),
        (["calibrate", "{model}", "--images", "{photos}", "-o", "{photos}"], "is a folder: name a file"),
        (["calibrate", "{model}", "--images", "{photos}", "-o", "{out}", "--block", "9"], "block=9 is out of range"),
        (["calibrate", "timm:resnet18", "--images", "{photos}", "-o", "{out}"], "resnet18"),
        (["diagnose", "{model}", "--images", "{root}/none"], "no folder of images at"),
        (["diagnose", "{model}", "--images", "{photos}", "--json", "{root}/none/d.json"], "there is no folder"),
        (["diagnose", "{model}", "--images", "{photos}", "--threshold", "-1"], "must be a positive number"),
        (["show", "{model}", "{root}/photos/broken.jpg", "--neurons", "{neurons}", "-o", "{png}"], "not a readable"),
        (["show", "{model}", "{root}/none.jpg", "--neurons", "{neurons}", "-o", "{png}"], "none.jpg"),
        (["show", "{model}", "{photo}", "-o", "{png}"], "no bundled register neurons for this"),
        (["show", "{model}", "{photo}", "-o", "{out}"], "name a .png or .jpg"),
        (["show", "{model}", "{fifo}", "-o", "{png}"], "is not a regular file"),
        (["show", "{model}", "{photo}", "--neurons", "{fifo}", "-o", "{png}"], "is not a regular file"),
        (["diagnose", "{model}", "--images", "{fifo}"], "is not a regular file"),
        (["apply", "{model}", "--neurons", "{root}/planted.json", "-o", "{out}"], "is not a register neuron JSON"),
        (
            ["apply", "{model}", "-o", "{photos}"],
            "photos exists and is no checkpoint of testreg",
        ),
        (["apply", "{model}", "-o", "{root}/" + 300 * "x"], "File name too long"),
        (["show", "{model}", "{root}/model", "--neurons", "{neurons}", "-o", "{png}"], "no images (.bmp, "),
    ],
)
def test_errors_are_one_line_on_stderr(arguments, message, folder, calibrated, tmp_path, capsys):
    names = {
        "root": folder,
        "model": folder / "model",
        "photos": folder / "photos",
        "photo": folder / "photos" / "00.png",
        "neurons": calibrated,
        "out": tmp_path / "out.json",
        "png": tmp_path / "out.png",
        "fifo": folder / "fifo.jpg",
    }
    before = sorted(folder.rglob("*"))
    assert main([argument.format(**names) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("testreg: error: ")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert sorted(folder.rglob("*")) == before


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="neither a checkpoint folder"):
        main(["apply", "nothing", "-o", "out", "--debug"])


def test_the_module_is_the_command_and_its_exit_code():
    wrong = run("calibrate")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    failed = run("demo", "-o", "picture.txt")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("testreg: error: cannot write picture.txt: name a .png or ")
    assert failed.stderr.count("\n") == 1


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"testreg {importlib.metadata.version('testreg')}\n"


@pytest.mark.parametrize(
    ("module", "name", "call", "written", "message"),
    [
        ("testreg.io.decoding", "open_image", 9, [], "interrupted; nothing was written"),
        (
            "testreg.report.page",
            "page",
            1,
            ["neurons.json", "state"],
            "interrupted; written before: {neurons.json}, {state}; ",
        ),
    ],
)
def test_an_interrupt_says_what_was_written_and_leaves_no_half_written_file(
    module, name, call, written, message, folder, tmp_path, monkeypatch, capsys
):
    real, calls = getattr(importlib.import_module(module), name), itertools.count(1)

    def interrupted(*args, **options):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)  # at a point that no clock decides
        return real(*args, **options)

    monkeypatch.setattr(f"{module}.{name}", interrupted)
    names = ("neurons.json", "report.html", "figures", "state")
    paths = {name: str(tmp_path / name) for name in names}
    (tmp_path / "neurons.json").write_text("before")
    (tmp_path / "report.html").write_text("before")
    arguments = ["calibrate", str(folder / "model"), "--images", str(folder / "photos"), "--device", "cpu"]
    arguments += ["-o", paths["neurons.json"], "--report", paths["report.html"], "--figures", paths["figures"]]
    arguments += ["--resume", paths["state"], "--quiet"]  # without the lines of its phases
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
    try:
        assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    for name, path in paths.items():
        message = message.replace(f"{{{name}}}", path)
    assert message in said
    assert ("the same command goes on from" in said) == ("state" in written)
    assert said.count("\n") == 1
    for name in ("neurons.json", "report.html"):
        assert ((tmp_path / name).read_text() == "before") == (name not in written)
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"neurons.json", "report.html", *written}


@pytest.mark.parametrize("command", [["list"], ["calibrate", "m", "--images", "p", "-o", "n.json"], ["demo"]])
def test_an_interrupt_while_the_command_is_imported_is_one_line(command, tmp_path):
    """The first import of torch is interrupted, which every command needs and --help does not."""
    (tmp_path / "torch.py").write_text(
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); signal.raise_signal(signal.SIGINT)"
    )
    path = os.pathsep.join([str(tmp_path), os.path.dirname(os.path.dirname(testreg.__file__))])
    interrupted = run(*command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)
    assert (interrupted.returncode, interrupted.stderr) == (130, "interrupted; nothing was written\n")


def test_extract_writes_features_and_goes_on_after_an_interrupt(folder, calibrated, tmp_path, monkeypatch, capsys):
    output = tmp_path / "features.safetensors"
    arguments = ["extract", str(folder / "model"), "--images", str(folder / "photos"), "--neurons", str(calibrated)]
    arguments += ["-o", str(output), "--block", "1", "--block", "-1", "--what", "patches", "--half", "--device", "cpu"]
    real, calls = Writer.write, itertools.count(1)

    def interrupted(*written):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*written)

    monkeypatch.setattr(Writer, "write", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([*arguments, "--quiet"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"; the same command goes on from {output}.unfinished" in capsys.readouterr().err
    assert not output.exists()
    assert main([*arguments, "--json", str(tmp_path / "done.json")]) == 0
    said = capsys.readouterr().out
    assert "1 of 91 images could not be read: broken.jpg" in said
    assert "patches.3      91 x 48 x 4 x 4" in said
    assert json.loads((tmp_path / "done.json").read_text())["arrays"]["patches.1"] == [91, 48, 4, 4]
    model = testreg.patch(timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval(), calibrated)
    with safe_open(output, "pt") as found:
        row = json.loads(found.metadata()["images"]).index("44.png")
        features = testreg.features(model, folder / "photos" / "44.png", 1)[0]
        torch.testing.assert_close(found.get_tensor("patches.1")[row].float(), features, rtol=1e-2, atol=1e-2)
    assert main([*arguments, "--plain"]) == 1
    assert "leave --neurons out" in capsys.readouterr().err


def test_a_list_that_is_not_verified_has_an_exit_code_of_its_own(folder, calibrated, tmp_path, monkeypatch, capsys):
    neurons = dataclasses.replace(testreg.RegisterNeurons.load(calibrated), verified=False)
    monkeypatch.setattr(sys.modules["testreg.calibration.calibrate"], "calibrate", lambda *args, **options: neurons)
    arguments = ["calibrate", str(folder / "model"), "--images", str(folder / "photos")]
    assert main([*arguments, "-o", str(tmp_path / "neurons.json")]) == 5
    assert "\nnot verified: " in capsys.readouterr().out
    assert main([*arguments, "-o", str(tmp_path / "neurons.json"), "--quiet"]) == 5
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("not verified: that takes a target that is met, and clean maps, on at least 16 held-out")
    assert not testreg.RegisterNeurons.load(tmp_path / "neurons.json").verified


@pytest.mark.parametrize(("agreement", "said"), [(None, False), (0.995, False), (0.9, True)])
def test_the_agreement_of_a_head_is_shown_if_it_is_low(agreement, said, calibrated):
    neurons = testreg.RegisterNeurons.load(calibrated)
    chosen = Effect(4, 0.0, 2, 0.0, 0.01, 0.01, agreement)
    calibration = dataclasses.replace(neurons.calibration, chosen=chosen)
    text = calibrate.summary(dataclasses.replace(neurons, calibration=calibration))
    assert ("the head agrees with itself on 90.0% of the images" in text) == said


@pytest.mark.parametrize("command", ["demo", "list", "diagnose", "calibrate", "apply", "show", "extract", None])
def test_help_lists_the_exit_codes(command, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--help"] if command is None else [command, "--help"])
    assert exited.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 " in text
    for code, commands in {"3 no outliers": ("diagnose", "calibrate"), "5 neurons": ("calibrate",)}.items():
        assert (code in text) == (command in commands)


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="/proc, where nobody can write, is of Linux")
@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "{model}", "--images", "{photos}", "-o", "/proc/out"],
        ["calibrate", "{model}", "--images", "{photos}", "-o", "{out}", "--report", "/proc/out"],
        ["calibrate", "{model}", "--images", "{photos}", "-o", "{out}", "--figures", "/proc/new/out"],
        ["calibrate", "{model}", "--images", "{photos}", "-o", "{out}", "--resume", "/proc/out"],
        ["diagnose", "{model}", "--images", "{photos}", "--json", "/proc/out"],
        ["apply", "{model}", "-o", "/proc/out"],
        ["show", "{model}", "{photo}", "-o", "/proc/out.png"],
        ["demo", "-o", "/proc/out.png"],
    ],
)
def test_where_nothing_can_be_written_no_model_is_loaded(arguments, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("testreg.io.loading.load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    monkeypatch.setattr("testreg.demo.run.run_demo", lambda: pytest.fail("the demo was run"))
    names = {"model": folder / "model", "photos": folder / "photos", "photo": folder / "photos" / "00.png"}
    assert main([argument.format(**names, out=tmp_path / "out.json") for argument in arguments]) == 1
    assert "cannot write /proc/" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_onto_a_folder_of_others_no_model_is_saved_nor_loaded(folder, monkeypatch, capsys):
    monkeypatch.setattr("testreg.io.loading.load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    assert main(["apply", str(folder / "model"), "-o", str(folder / "photos")]) == 1
    assert "choose a new or an empty folder" in capsys.readouterr().err


def test_show_and_diagnose_take_an_image_or_a_folder(folder, calibrated, tmp_path, capsys, monkeypatch):
    photos = [folder / "photos" / f"{i:02}.png" for i in range(3)]
    (tmp_path / "some").mkdir()
    for photo in photos[1:]:
        shutil.copy(photo, tmp_path / "some")
    shown = []
    monkeypatch.setattr("testreg.report.map_figures.figure", lambda images, *rest: shown.append(images) or plt.figure())
    command = ["show", str(folder / "model"), "--neurons", str(calibrated), "-o", str(tmp_path / "picture.png")]
    assert main([*command, *map(str, photos)]) == main([*command, str(photos[0]), str(tmp_path / "some")]) == 0
    assert torch.equal(*shown)
    assert len(shown[0]) == 3
    monkeypatch.setattr(show, "MAX_SHOWN", 2)
    assert main([*command, str(photos[0]), str(tmp_path / "some")]) == 1
    assert "3 images are too many for one picture, at most 2" in capsys.readouterr().err
    assert main(["diagnose", str(folder / "model"), "--images", str(photos[0]), "--json", "-"]) in (0, 3)
    assert json.loads(capsys.readouterr().out)["images"] == 1


def test_code_of_a_model_is_trusted_only_if_asked(folder, monkeypatch):
    asked = []

    def load_model(*args, trust_remote_code, **options):
        asked.append(trust_remote_code)
        raise ValueError

    monkeypatch.setattr("testreg.io.loading.load_model", load_model)
    for command in (
        ["diagnose", "m", "--images", str(folder / "photos")],
        ["calibrate", "m", "--images", str(folder / "photos"), "-o", str(folder / "out.json")],
        ["apply", "m", "-o", str(folder / "out")],
        ["show", "m", str(folder / "photos" / "00.png"), "-o", str(folder / "out.png")],
    ):
        assert main(command) == main([*command, "--trust-remote-code"]) == 1
    assert asked == [False, True] * 4


@pytest.mark.slow
def test_names_that_are_no_text_or_look_like_markup(folder, tmp_path, capsys):
    """Folders whose names are not UTF-8, or hold HTML and TeX, in the JSON, the report, the figures and the output."""
    marked_up, no_text = tmp_path / "<b>$\\frac{x", tmp_path / os.fsdecode(b"caf\xe9 <i>$")
    try:
        no_text.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    shutil.copytree(folder / "model", marked_up / "model")
    photos = no_text / "photos"
    photos.symlink_to(folder / "photos")
    model, neurons, report = (str(path) for path in (marked_up / "model", no_text / "n.json", no_text / "r.html"))
    outputs = ["-o", neurons, "--report", report, "--figures", str(no_text / "figures")]
    assert main(["calibrate", model, "--images", str(photos), *outputs]) == 0
    text = Path(report).read_text(encoding="utf-8")
    assert "&lt;b&gt;$\\frac{x/model" in text
    assert "caf\\udce9 &lt;i&gt;$/photos" in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert "caf\\udce9 <i>$/n.json: 4 register neurons" in capsys.readouterr().out
    assert testreg.RegisterNeurons.load(neurons).calibration.source == str(photos)
    picture = no_text / "picture.png"
    assert main(["show", model, str(photos / "00.png"), "--neurons", neurons, "-o", str(picture)]) == 0
    assert picture.is_file()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folder, tmp_path):
    """Two processes share the images out; sums are added in another order, hence 1e-5."""
    command = ["calibrate", str(folder / "model"), "--images", str(folder / "photos"), "--batch-size", "5"]
    command += ["--device", "cpu"]
    assert main([*command, "-o", str(tmp_path / "one.json")]) == 0
    state = ["--resume", str(tmp_path / "state.safetensors")]
    shared = [*command, "-o", str(tmp_path / "two.json"), *state]
    done = torchrun(2, shared)
    assert done.returncode == 0, done.stderr
    one, two = (testreg.RegisterNeurons.load(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert done.stdout.count("register neurons, and the ranking") == 1
    assert one.by_block() == two.by_block()
    scores = [{neuron[:2]: neuron[2] for neuron in each.ranking} for each in (one, two)]
    common = scores[0].keys() & scores[1].keys()
    assert len(common) > 0.9 * len(scores[0])
    assert all(scores[0][neuron] == pytest.approx(scores[1][neuron], rel=1e-5, abs=1e-5) for neuron in common)
    for key in ("images", "held_out", "unreadable_images", "outlier_fraction", "images_with_outliers", "stability"):
        assert getattr(one.calibration, key) == getattr(two.calibration, key), key
    chosen = [each.calibration.chosen.to_json() for each in (one, two)]
    assert chosen[0] == pytest.approx(chosen[1], abs=1e-5)
    again = tmp_path / "again.json"  # the state of two processes, continued by one
    assert main([*command, "-o", str(again), *state]) == 0
    assert testreg.RegisterNeurons.load(again).ranking == two.ranking


@pytest.mark.slow
def test_of_two_processes_of_torchrun_one_says_what_was_diagnosed(folder, tmp_path):
    arguments = ["diagnose", str(folder / "model"), "--images", str(folder / "photos"), "--device", "cpu"]
    done = torchrun(2, [*arguments, "--json", str(tmp_path / "diagnosis.json")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("outliers from block 2 (MLP)") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["diagnosis.json"]


@pytest.mark.parametrize(("environment", "said"), [({}, 1), ({"RANK": "0"}, 1), ({"RANK": "1"}, 0)])
def test_nothing_to_fix_is_said_by_the_first_process(environment, said, folder, monkeypatch, capsys):
    def calibrate(*args, **options):
        raise testreg.NoOutliersError("nothing to fix")

    if environment:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("testreg.io.processes.process_group", contextlib.nullcontext)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.modules["testreg.calibration.calibrate"], "calibrate", calibrate)
    arguments = [str(folder / "model"), "--images", str(folder / "photos"), "-o", str(folder / "out.json")]
    assert main(["calibrate", *arguments]) == 3
    assert capsys.readouterr().err.count("nothing to fix") == said


def test_calibrate_writes_the_report_and_the_figures(folder, tmp_path, capsys):
    report, figures, output = tmp_path / "report.html", tmp_path / "figures", tmp_path / "neurons.json"
    command = ["calibrate", str(folder / "model"), "--images", str(folder / "photos"), "-o", str(output)]
    command += ["--image-size", "64", "--image-size", "96", "--report", str(report), "--figures", str(figures)]
    assert main(command) == 0
    text = report.read_text()
    assert f"testreg {' '.join(command)}" in text
    assert "4 register neurons: all of the outlier patches are gone" in text
    assert {path.name for path in figures.iterdir()} == {"norms.png", "histograms.png", "curve.png", "maps.png"}
    out = capsys.readouterr().out
    assert "measured on 29 others at 64 x 64" in out
    assert "measured on 29 others at 96 x 96" in out
    assert out.endswith(f"{report}\n{figures}\n")


@records
@pytest.mark.slow
def test_the_demo_model_is_a_model_like_others(folder, tmp_path, capsys):
    assert main(["diagnose", "demo", "--images", str(folder / "photos"), "--image-size", "64"]) == 0
    assert "outliers from block 3 (MLP)" in capsys.readouterr().out
    photo = str(folder / "photos" / "00.png")
    assert main(["show", "demo", photo, "-o", str(tmp_path / "picture.png")]) == 0
    assert main(["apply", "demo", "-o", str(tmp_path / "patched")]) == 0
    assert testreg.is_patched(testreg.load(tmp_path / "patched"))


# What all commands have in common -------------------------------------------------------------------------------------


@pytest.fixture
def commands(folder, calibrated, tmp_path):
    """Each command, on the small models, with what is left of its output with -q."""
    model, photos, photo = (str(folder / name) for name in ("model", "photos", "photos/00.png"))
    neurons, picture, patched = (str(tmp_path / name) for name in ("n.json", "p.png", "patched"))
    calibrating = ["calibrate", model, "--images", photos, "-o", neurons, "--top-k", "4", "--num-images", "60"]
    return {
        "list": (["list"], "\n".join(testreg.bundled())),
        "diagnose": (["diagnose", model, "--images", photos, "--num-images", "20"], "outliers from block 2 (MLP), "),
        "calibrate": (calibrating, f"{neurons}: 4 register neurons, and the ranking they are from"),
        "apply": (["apply", model, "--neurons", str(calibrated), "-o", patched], f"{patched}: patched checkpoint of"),
        "show": (["show", model, photo, "--neurons", str(calibrated), "-o", picture], f"picture:    {picture}"),
    }


COMMANDS = ("list", "diagnose", "calibrate", pytest.param("apply", marks=records), "show")
RESULTS = {
    "list": lambda found: {each["name"] for each in found} == set(testreg.bundled()),
    "diagnose": lambda found: found["kind"] == "movable",
    "calibrate": lambda found: list(found["neurons"]) == ["2"] and found["calibration"]["seed"] == 0,
    "apply": lambda found: list(found["neurons"]) == ["2"] and Path(found["output"]).is_dir(),
    "show": lambda found: (
        found["block"] in (2, 3) and found["after"].keys() == found["before"].keys() > {"max_over_median"}
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_shows_the_result_alone(command, commands, capsys):
    arguments, result = commands[command]
    assert main([*arguments, "-q"]) in (0, 5)
    said = capsys.readouterr()
    assert said.out.startswith(result)
    assert said.out.count("\n") == result.count("\n") + 1
    assert said.err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_result_is_json_if_asked(command, commands, tmp_path, capsys):
    arguments, _ = commands[command]
    file = tmp_path / "result.json"
    to_output = command in ("list", "show")
    assert main([*arguments, "--json", "-" if to_output else str(file)]) in (0, 5)
    out = capsys.readouterr().out
    assert RESULTS[command](json.loads(out if to_output else file.read_text()))
    assert to_output or "{" not in out


def test_without_a_terminal_a_line_says_what_is_under_way(commands, tmp_path, capsys):
    arguments, _ = commands["calibrate"]
    report = tmp_path / "r.html"
    assert main([*arguments, "--report", str(report)]) in (0, 5)
    lines = capsys.readouterr().err.splitlines()
    phases = ["testreg: diagnosing", "testreg: ranking", "testreg: measuring for the report"]
    assert [line.partition(",")[0] for line in lines] == phases
    assert "testreg.patch(model, " in report.read_text()


def test_the_dtype_is_that_of_the_model(commands, monkeypatch, capsys):
    seen = []
    real = importlib.import_module("testreg.measure.diagnose").diagnose
    monkeypatch.setattr(
        sys.modules["testreg.measure.diagnose"],
        "diagnose",
        lambda model, *args, **options: seen.append(next(model.parameters()).dtype) or real(model, *args, **options),
    )
    arguments, _ = commands["diagnose"]
    assert main([*arguments, "--dtype", "bfloat16", "-q"]) == 0
    assert seen == [torch.bfloat16]


def test_diagnose_writes_a_page(commands, tmp_path, capsys):
    arguments, _ = commands["diagnose"]
    report = tmp_path / "d.html"
    assert main([*arguments, "--report", str(report)]) == 0
    assert "<h1>Outliers from block 2 (MLP)" in report.read_text()
    assert f"testreg {' '.join(arguments)}" in report.read_text()
    said = capsys.readouterr()
    assert said.out.endswith(f"{report}\n")
    assert said.err == "testreg: diagnosing, up to 20 images\ntestreg: measuring for the report\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "m", "--images", "{photos}", "-o", "{tmp}/n.txt"], "name a .json file"),
        (["calibrate", "m", "--images", "{photos}", "-o", "{tmp}/n.json", "--report", "{tmp}/r.pdf"], ".html or .htm"),
        (["diagnose", "m", "--images", "{photos}", "--report", "{tmp}/r.txt"], "name a .html or .htm file"),
        (["show", "m", "{photos}", "-o", "{tmp}/p.gif"], "name a .png or .jpg or .jpeg or .webp or .pdf or .svg file"),
        (["list", "--json", "{tmp}/none/list.json"], "there is no folder"),
        (["apply", "m", "-o", "{tmp}/a", "--json", "{photos}"], "is a folder: name a file"),
    ],
)
def test_outputs_are_checked_before_the_work(arguments, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("testreg.io.loading.load_model", lambda *args, **options: pytest.fail("a model was loaded"))
    assert main([argument.format(photos=folder / "photos", tmp=tmp_path) for argument in arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bare_name_of_the_hub_is_understood(folder, capsys):
    assert main(["diagnose", "facebook/dinov2-small", "--images", str(folder / "photos")]) == 1
    assert "did you mean hf:facebook/dinov2-small?" in capsys.readouterr().err


def test_libraries_are_heard_only_with_verbose(monkeypatch, capsys):
    """The first command that anything is done by: what a library does, and what testreg itself warns of."""

    def bundled():
        warnings.warn("of a library", stacklevel=1)
        logging.getLogger("timm").warning("logged by a library")
        logging.getLogger("testreg").info("logged by testreg")
        with pytest.warns(testreg.UnverifiedNeuronsWarning) if "-v" in given else contextlib.nullcontext():
            warn_of_unverified(testreg.RegisterNeurons(((1, 2, None),), source="here"))
        print("bars", os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
        return {}

    monkeypatch.setattr("testreg.neurons.bundled", bundled)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    given = ["list"]
    assert main(given) == 0
    said = capsys.readouterr()
    assert said.err.startswith("testreg: warning: the register neurons of here are not verified")
    assert said.err.count("\n") == 1
    assert said.out.startswith("bars 1\n")
    given = ["list", "-v"]
    with pytest.warns(UserWarning, match="of a library"):
        assert main(given) == 0
    said = capsys.readouterr()
    assert "testreg: logged by testreg" in said.err
    assert said.out.startswith("bars None\n")
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ


@pytest.mark.parametrize(("typed", "completed"), [("cal", "calibrate"), ("diagnose --dt", "--dtype")])
def test_shells_complete_commands_and_options(typed, completed):
    words = f"testreg {typed}"
    environment = {"_TESTREG_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert run(env={**os.environ, **environment}).stdout.split() == [completed]


def test_another_process_says_nothing_of_its_phases(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with Invocation((), False, False, None, False).phase("measuring"):
        pass
    assert capsys.readouterr().err == ""


def test_the_scores_of_the_command_are_those_of_calibration():
    of_command = inspect.signature(calibrate.calibrate, eval_str=True).parameters["score"]
    of_python = inspect.signature(testreg.calibrate).parameters["score"]
    assert typing.get_args(typing.get_args(of_command.annotation)[0]) == typing.get_args(Score)
    assert of_command.default == of_python.default
