"""The command line: testreg demo | list | diagnose | calibrate | apply | show."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testreg.calibration.errors import ImmovableOutliersError, NoOutliersError
from testreg.files import check_writable, check_writable_folder, replacing
from testreg.io.names import KINDS, NAMES

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from testreg.io.models import LoadedModel
    from testreg.neurons import RegisterNeurons

REPORT_IMAGES = 32
HIGH_AGREEMENT = 0.99  # of a head with itself, which needs no mention
OUTPUTS = ("output", "report", "figures", "resume", "json")  # arguments that name them
OK, ERROR, NOTHING_TO_FIX, NOT_FIXABLE, NOT_VERIFIED, INTERRUPTED = 0, 1, 3, 4, 5, 130
SCORES = ("contribution", "write", "contrast", "activation")
EXIT_CODES = "Exit codes: 0 done; 1 error; 2 wrong usage; 130 interrupted."
EXIT_CODES_DIAGNOSE = (
    "Exit codes: 0 outliers that registers move; 1 error; 2 wrong usage; 3 no outliers: nothing to fix; 4 outliers "
    "that registers do not fix: at fixed positions, or not made by MLPs; 130 interrupted."
)
EXIT_CODES_CALIBRATE = (
    "Exit codes: 0 neurons were written, and are verified; 1 error; 2 wrong usage; 3 no outliers: nothing to fix; "
    "4 outliers that registers do not fix: at fixed positions, or not made by MLPs; 5 neurons were written, but are "
    "not verified: the target was not met, or on too few held-out images; 130 interrupted."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done, 1 error, 2 wrong usage, 3 the model has no outliers (nothing to fix), 4 it has outliers that registers do
    not fix, 5 neurons were written that are not verified, 130 interrupted.
    """
    args = _parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no text
    before = _outputs(args)
    try:
        return args.run(args) or OK
    except (NoOutliersError, ImmovableOutliersError) as not_fixable:  # raised in every process
        if _is_first_process():
            print(not_fixable, file=sys.stderr)
        return NOTHING_TO_FIX if isinstance(not_fixable, NoOutliersError) else NOT_FIXABLE
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        if _is_first_process():
            print(_interrupted(args, before), file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        print(f"testreg: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return ERROR
    return OK


def _is_first_process() -> bool:
    """As `rank() == 0` says, but also outside of the process group."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"


def _outputs(args: argparse.Namespace) -> dict[Path, tuple[int, int]]:
    """The files that the command writes, as far as they exist, each with what tells it from one written anew."""
    named = [Path(value) for key in OUTPUTS if (value := getattr(args, key, None)) is not None]
    files = [file for path in named for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files if file.is_file()}


def _interrupted(args: argparse.Namespace, before: Mapping[Path, tuple[int, int]]) -> str:
    written = [str(file) for file, state in _outputs(args).items() if state != before.get(file)]
    message = "interrupted; " + (f"written before: {', '.join(written)}" if written else "nothing was written")
    resume: Path | None = getattr(args, "resume", None)
    return message + (f"; the same command goes on from {resume}" if resume is not None and resume.is_file() else "")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    parser = argparse.ArgumentParser(
        prog="testreg",
        description="Take the artefacts out of pretrained Vision Transformers, without training.",
        epilog=f"{EXIT_CODES} Others are listed by `testreg COMMAND --help`.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", parents=[common], help="the whole job on a small model, offline", epilog=EXIT_CODES
    )
    demo.add_argument("-o", "--output", type=Path, default=Path("testreg-demo.png"), help="picture to write")
    demo.set_defaults(run=_demo)

    listing = commands.add_parser(
        "list", parents=[common], help="the bundled register neurons, and their models", epilog=EXIT_CODES
    )
    listing.set_defaults(run=_list)

    diagnose = commands.add_parser(
        "diagnose",
        parents=[common],
        help="where a model's outliers are, and whether registers fix them",
        epilog=EXIT_CODES_DIAGNOSE,
    )
    _add_model(diagnose)
    _add_images(diagnose, num_images=200)
    diagnose.add_argument("--threshold", type=float, help="norm of an outlier (default: median + 5 robust sigma)")
    diagnose.add_argument("--json", metavar="FILE", help="write all figures; - for the output, in place of the table")
    diagnose.set_defaults(run=_diagnose)

    calibrate = commands.add_parser(
        "calibrate", parents=[common], help="find the register neurons of a model", epilog=EXIT_CODES_CALIBRATE
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

    apply = commands.add_parser("apply", parents=[common], help="save a patched checkpoint", epilog=EXIT_CODES)
    _add_model(apply)
    _add_patch(apply)
    apply.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    apply.set_defaults(run=_apply)

    show = commands.add_parser("show", parents=[common], help="picture of a model before and after", epilog=EXIT_CODES)
    _add_model(show)
    show.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
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


def _demo(args: argparse.Namespace) -> None:
    from testreg.demo.run import run_demo
    from testreg.report.maps import table

    _check_picture(args.output)
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
    from testreg.io.images import check_images
    from testreg.io.processes import process_group, rank
    from testreg.measure.diagnosis import diagnose
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
    return {"movable": OK, "none": NOTHING_TO_FIX}.get(found.kind, NOT_FIXABLE)


def _calibrate(args: argparse.Namespace) -> int:
    import torch

    from testreg.calibration.calibrate import calibrate, held_out_images
    from testreg.io.images import check_images
    from testreg.io.processes import process_group, rank
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
    code = OK if neurons.verified else NOT_VERIFIED
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


def _found(neurons: RegisterNeurons) -> str:
    """What calibration found, in a few lines."""
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
        lines.append(
            f"verified on {each['images']} others at {height} x {width}: {each['remaining']:.1%} of the outliers left "
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
            "not verified: that takes a target that is met on at least 16 held-out images (more --images, a larger "
            "--held-out)"
        )
    return "\n".join(lines)


def _apply(args: argparse.Namespace) -> None:
    from testreg.io.checkpoint import save

    check_writable_folder(args.output)
    check_writable_folder(args.output.resolve().parent)  # where it is made
    loaded = _load(args, _device(args), args.image_size)
    _patch(loaded, args)
    save(loaded.model, args.output, processor=loaded.processor)
    print(f"{args.output}: patched checkpoint of {loaded.name}")


def _show(args: argparse.Namespace) -> None:
    import torch

    from testreg.io.images import open_image
    from testreg.report.maps import compare, figure, table

    _check_picture(args.output)
    photos = [open_image(path) for path in args.images]
    loaded = _load(args, _device(args), args.image_size)
    neurons = _patch(loaded, args)
    block = neurons.calibration.get("detection_block", -1) if args.block is None else args.block
    images = torch.stack([loaded.transform(photo) for photo in photos])
    before, after = compare(loaded.model, images, block)
    print(table(before, after))
    _save(figure(images, before, after, f"{loaded.name}, norms after block {block}"), args.output)


def _load(args: argparse.Namespace, device: torch.device, image_size: int | None) -> LoadedModel:
    from testreg.io.models import load_model

    return load_model(args.model, image_size=image_size, device=device, trust_remote_code=args.trust_remote_code)


def _device(args: argparse.Namespace) -> torch.device:
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(args.device or best)


def _patch(loaded: LoadedModel, args: argparse.Namespace) -> RegisterNeurons:
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


def _check_picture(path: Path) -> None:
    """Fail before the work is done rather than after."""
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


def _version() -> str:
    from importlib.metadata import version

    return f"testreg {version('testreg')}"
