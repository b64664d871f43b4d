"""Small numbers by simulation: what is rounded, to which values, and what is left alone."""

import importlib

import pytest
import torch
import transformers
from quantisation.fake import PLAIN, Network, Setting, linears, quantised, ranges_of, reading, rounded
from quantisation.tables import of_gaps, of_knn, of_nearness, of_own, of_real
from tiny import HF, IMAGE
from torch import Tensor, nn

from testreg.neurons import RegisterNeurons

LARGEST = Setting(8, "largest", symmetric=True)


def test_the_command_starts(capsys: pytest.CaptureFixture[str]) -> None:
    """All that it imports from testreg and from the other scripts is there."""
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module("quantisation.__main__").main(["--help"])
    assert "--photographs" in capsys.readouterr().out


def test_rounding_by_hand() -> None:
    rows = torch.tensor([[-0.6, 0.2, 2.0, 9.0]])
    symmetric = rounded(rows, torch.tensor([-1.0]), torch.tensor([2.0]), Setting(3, "token", symmetric=True))
    torch.testing.assert_close(symmetric, torch.tensor([[-2 / 3, 0.0, 2.0, 2.0]]))  # -4 to 3 steps of 2 / 3
    asymmetric = rounded(rows, torch.tensor([-1.0]), torch.tensor([2.0]), Setting(2, "token"))
    torch.testing.assert_close(asymmetric, torch.tensor([[-1.0, 0.0, 2.0, 2.0]]))  # 3 steps of 1, from -1
    positive = rounded(torch.tensor([[3.0, 6.0]]), torch.tensor([3.0]), torch.tensor([6.0]), Setting(2, "token"))
    torch.testing.assert_close(positive, torch.tensor([[4.0, 6.0]]))  # 0 is a value, so that the steps are of 2


class Linear(nn.Module):
    """One linear that hands on what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens)


@pytest.mark.parametrize("scale", ["largest", "image", "token"])
@torch.no_grad()
def test_registers_are_in_the_tensor_or_not(scale: str) -> None:
    """A register of 1270 makes steps of 10, in which the values of the tokens are lost."""
    tokens = torch.tensor([[[1.27, 0.4], [-1.27, 0.1], [1270.0, 640.0]]])
    setting, found = Setting(8, scale, symmetric=True), {}
    for place in ("together", "apart", "float"):
        network = Network(Linear(), 1, place)
        ranges = ranges_of(network, lambda network=network: network.model(tokens))
        with quantised(network, setting, ranges):
            found[place] = network.model(tokens)
        assert network.model(tokens).equal(tokens)
    exact = torch.tensor([[[1.27, 0.4], [-1.27, 0.1]]])
    torch.testing.assert_close(found["apart"][:, :2], exact)
    torch.testing.assert_close(found["float"][:, :2], exact)
    torch.testing.assert_close(found["together"][:, :2], exact if scale == "token" else torch.zeros(1, 2, 2))
    assert found["float"][0, 2].tolist() == [1270.0, 640.0]


@torch.no_grad()
def test_in_front_of_the_block_that_registers_enter_there_are_only_tokens() -> None:
    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF)).eval()
    neurons = RegisterNeurons.from_json({**RegisterNeurons.from_blocks({1: [3], 2: [4]}).to_json(), "start": "mean"})
    pixels, lengths = torch.randn(2, 3, IMAGE, IMAGE), {}

    def look(name: str, tokens: Tensor) -> Tensor:
        lengths.setdefault(name, []).append(tokens.shape[1])
        return tokens

    column = importlib.import_module("quantisation.__main__").column
    with column(model, "apart", neurons, pixels) as network, reading(network, look):
        model(pixels)
    assert lengths["vision_model.encoder.layers.0.mlp.fc2"] == [17]
    assert "vision_model.encoder.layers.0.mlp.fc2, registers" not in lengths
    for block in (1, 2, 3):
        assert lengths[f"vision_model.encoder.layers.{block}.mlp.fc2"] == [17]
        assert lengths[f"vision_model.encoder.layers.{block}.mlp.fc2, registers"] == [1]


@torch.no_grad()
def test_weights_are_rounded_and_restored() -> None:
    model = Linear()
    model.linear.weight.copy_(torch.tensor([[3.0, 1.2], [0.3, -0.1]]))
    before, ones = model.linear.weight.clone(), torch.ones(1, 1, 2)
    with quantised(Network(model), Setting(3, None, weights=True), {}):
        torch.testing.assert_close(model(ones), torch.tensor([[[4.0, 0.2]]]))  # steps of 1 and of 0.1
    assert model.linear.weight.equal(before)


@torch.no_grad()
def test_all_linears_of_a_clip_are_quantised() -> None:
    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF)).eval()
    pixels, seen = torch.randn(2, 3, IMAGE, IMAGE), set()

    def look(name: str, tokens: Tensor) -> Tensor:
        seen.add(name)
        return tokens

    with reading(Network(model), look):
        exact = model(pixels).image_embeds
    assert seen == set(linears(model))
    ranges = ranges_of(Network(model), lambda: model(pixels))
    with quantised(Network(model), LARGEST, ranges):
        small = model(pixels).image_embeds
    assert not small.equal(exact)
    assert nn.functional.cosine_similarity(small, exact).min() > 0.99


def test_tables_by_hand() -> None:
    metric = {"values": {PLAIN: 0.5, "float": 0.75, "together": 0.25}}
    metric["difference"] = {"float": [0.25, 0.125, 0.375], "together": [-0.25, -0.5, 0.125]}
    same = {"own": metric, "plain": metric}
    recipe = {"values": {PLAIN: 0.5, "together": 0.25, "recipe": 0.75}}
    recipe["difference"] = {"together": [-0.25, -0.5, 0.125], "recipe": [0.25, 0.125, 0.375]}
    made = {
        "note": "tiny",
        "embed": {"settings": {"float": same}},
        "knn": {"settings": {"float": {"top1": metric}}},
        "torchao": {"settings": {"8 bit": {"own": recipe}}},
    }
    for table in (of_own(made), of_nearness(made)):
        assert table.splitlines()[-1] == "| float | 0.500 | **0.750** | 0.250 |"
    assert of_gaps(made).splitlines()[-1] == ("| float | plain | +0.250 [+0.125, +0.375] | -0.250 [-0.500, +0.125] |")
    assert of_knn(made).splitlines()[-1] == (
        "| float | 0.500 | 0.750 | 0.250 | +0.250 [+0.125, +0.375] | -0.250 [-0.500, +0.125] |"
    )
    assert of_real(made).splitlines()[-1].endswith("| own | 0.500 | 0.250 | 0.750 | +0.250 [+0.125, +0.375] |")
