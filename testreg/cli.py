"""The command line: testreg demo | list | diagnose | calibrate | apply | show.

A command imports what it needs when it runs, so that --help is there at once, and an interrupt at any time is one line.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

from testreg.calibration.errors import ImmovableOutliersError, NoOutliersError
from testreg.files import check_writable, check_writable_folder, replacing
from testreg.io.names import KINDS, NAMES

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from testreg.io.loading import LoadedModel
    from testreg.neurons import RegisterNeurons

REPORT_IMAGES = 32
MAX_SHOWN = 64  # images in one picture, each of which is a row of it
HIGH_AGREEMENT = 0.99  # of a head with itself, which needs no mention
OUTPUTS = ("output", "report", "figures", "resume", "json")  # arguments that name them
SCORES = ("contribution", "activation")


class Exit(IntEnum):
    """The exit codes, each with what it means."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> Exit:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "done"
    ERROR = 1, "error"
    USAGE = 2, "wrong usage"  # which argparse exits with
    NOTHING_TO_FIX = 3, "no outliers: nothing to fix"
    NOT_FIXABLE = 4, "outliers that registers do not fix: at fixed positions, or not made by MLPs"
    NOT_VERIFIED = (
        5,
        ("neurons were written, but are not verified: the target was not met, or on too few held-out images"),
    )
    INTERRUPTED = 130, "interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, one of `Exit`."""
    args = _parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no text
    before = _written(args)
    try:
        return args.run(args) or Exit.DONE
    except (NoOutliersError, ImmovableOutliersError) as not_fixable:  # raised in every process
        if _is_first_process():
            print(not_fixable, file=sys.stderr)
        return Exit.NOTHING_TO_FIX if isinstance(not_fixable, NoOutliersError) else Exit.NOT_FIXABLE
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        if _is_first_process():
            print(_interrupted(args, before), file=sys.stderr)
        return Exit.INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        print(f"testreg: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return Exit.ERROR
    return Exit.DONE


def _is_first_process() -> bool:
    """Whether this is the first process, also outside of the process group, where `rank()` says it of all."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"


def _written(args: argparse.Namespace) -> dict[Path, tuple[int, int]]:
    """The files that the command writes, as far as they exist, each with what tells it from one written anew."""
    named = [Path(value) for key in OUTPUTS if (value := getattr(args, key, None)) is not None]
    # Not the methods of Path, which raise errors for a name that is too long.
    files = [file for path in named for file in (sorted(path.glob("*")) if os.path.isdir(path) else [path])]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files if os.path.isfile(file)}


def _interrupted(args: argparse.Namespace, before: Mapping[Path, tuple[int, int]]) -> str:
    """What an interrupted command has written, and whether it can go on from there."""
    written = [str(file) for file, state in _written(args).items() if state != before.get(file)]
    message = "interrupted; " + (f"written before: {', '.join(written)}" if written else "nothing was written")
    resume: Path | None = getattr(args, "resume", None)
    return message + (f"; the same command goes on from {resume}" if resume is not None and resume.is_file() else "")


# The parser -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets the function that runs it as `run`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    parser = argparse.ArgumentParser(
        prog="testreg",
        description="Take the artefacts out of pretrained Vision Transformers, without training.",
        epilog=f"{_exit_codes()} Others are listed by `testreg COMMAND --help`.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", parents=[common], help="the whole job on a small model, offline", epilog=_exit_codes()
    )
    demo.add_argument("-o", "--output", type=Path, default=Path("testreg-demo.png"), help="picture to write")
    demo.set_defaults(run=_demo)

    listing = commands.add_parser(
        "list", parents=[common], help="the bundled register neurons, and their models", epilog=_exit_codes()
    )
    listing.set_defaults(run=_list)

    diagnose = commands.add_parser(
        "diagnose",
        parents=[common],
        help="where a model's outliers are, and whether registers fix them",
        epilog=_exit_codes(Exit.NOTHING_TO_FIX, Exit.NOT_FIXABLE, done="outliers that registers move"),
    )
    _add_model(diagnose)
    _add_images(diagnose, num_images=200)
    diagnose.add_argument("--threshold", type=float, help="norm of an outlier (default: median + 5 robust sigma)")
    diagnose.add_argument("--json", metavar="FILE", help="write all figures; - for the output, in place of the table")
    diagnose.set_defaults(run=_diagnose)

    calibrate = commands.add_parser(
        "calibrate",
        parents=[common],
        help="find the register neurons of a model",
        epilog=_exit_codes(
            Exit.NOTHING_TO_FIX,
            Exit.NOT_FIXABLE,
            Exit.NOT_VERIFIED,
            done="neurons were written, and are verified",
        ),
    )
    _add_model(calibrate, several_sizes=True)
    _add_images(calibrate, num_images=500)
    calibrate.add_argument("-o", "--output", type=Path, required=True, metavar="JSON")
    calibrate.add_argument("--report", type=Path, metavar="HTML", help="write a page that shows what was found")
    calibrate.add_argument("--figures", type=Path, metavar="DIR", help="write its pictures as PNG, for papers")
    calibrate.add_argument("--target", type=float, default=0.05, help="outliers that may be left (default: 0.05)")
    calibrate.add_argument("--max-change", type=float, help="how much features may change, 1 - cosine (default: any)")
    calibrate.add_argument("--budget", type=float, metavar="SECONDS", help="stop measuring then (default: never)")
    calibrate.add_argument("--held-out", type=int, default=64, help="images to choose and verify on (default: 64)")
    calibrate.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep the state there (safetensors); go on from it"
    )
    calibrate.add_argument("--block", type=int, help="block to look for outliers at (default: where they stand out)")
    calibrate.add_argument("--threshold", type=float, help="norm of an outlier (default: median + 5 robust sigma)")
    calibrate.add_argument("--max-block", type=int, help="last block to take neurons from (default: outlier onset)")
    calibrate.add_argument("--top-k", type=int, help="how many neurons to recommend (default: chosen by measuring)")
    calibrate.add_argument("--score", choices=SCORES, default=SCORES[0], help="activation: the paper's")
    calibrate.add_argument("--sparsity-filter", action="store_true", help="as in the released code")
    calibrate.add_argument("--amp", choices=["bfloat16", "float16"], help="run under autocast")
    calibrate.set_defaults(run=_calibrate)

    apply = commands.add_parser("apply", parents=[common], help="save a patched checkpoint", epilog=_exit_codes())
    _add_model(apply)
    _add_patch(apply)
    apply.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    apply.set_defaults(run=_apply)

    show = commands.add_parser(
        "show", parents=[common], help="picture of a model before and after", epilog=_exit_codes()
    )
    _add_model(show)
    show.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, or folders of them")
    _add_patch(show)
    show.add_argument("--block", type=int, help="block whose norms are drawn (default: where calibration saw outliers)")
    show.add_argument("-o", "--output", type=Path, required=True, metavar="PNG")
    show.set_defaults(run=_show)
    return parser


def _add_model(parser: argparse.ArgumentParser, *, several_sizes: bool = False) -> None:
    parser.add_argument("model", metavar="MODEL", help=NAMES)
    parser.add_argument(
        "--image-size",
        type=int,
        action="append" if several_sizes else "store",
        help="side of the input in pixels (default: the model's own)" + "; may be repeated" * several_sizes,
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that a model's repository or folder brings along (default: never)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")


def _add_images(parser: argparse.ArgumentParser, *, num_images: int) -> None:
    parser.add_argument("--images", required=True, help=KINDS)
    parser.add_argument("--num-images", type=int, default=num_images, help=f"at most so many (default: {num_images})")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--seed", type=int, default=0)


def _add_patch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--neurons", help="neuron JSON, or a name from `testreg list` (default: the bundled list)")
    parser.add_argument("--top-k", type=int, help="use the best so many (default: as the list recommends)")
    parser.add_argument("--num-registers", type=int, default=1)
    parser.add_argument("--max-over", choices=["neuron", "layer"], default="neuron", help="layer: the released code's")
    parser.add_argument("--zero", choices=["patches", "all"], default="patches", help="all: prefix tokens too")


def _exit_codes(*others: Exit, done: str = Exit.DONE.meaning) -> str:
    """The exit codes that every command has, and `others`, for the help."""
    codes = sorted({Exit.DONE, Exit.ERROR, Exit.USAGE, Exit.INTERRUPTED, *others})
    meanings = (f"{code.value} {done if code is Exit.DONE else code.meaning}" for code in codes)
    return f"Exit codes: {'; '.join(meanings)}."


def _version() -> str:
    from importlib.metadata import version

    return f"testreg {version('testreg')}"


# The commands ---------------------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> None:
    _check_picture(args.output)  # before all that the demo needs is imported

    from testreg.demo.run import run_demo
    from testreg.report.maps import table

    print("A small ViT, trained on CIFAR-10 around a planted outlier mechanism: see testreg/demo/model/README.md.")
    demo = run_demo()
    planted = sum(map(len, demo.planted.values()))
    print(f"diagnosed:  {demo.found.calibration['verdict']}")
    print(f"calibrated: {demo.found.top_k} register neurons, {demo.recovered} of the {planted} planted ones among them")
    print(f"patched:    one register\n\n{table(demo.before, demo.after)}\n")
    _save(demo.picture, args.output)


def _list(args: argparse.Namespace) -> None:
    from testreg.neurons import bundled

    for name, neurons in bundled().items():
        checked = "verified" if neurons.verified else "not verified"
        print(f"{name}  ({len(neurons.ranking)} neurons, {checked})")
        default_for = set(neurons.model.get("default_for", ()))
        for model in neurons.model.get("names", ()):
            print(f"    {model}{'  (default)' if model in default_for else ''}")


def _diagnose(args: argparse.Namespace) -> int:
    from testreg.io.processes import process_group, rank
    from testreg.io.sources import check_images
    from testreg.measure.diagnose import diagnose
    from testreg.measure.outliers import OutlierRule

    to_output = args.json == "-"
    if args.json and not to_output:
        check_writable(args.json)
    check_images(args.images)  # before a model is loaded for nothing
    with process_group(_device(args)) as device:
        loaded = _load(args, device, args.image_size)
        found = diagnose(
            loaded.model,
            args.images,
            transform=loaded.transform,
            batch_size=args.batch_size,
            num_images=args.num_images,
            rule=OutlierRule(threshold=args.threshold),
            workers=args.workers,
            seed=args.seed,
        )
        is_first = rank() == 0
    if is_first:
        if to_output:
            print(json.dumps(found.to_json(), indent=1, allow_nan=False))
        else:
            print("\n".join([found.verdict, "", found.table(), "", *found.notes]))
        if args.json and not to_output:
            found.save(args.json)
    return {"movable": Exit.DONE, "none": Exit.NOTHING_TO_FIX}.get(found.kind, Exit.NOT_FIXABLE)


def _calibrate(args: argparse.Namespace) -> int:
    import torch

    from testreg.calibration.calibrate import calibrate
    from testreg.calibration.view import held_out_images
    from testreg.io.processes import process_group, rank
    from testreg.io.sources import check_images
    from testreg.measure.outliers import OutlierRule

    for path in (args.output, args.report, args.resume):
        if path is not None:
            check_writable(path)
    if args.figures is not None:
        check_writable_folder(args.figures)
    check_images(args.images)  # before a model is loaded for nothing
    sizes = args.image_size or [None]
    with process_group(_device(args)) as device:
        loaded = [_load(args, device, size) for size in sizes]
        neurons = calibrate(
            [each.model for each in loaded],
            args.images,
            transform=[each.transform for each in loaded],
            block=args.block,
            threshold=args.threshold,
            max_block=args.max_block,
            score=args.score,
            sparsity_filter=args.sparsity_filter,
            top_k=args.top_k,
            target=args.target,
            max_change=args.max_change,
            budget=args.budget,
            held_out=args.held_out,
            resume=args.resume,
            batch_size=args.batch_size,
            num_images=args.num_images,
            workers=args.workers,
            amp=getattr(torch, args.amp) if args.amp else None,
            seed=args.seed,
        )
        is_first = rank() == 0
    code = Exit.DONE if neurons.verified else Exit.NOT_VERIFIED
    if not is_first:
        return code
    neurons.save(args.output)
    print(_found(neurons), f"{args.output}: {neurons.top_k} register neurons, and the ranking they are from", sep="\n")
    if args.report or args.figures:
        from testreg.report.page import write_report

        images = held_out_images(
            args.images, loaded[0].transform, held_out=args.held_out, num_images=args.num_images, seed=args.seed
        )
        command = shlex.join(["testreg", *args.argv])
        write_report(
            args.report,
            loaded[0].model,
            neurons,
            images[-REPORT_IMAGES:],  # the last were not chosen on
            command=command,
            figures=args.figures,
            rule=OutlierRule(threshold=args.threshold),
            batch_size=args.batch_size,
        )
        print(*(path for path in (args.report, args.figures) if path), sep="\n")
    return code


def _apply(args: argparse.Namespace) -> None:
    from testreg.io.checkpoints import check_replaceable, save

    check_replaceable(args.output)
    check_writable_folder(args.output)
    check_writable_folder(args.output.resolve().parent)  # where it is made
    loaded = _load(args, _device(args), args.image_size)
    _patch(loaded, args)
    save(loaded.model, args.output, processor=loaded.processor)
    print(f"{args.output}: patched checkpoint of {loaded.name}")


def _show(args: argparse.Namespace) -> None:
    import torch

    from testreg.report.maps import compare, figure, table

    _check_picture(args.output)
    photos = _photos(args.images)
    loaded = _load(args, _device(args), args.image_size)
    neurons = _patch(loaded, args)
    block = neurons.calibration.get("detection_block", -1) if args.block is None else args.block
    images = torch.stack([loaded.transform(photo) for photo in photos])
    before, after = compare(loaded.model, images, block)
    print(table(before, after))
    _save(figure(images, before, after, f"{loaded.name}, norms after block {block}"), args.output)


# What commands have in common, and say --------------------------------------------------------------------------------


def _load(args: argparse.Namespace, device: torch.device, image_size: int | None) -> LoadedModel:
    """The model that the arguments name."""
    from testreg.io.loading import load_model

    return load_model(args.model, image_size=image_size, device=device, trust_remote_code=args.trust_remote_code)


def _device(args: argparse.Namespace) -> torch.device:
    """The device that was asked for, or the best there is."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(args.device or best)


def _patch(loaded: LoadedModel, args: argparse.Namespace) -> RegisterNeurons:
    """Patch the model, unless it is a patched checkpoint already; returns its register neurons."""
    from testreg.register import is_patched, patch, patch_of

    if is_patched(loaded.model):
        if args.neurons is not None:
            raise ValueError(f"{loaded.name} is a patched checkpoint already: leave --neurons out")
        return patch_of(loaded.model).neurons
    patch(
        loaded.model,
        args.neurons,
        top_k=args.top_k,
        num_registers=args.num_registers,
        max_over=args.max_over,
        zero=args.zero,
    )
    return patch_of(loaded.model).neurons


def _photos(paths: Sequence[Path]) -> list[Image]:
    """The images in files and in folders."""
    from testreg.io.decoding import open_image
    from testreg.io.sources import image_paths

    files = [file for path in paths for file in (image_paths(path) if path.is_dir() else [path])]
    if len(files) > MAX_SHOWN:
        raise ValueError(f"{len(files)} images are too many for one picture, at most {MAX_SHOWN}: name fewer")
    return [open_image(file) for file in files]


def _check_picture(path: Path) -> None:
    """Raise at once what writing the picture would raise after the work."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if _picture_format(path) not in kinds:
        raise ValueError(f"cannot write {path}: pictures are {', '.join(sorted(kinds))}")
    check_writable(path)


def _picture_format(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def _save(picture: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        picture.savefig(temporary, format=_picture_format(path), dpi=150)
    print(f"picture:    {path}")


def _found(neurons: RegisterNeurons) -> str:
    """What calibration found, in a few lines."""
    from testreg.calibration.view import MIN_VERIFYING

    facts = neurons.calibration
    skipped = f", {facts['unreadable_images']} unreadable" if facts["unreadable_images"] else ""
    overlap = facts["stability"]["overlap"]
    lines = [
        facts["verdict"],
        f"ranked on {facts['images']} images{skipped}; halves of them agree on {overlap:.0%} of the neurons",
    ]
    if curve := facts.get("curve"):
        columns = ("neurons", "outliers left", "excess norm left", "change, pooled", "change, patches")
        lines.append(f"chosen on held-out images:\n{'  '.join(columns)}")
        for point in curve:
            values = (f"{point[key]:.3f}" for key in ("remaining", "excess", "change_pooled", "change_patches"))
            cells = zip((str(point["neurons"]), *values), columns, strict=True)
            lines.append("  ".join(f"{cell:>{len(column)}}" for cell, column in cells))
    for each in facts.get("verified_at", ()):
        height, width = each["image_size"]
        on = "others" if facts.get("verified_on_others", True) else "images that also chose,"
        lines.append(
            f"verified on {each['images']} {on} at {height} x {width}: {each['remaining']:.1%} of the outliers left "
            f"at worst (block {each['worst_block']}), features changed by {each['change_pooled']:.3f} (pooled) and "
            f"{each['change_patches']:.3f} (patches)"
        )
    if not facts.get("target_met", True):
        lines.append(
            f"the target of {facts['target']:.1%} was not reached: this set came closest. More images, another "
            "--max-block or a higher --target may help; testreg diagnose says what kind of outliers they are"
        )
    agreement = facts.get("chosen", {}).get("agreement")
    if agreement is not None and agreement < HIGH_AGREEMENT:
        lines.append(f"the head agrees with itself on {agreement:.1%} of the images, with and without registers")
    if not neurons.verified:
        lines.append(
            f"not verified: that takes a target that is met on at least {MIN_VERIFYING} held-out images "
            "(more --images, a larger --held-out)"
        )
    return "\n".join(lines)
