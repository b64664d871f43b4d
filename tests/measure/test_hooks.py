"""Hooks see inputs and outputs of modules, and are gone afterwards."""

import pytest
import torch
from torch import Tensor, nn

from testreg.measure.hooks import recording_inputs, recording_outputs


class Pair(nn.Module):
    """Gives its argument twice."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens + 1, tokens


def num_hooks(*modules: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules)


def test_inputs_and_outputs_come_with_the_number_of_the_module() -> None:
    first, second = nn.Identity(), Pair()
    seen: list[tuple[str, int, float]] = []
    with (
        recording_inputs([first, second], lambda i, tokens: seen.append(("in", i, tokens.item()))),
        recording_outputs([first, second], lambda i, tokens: seen.append(("out", i, tokens.item()))),
    ):
        second(tokens=first(torch.tensor(3.0)))  # by name as well
    assert seen == [("in", 0, 3.0), ("out", 0, 3.0), ("in", 1, 3.0), ("out", 1, 4.0)]
    second(first(torch.tensor(3.0)))
    assert len(seen) == 4


@pytest.mark.parametrize("recording", [recording_inputs, recording_outputs])
def test_no_hook_stays_after_an_error(recording) -> None:
    first, second = nn.Identity(), Pair()
    with pytest.raises(ZeroDivisionError), recording([first, second], lambda i, tokens: 1 / 0):
        second(first(torch.tensor(3.0)))
    assert num_hooks(first, second) == 0
    with pytest.raises(AttributeError), recording([first, None], lambda i, tokens: None):
        pass
    assert num_hooks(first) == 0
