"""Which Vision Transformers testreg supports: every one that the libraries can build, checked and counted.

    python scripts/coverage.py                        # all: some minutes on two cores, nothing is downloaded
    python scripts/coverage.py --library timm --match dinov2

Each architecture is built with random weights, and patched with three neurons in two layers. It is *supported* if

- every public output has the shape that it has without the patch, and the state_dict the same keys;
- every public output of a batch equals the reference's, below, and those of its images one by one;
- the patch changes something, and after `unpatch` every output is bit for bit what it was.

It is *refused* if testreg has a reason why the method does not fit, and *absent* if the installed release of the
library does not have it. Anything else counts as failed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from architectures import Absent, Architecture, every, randomise
from torch import Tensor, nn
from tqdm import tqdm

import testreg
from testreg.families import Tower, find_tower

TOLERANCE = 1e-4  # in float32, of the largest value of an output
LOUDNESS = 20.0
LIBRARIES = ("timm", "open_clip", "transformers", "torchvision", "hub")


@dataclass(frozen=True)
class Verdict:
    library: str
    name: str
    word: str
    """supported, refused, absent or FAILED."""
    reason: str = ""


def check(architecture: Architecture) -> Verdict:
    """The verdict on one architecture."""
    verdict = lambda word, reason="": Verdict(architecture.library, architecture.name, word, reason)
    try:
        refusal = _check(architecture)
    except Absent as reason:
        return verdict("absent", str(reason))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return verdict("FAILED", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
    return verdict("refused", refusal) if refusal else verdict("supported")


@torch.no_grad()
def _check(architecture: Architecture) -> str:
    """The reason for which the architecture is refused, or "" if it is supported; raises if it fails."""
    torch.manual_seed(0)
    model = randomise(architecture.build()).eval()
    try:
        tower = find_tower(model)
    except ValueError as error:
        refusal = re.search(r"(?<=cannot be patched: in ).*|holds several vision towers.*", str(error))
        if refusal is None:
            raise
        return refusal[0]
    run = lambda *numbers: _tensors(architecture.run(model, numbers))
    keys = list(model.state_dict())
    neurons = _loud_neurons(tower, lambda: run(0, 1))
    plain = run(0, 1)
    with explicit_register(tower, neurons):
        references = [run(0), run(1)]
    _same("the reference left something", run(0, 1), plain, exactly=True)

    testreg.patch(model, neurons)
    patched = run(0, 1)
    if list(model.state_dict()) != keys:
        raise AssertionError("the keys of the state_dict changed")
    shapes = {name: tensor.shape for name, tensor in plain.items()}
    if (changed := {name: tensor.shape for name, tensor in patched.items()}) != shapes:
        raise AssertionError(f"shapes changed: {_first_difference(shapes, changed)}")
    if all(torch.equal(patched[name], plain[name]) for name in plain):
        raise AssertionError("the patch changes nothing")
    singles = [run(0), run(1)]
    _same("a batch differs from its images one by one", patched, _joined(singles))
    _same("differs from the explicit register", patched, _joined(references))

    testreg.unpatch(model)
    _same("unpatch is not exact", run(0, 1), plain, exactly=True)
    return ""


def _loud_neurons(tower: Tower, run: Callable[[], Any]) -> dict[int, list[int]]:
    """Three neurons in two layers, made to write much, as register neurons do: what happens to them must show.

    They are those that are loudest on the last token, so that padding is seen to be left out. Where a block has
    several MLPs, the two of the first layer are in different ones.
    """
    scores: dict[int, Any] = {0: 0, 1: 0, 2: 0}

    def record(key: int, first: int, hidden: Tensor) -> None:
        tokens = hidden.transpose(0, 1) if tower.sequence_first else hidden.view(-1, *hidden.shape[-2:])
        magnitude = tokens[..., first:].abs()  # (B, T, H)
        ratio = magnitude[:, -1] / magnitude.amax(1).clamp(min=1e-6)
        scores[key] = scores[key] + ((ratio == 1) + 1e-3 * ratio).sum(0)

    with ExitStack() as stack:
        for key, (layer, index) in enumerate([(0, 0), (0, -1), (1, 0)]):
            mlp = tower.blocks[layer].mlps[index]
            hook = lambda module, args, key=key, first=mlp.first: record(key, first, args[0])
            stack.callback(mlp.down.register_forward_pre_hook(hook).remove)
        run()
    if len(tower.blocks[0].mlps) == 1:
        first, second = scores[0].topk(2).indices.tolist()
    else:
        first, second = int(scores[0].argmax()), tower.blocks[0].mlps[0].width + int(scores[1].argmax())
    neurons = {0: [first, second], 1: [int(scores[2].argmax())]}
    for layer, units in neurons.items():
        start = 0
        for mlp in tower.blocks[layer].mlps:
            mlp.columns[:, [unit - start for unit in units if start <= unit < start + mlp.width]] *= LOUDNESS
            start += mlp.width
    return neurons


def _tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors that are nested in an output, by their path."""
    if isinstance(output, Tensor):
        return {name: output.detach().clone()}
    if isinstance(output, Mapping):
        parts: Any = output.items()
    elif isinstance(output, list | tuple):
        parts = enumerate(output)
    else:
        return {}
    return {path: tensor for key, part in parts for path, tensor in _tensors(part, f"{name}.{key}").items()}


def _joined(singles: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of some images, one behind the other."""
    first = singles[0]
    return {name: torch.cat([each[name] for each in singles]) if first[name].ndim else first[name] for name in first}


def _same(what: str, ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, exactly: bool = False) -> None:
    for name, tensor in ours.items():
        other = expected[name]
        if exactly and not torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(other)):
            raise AssertionError(f"{what}: {name}")
        if tensor.shape != other.shape:
            raise AssertionError(f"{what}: {name} is {tuple(tensor.shape)}, not {tuple(other.shape)}")
        error = (tensor.double() - other.double()).abs().max() if tensor.numel() else torch.tensor(0.0)
        scale = other.double().abs().max().clamp(min=1e-3) if tensor.numel() else 1.0
        if not error <= TOLERANCE * scale:
            raise AssertionError(f"{what}: {name} by {float(error / scale):.1e} of its largest value")


def _first_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            return f"{name} is {found.get(name)}, not {expected.get(name)}"
    return "the order of the outputs"


# The reference: one image at a time, and an explicit token behind all others ------------------------------------------

Forward = Callable[..., Any]


@contextmanager
def explicit_register(tower: Tower, neurons: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """While active, the blocks of the unpatched tower run with one more token, which is a plain variable here.

    For one image, so that there is neither padding nor packing: whatever goes beside the tokens gets one more row by
    its shape alone. Shares no code with `testreg.patch`; where the parts of the tower are comes from the same table.
    """
    register: list[Tensor] = []
    padding: list[int] = []
    dim = 0 if tower.sequence_first else -2

    def block(original: Forward, first: bool) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            tokens = args[0] if args else kwargs[next(iter(kwargs))]
            if first:
                token = tokens.new_zeros(1, 1, tokens.shape[-1])
                if tower.entry_norm is not None:
                    token = type(tower.entry_norm).forward(tower.entry_norm, token)
                shape = list(tokens.shape)
                shape[dim] = 1
                register[:] = [token.flatten().expand(shape)]
            longer = torch.cat([tokens, register[0]], dim)
            count = tokens.shape[dim]
            padding[:] = _padding((*args, *kwargs.values()), count)
            extend = lambda extra: longer if extra is tokens else _one_more(extra, count, tower.num_prefix)
            output = original(*map(extend, args), **{name: extend(extra) for name, extra in kwargs.items()})
            lane = output[0] if isinstance(output, tuple) else output
            if lane.shape != longer.shape:  # DINO's block, asked for its attention weights
                return output
            register[:] = [lane.narrow(dim, count, 1)]
            tokens = lane.narrow(dim, 0, count)
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

        return forward

    def reader(original: Forward, units: Sequence[int]) -> Forward:
        def forward(hidden: Tensor, *args: Any) -> Any:
            hidden = hidden.clone()
            batch = hidden.transpose(0, 1) if tower.sequence_first else hidden.view(-1, *hidden.shape[-2:])
            for sequence in batch:  # (T+1, H): one image may be several crops or frames
                for unit in units:
                    magnitude = sequence[:, unit].abs()
                    magnitude[padding] = -1
                    loudest = sequence[:, unit][magnitude.argmax()].clone()
                    sequence[_patches(tower, len(sequence) - 1), unit] = 0
                    sequence[-1, unit] = loudest
            return original(hidden, *args)

        return forward

    def attention(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
                return output
            weights = output[1]
            if isinstance(weights, list):
                return output[0], [each if each is None else without(each) for each in weights], *output[2:]
            return output[0], without(weights), *output[2:]

        def without(weights: Tensor) -> Tensor:
            size = weights.shape[-1]
            kept = [i for i in range(size) if i != size - 1 - tower.family.appended]
            return weights[..., kept, :][..., kept]

        return forward

    def bias(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if tower.family.bias_count in kwargs:
                kwargs[tower.family.bias_count] -= 1
            return nn.functional.pad(original(*args, **kwargs), (0, 1, 0, 1))

        return forward

    with ExitStack() as stack:

        def replace(module: nn.Module, wrap: Callable[..., Forward], *extra: Any, method: str = "forward") -> None:
            setattr(module, method, wrap(getattr(module, method), *extra))
            stack.callback(delattr, module, method)

        for i, each in enumerate(tower.blocks):
            replace(each.module, block, i == 0)
            start = 0
            for mlp in each.mlps:
                units = [mlp.first + unit - start for unit in neurons.get(i, ()) if start <= unit < start + mlp.width]
                for module in mlp.readers:
                    replace(module, reader, units)
                start += mlp.width
            if each.attention is not None:
                replace(each.attention, attention)
            if each.bias is not None:
                replace(each.bias[0], bias, method=each.bias[1])
        yield


def _patches(tower: Tower, count: int) -> list[int]:
    """Which of the `count` tokens are patches: nearly everywhere those behind the prefix."""
    if tower.family.name == "transformers Llama 4":  # CLS comes last
        return list(range(count - 1))
    if tower.family.name == "transformers Mllama":  # tiles side by side: CLS, patches, padding
        config = tower.module.config
        num_patches, tile = (config.image_size // config.patch_size) ** 2, count // config.max_num_tiles
        return [token for token in range(count) if 1 <= token % tile <= num_patches]
    return list(range(tower.num_prefix, count))


def _padding(extras: Sequence[Any], count: int) -> list[int]:
    """The tokens that a mask hides from themselves: a model may pad a single image too."""
    for extra in extras:
        if isinstance(extra, Tensor) and extra.shape == (1, count):  # for flash attention, and in transformers 4
            return (extra[0] == 0).nonzero().flatten().tolist()
        if isinstance(extra, Tensor) and extra.ndim == 4 and extra.shape[-1] == count:
            square = extra.shape[-2] == count
            return (~_shown(extra[0, 0].diagonal() if square else extra[0, 0, 0])).nonzero().flatten().tolist()
    return []


def _shown(mask: Tensor) -> Tensor:
    return mask if mask.dtype is torch.bool else mask > -1e30


def _one_more(extra: Any, count: int, num_prefix: int) -> Any:
    """What goes beside `count` tokens, for one more: unmasked, unbiased and unrotated."""
    if isinstance(extra, tuple | list) and len(extra) == 2 and all(isinstance(part, Tensor) for part in extra):
        cosine, sine = extra
        return torch.cat([cosine, torch.ones_like(cosine[..., :1, :])], -2), _padded_row(sine)
    if not isinstance(extra, Tensor):
        return extra + 1 if type(extra) is int and extra == count else extra
    if extra.ndim == 1 and extra.numel() == 2 and extra.tolist() == [0, count]:  # where a packed sequence ends
        return extra + torch.tensor([0, 1]).to(extra)
    if extra.shape == (1, count):
        return nn.functional.pad(extra, (0, 1), value=1)
    if extra.shape[-1] == count:
        neutral = float(extra.dtype is torch.bool)
        if extra.ndim > 1 and extra.shape[-2] == count:
            row = extra[..., :1, :]
            extra = torch.cat([extra, torch.where(_shown(row), torch.full_like(row, neutral), row)], -2)
        return nn.functional.pad(extra, (0, 1), value=neutral)
    if extra.is_complex():
        return torch.cat([extra, torch.ones_like(extra[:1])])
    if not extra.is_floating_point():  # rows and columns
        return nn.functional.pad(extra, (0, 0, 0, 1)) if extra.ndim > 1 and extra.shape[-2] == count else extra
    if extra.ndim >= 2 and extra.shape[-2] in (count, count - num_prefix):  # sines, then cosines
        sine, cosine = extra.chunk(2, -1)
        return torch.cat([_padded_row(sine), torch.cat([cosine, torch.ones_like(cosine[..., :1, :])], -2)], -1)
    return extra


def _padded_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.zeros_like(rows[..., :1, :])], -2)


# The table ------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--match", default="", metavar="REGEX", help="only names in which it is found")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--brief", action="store_true", help="leave out the rows of what is supported")
    args = parser.parse_args()
    chosen = [
        index
        for index, each in enumerate(every())
        if args.library in (None, each.library) and re.search(args.match, each.name)
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, initializer=_start_worker) as pool:
        verdicts = list(tqdm(pool.imap(_check_numbered, chosen, chunksize=4), total=len(chosen), disable=None))
    _print_table(verdicts, brief=args.brief)
    return int(any(each.word == "FAILED" for each in verdicts))


def _start_worker() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable()


def _check_numbered(index: int) -> Verdict:
    return check(_architectures()[index])


def _architectures(known: list[Architecture] = []) -> list[Architecture]:  # noqa: B006 - once for each worker
    known.extend(() if known else every())
    return known


def _print_table(verdicts: Sequence[Verdict], *, brief: bool) -> None:
    for each in verdicts:
        if not brief or each.word != "supported":
            print(f"{each.library:12} {each.name:60} {each.word}{': ' if each.reason else ''}{each.reason}")
    words = ("supported", "refused", "FAILED")
    count = lambda library, word: sum((each.library, each.word) == (library, word) for each in verdicts)
    print("\n| library | supported | refused | failed |\n|---|---|---|---|")
    for library in LIBRARIES:
        if counts := [count(library, word) for word in words]:
            print(f"| {library} | " + " | ".join(map(str, counts)) + " |")
    if absent := sum(each.word == "absent" for each in verdicts):
        print(f"\n{absent} absent from the installed releases")
    supported, refused, failed = (sum(each.word == word for each in verdicts) for word in words)
    print(f"\n{supported} supported, {refused} refused, {failed} failed")


if __name__ == "__main__":
    raise SystemExit(main())
