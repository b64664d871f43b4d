"""`scripts/benchmark`: that it measures what it says; no test looks at a time."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import pytest
import timm
import torch
from benchmark.__main__ import main
from benchmark.against import modules_of, patched_by, released_pass, scores_by_hooks
from benchmark.measuring import compared, count_operations, in_own_process, keep_freed_memory
from benchmark.merging import merge_for_attention, merge_for_good
from benchmark.models import MadeImages, one_more_token, twin
from benchmark.processes import half_written
from PIL import Image
from planting import plant
from tiny import TIMM, build
from torch import nn

import testreg
from testreg.families import find_tower

ARGS = argparse.Namespace(device="cpu", against=None)
# The least that has the names and signatures of the released code's two modules: the tests' own, not a copy.
RELEASED = {
    "hook_manager": """
import enum
import numpy as np

HookMode = enum.Enum("HookMode", ["ANALYSIS", "INTERVENE"])

class HookManager:
    def __init__(self, model):
        self.handles, self.hidden, self.outputs = [], [], []

    def reinit(self, mode=HookMode.ANALYSIS):
        self.mode, self.moved = mode, {}
        for handle in self.handles:
            handle.remove()
        for kept in (self.handles, self.hidden, self.outputs):
            kept.clear()

    def intervene_register_neurons(self, num_registers, neurons_to_ablate):
        self.moved = neurons_to_ablate

    def finalize(self):
        for layer in range(self.num_layers()):
            hidden, output = self.neuron_activation_component(layer), self.layer_output_component(layer)
            if layer in self.moved:
                self.on(hidden, lambda value, units=self.moved[layer]: self.move(value, units))
            if self.mode == HookMode.ANALYSIS:
                self.on(hidden, lambda value: self.hidden.append(value.numpy()))
                self.on(output, lambda value: self.outputs.append(value.numpy()))

    def on(self, module, action):
        self.handles.append(module.register_forward_hook(lambda _, inputs, output: action(output)))

    def move(self, value, units):
        own = value[0, :, units]
        value[0, -1, units] = own.gather(0, own.abs().argmax(0, keepdim=True))[0]
        value[0, :-1, units] = 0

    def get_neuron_activations(self):
        return np.concatenate(self.hidden)

    def get_layer_outputs(self):
        return np.concatenate(self.outputs)
""",
    "algorithms": """
import glob
import numpy as np
from PIL import Image

def find_register_neurons(model_state, image_path, register_norm_threshold, device, processed_image_cnt):
    hooks, found = model_state["hook_manager"], []
    for path in sorted(glob.glob(image_path + "/*.png"))[:processed_image_cnt]:
        hooks.reinit()
        hooks.finalize()
        model_state["run_model"](model_state["model"], model_state["preprocess"](Image.open(path)).unsqueeze(0))
        outliers = np.linalg.norm(hooks.get_layer_outputs()[-1], axis=-1) > register_norm_threshold
        if outliers.any():
            found.append(np.abs(hooks.get_neuron_activations()[:, outliers]).mean(1))
    scores = np.mean(found, axis=0)
    assert scores.shape == (model_state["num_layers"], model_state["num_neurons_per_layer"])
    ranked = sorted(np.ndenumerate(scores), key=lambda item: -item[1])
    return [(layer, unit, score) for (layer, unit), score in ranked]
""",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "shared").mkdir(parents=True)
    for name, text in RELEASED.items():
        (folder / "shared" / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The eight images as files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(brightness()):
        pixels = (255 * image.permute(1, 2, 0)).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def brightness() -> torch.Tensor:
    """Eight images (3, 64, 64) of bright and dark patches, within 0 and 1."""
    return torch.stack([MadeImages(8)[index] for index in range(8)]) / 1.5 + 0.5


def planted() -> tuple[nn.Module, set[tuple[int, int]]]:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", **{**TIMM, "patch_size": 8, "num_classes": 0}).eval()
    neurons = plant(model, brightness(), num_neurons=4).neurons
    return model, {(block, unit) for block, units in neurons.items() for unit in units}


def test_operations_are_those_of_products_and_attention():
    linear, query = nn.Linear(6, 5), torch.randn(2, 3, 10, 4, requires_grad=True)  # images, heads, tokens, width

    @torch.enable_grad()
    def run():
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        with torch.no_grad():
            linear(torch.randn(7, 6))

    product = 2 * 3 * 10 * 10 * 4 * 2  # of queries and keys; a forward has two of these, its backward five
    assert count_operations(run)[1] == 7 * 6 * 5 * 2 + (2 + 5) * product


def test_one_more_token_is_in_the_blocks_alone() -> None:
    plain = build("timm_vit")
    longer, seen = one_more_token(twin(plain)), []
    for each in find_tower(longer).blocks:
        each.module.norm1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    images = torch.rand(2, 3, 64, 64)
    tokens, longer_tokens = plain.forward_features(images), longer.forward_features(images)
    assert seen == [18] * 4
    assert longer_tokens.shape == tokens.shape == (2, 17, 48)
    assert not torch.allclose(tokens, longer_tokens)  # which attend to it
    # a register that nothing is moved to
    silent = testreg.patch(twin(plain), {0: [0]})
    with torch.no_grad():
        for model in (longer, silent):
            model.blocks[0].mlp.fc2.weight[:, 0] = 0
        torch.testing.assert_close(longer.forward_features(images), silent.forward_features(images))


def test_merged_patches_are_fewer_in_attention_or_for_good() -> None:
    pytest.importorskip("tomesd")
    plain, images = build("timm_vit"), torch.rand(2, 3, 64, 64)
    half, fewer = merge_for_attention(twin(plain), 8), merge_for_good(twin(plain), 2)
    seen: list[int] = []
    for block in half.blocks:
        block.attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    tokens, expected = half.forward_features(images), plain.forward_features(images)
    assert seen == [17 - 8] * 4
    assert tokens.shape == expected.shape
    assert not torch.allclose(tokens, expected)
    assert fewer.forward_features(images).shape[1] == 17 - 4 * 2


def test_times_are_compared_turn_by_turn() -> None:
    times = {"plain": [1.0, 2.0, 4.0], "patched": [2.0, 2.0, 6.0], "floor": [1.0, 4.0, 4.4], "noise": [0.5, 2.0, 4.0]}
    assert compared(times) == {
        "plain_ms": 2000.0,
        "patched_ms": 2000.0,
        "ratio": 1.5,
        "interval_95": "1.000-2.000",
        "floor": 1.1,
        "noise": 1.0,
        "turns": 3,
    }
    a_hundred = {"plain": [1.0] * 100, "patched": [float(ratio) for ratio in range(1, 101)]}
    assert compared(a_hundred)["interval_95"] == "40.000-61.000"  # the binomial distribution's 2.5 % quantile is 40


def fewest_faults_of_a_tensor() -> int:
    """Page faults of the allocation of 64 MiB, which have just been freed."""
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    return min(faults() for _ in range(10))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is known to give memory back")
def test_freed_memory_is_kept() -> None:
    assert in_own_process(fewest_faults_of_a_tensor) < 1000  # 16384 where it was given back


@pytest.mark.slow
def test_a_process_of_its_own() -> None:
    assert in_own_process(os.getppid) == os.getpid()


def test_made_images_are_the_same_each_time() -> None:
    images = MadeImages(3)
    assert torch.equal(images[2], MadeImages(3)[2])
    assert not torch.equal(images[2], images[1])
    assert images.read == {1, 2}


def test_what_was_half_written_is_noticed(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    assert half_written(tmp_path) == [state]
    options = {"top_k": 4, "held_out": 0, "score": "activation", "progress": False}
    testreg.calibrate(planted()[0], brightness(), resume=state, **options)
    assert half_written(tmp_path) == []
    temporary = tmp_path / ".state.safetensors.1.testreg-part"
    temporary.write_bytes(state.read_bytes()[:100])
    assert half_written(tmp_path) == [temporary]


def test_hooks_that_keep_all_activations_rank_the_planted_neurons_first(pictures: Path) -> None:
    model, expected = planted()
    scores = scores_by_hooks(model, pictures, ARGS)
    assert scores.shape == (4, 192)
    assert {divmod(index, 192) for index in scores.flatten().topk(4).indices.tolist()} == expected


def test_the_released_code_is_asked_by_its_own_names(checkout: Path, pictures: Path, monkeypatch) -> None:
    for name in ("shared", "shared.algorithms", "shared.hook_manager"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    model, expected = planted()
    ranked = released_pass(twin(model), pictures, argparse.Namespace(device="cpu", against=checkout))
    assert {(block, unit) for block, unit, _ in ranked[:4]} == expected

    units: dict[int, list[int]] = {}
    for block, unit in sorted(expected):
        units.setdefault(block, []).append(unit)
    image = brightness()[:1]
    theirs, ours = patched_by(modules_of(checkout), twin(model), units), testreg.patch(twin(model), units)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), ours(image))
        assert not torch.allclose(model(image), ours(image))


@pytest.mark.parametrize(
    ("made", "message"),
    [((), "no such folder"), (("shared",), "it has no shared/algorithms.py")],
)
def test_a_folder_that_is_no_checkout(made: tuple[str, ...], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    for name in made:
        (folder / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "against", "--against", str(folder)])
    assert str(stopped.value) == (
        f"--against {folder}: {message}; looked for a checkout of github nickjiang2378/test-time-registers, "
        "which has shared/algorithms.py and shared/hook_manager.py"
    )


@pytest.mark.slow
def test_rows_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.forward.TRAINING_BATCH", 1)
    output = tmp_path / "numbers.json"
    options = ["--model", "vit_tiny_patch16_224", "--quick", "--dtype", "fp32", "--repeats", "1"]
    main(["--only", "forward", "training", "operations", *options, "--json", str(output)])
    written = json.loads(output.read_text())
    for part in ("forward", "training"):
        (row,) = written[part]
        assert row["batch"] == 1
        assert {"plain_ms", "patched_ms", "ratio", "one_more_token", "noise"} <= row.keys()
    assert "one_more_token" in capsys.readouterr().out
    rows = {row["operation"].strip(): row for row in written["operations"]}
    assert rows["aten::index_copy_"]["more_calls"] == 6  # in the blocks with register neurons
    assert "aten::addmm" not in rows

    def arithmetic(tokens: int) -> int:  # of a ViT-Ti/16 at 224
        block = 2 * tokens * 192 * (3 * 192 + 192 + 2 * 768) + 4 * tokens**2 * 192
        return 12 * block + 2 * 196 * 768 * 192 + 2 * 192 * 1000

    token = arithmetic(198) / arithmetic(197) - 1
    assert rows["arithmetic of a token"]["of_the_forward"] == f"{token:.4%}"
