"""The command `testreg calibrate`, which finds the register neurons of a model.

Register neurons make *outliers* (patches of huge norm). Calibration ranks neurons on some images. On others, which are
held out, it then chooses how many of them to move to registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from testreg.calibration.options import MEANINGS, Options
from testreg.cli.exits import Exit
from testreg.cli.invocation import Invocation
from testreg.cli.models import check_drawn, chosen_device, load
from testreg.cli.options import (
    BatchSize,
    Device,
    DType,
    Images,
    ImageSizes,
    Loading,
    Model,
    NumImages,
    ReportFile,
    Rule,
    Seed,
    Threshold,
    TrustRemoteCode,
    Workers,
)
from testreg.cli.outputs import PAGES, check_file
from testreg.files import check_writable_folder
from testreg.measure.score import Score

if TYPE_CHECKING:
    from testreg.neurons import RegisterNeurons
    from testreg.records.calibration import Effect, Verification

NUM_IMAGES = 500  # the default, since a folder may hold millions; in Python, all images are used by default
REPORT_IMAGES = 32  # held-out images that the report measures, at most
HIGH_AGREEMENT = 0.99  # if the head's class stays the same on this share of the images, the summary does not mention it


def calibrate(
    invocation: Invocation,
    model: Model,
    *,
    images: Images,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="JSON", help="where the neurons are written")],
    report: ReportFile = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="write its pictures as PNG, for papers")] = None,
    target: Annotated[float, typer.Option(help=MEANINGS["target"])] = Options.target,
    max_change: Annotated[float | None, typer.Option(help=MEANINGS["max_change"])] = Options.max_change,
    budget: Annotated[float | None, typer.Option(metavar="SECONDS", help=MEANINGS["budget"])] = Options.budget,
    held_out: Annotated[int, typer.Option(help=MEANINGS["held_out"])] = Options.held_out,
    resume: Annotated[Path | None, typer.Option(metavar="FILE", help=MEANINGS["resume"])] = None,
    num_images: NumImages = NUM_IMAGES,
    batch_size: BatchSize = Options.batch_size,
    workers: Workers = Options.workers,
    seed: Seed = Options.seed,
    block: Annotated[int | None, typer.Option(help=MEANINGS["block"])] = Options.block,
    threshold: Threshold = Options.threshold,
    rule: Rule = "robust",
    max_block: Annotated[int | None, typer.Option(help=MEANINGS["max_block"])] = Options.max_block,
    top_k: Annotated[int | None, typer.Option(help=MEANINGS["top_k"])] = Options.top_k,
    score: Annotated[Score, typer.Option(help=MEANINGS["score"])] = Options.score,
    sparsity_filter: Annotated[bool, typer.Option("--sparsity-filter", help=MEANINGS["sparsity_filter"])] = (
        Options.sparsity_filter
    ),
    amp: Annotated[Literal["bfloat16", "float16"] | None, typer.Option(help=MEANINGS["amp"])] = None,
    image_size: ImageSizes = None,
    device: Device = None,
    dtype: DType = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Exit:
    """Find the register neurons of a model."""
    import torch

    from testreg.calibration import calibrate as calibration
    from testreg.io.processes import process_group, rank
    from testreg.io.sources import check_images
    from testreg.measure.outliers import OutlierRule

    outlier_rule = OutlierRule(threshold=threshold, mixture=rule == "mixture")
    check_file(output, ".json")
    check_file(report, *PAGES)
    check_file(resume)
    if figures is not None:
        check_writable_folder(figures)
    check_images(images)  # so that an error comes before a model is loaded
    sizes: list[int | None] = [*image_size] if image_size else [None]
    with process_group(chosen_device(device)) as own_device:
        loaded = [
            load(invocation, model, Loading(size, device, dtype, trust_remote_code), own_device) for size in sizes
        ]
        if report is not None or figures is not None:
            check_drawn(loaded[0])
        neurons = calibration.calibrate(
            [each.model for each in loaded],
            images,
            transform=[each.transform for each in loaded],
            block=block,
            rule=outlier_rule,
            max_block=max_block,
            score=score,
            sparsity_filter=sparsity_filter,
            top_k=top_k,
            target=target,
            max_change=max_change,
            budget=budget,
            held_out=held_out,
            resume=resume,
            batch_size=batch_size,
            num_images=num_images,
            workers=workers,
            amp=getattr(torch, amp) if amp else None,
            seed=seed,
            progress=not invocation.quiet,
        )
        is_first = rank() == 0
    if is_first:
        neurons.save(output)
        invocation.say(summary(neurons))
        if invocation.quiet and not neurons.verified:
            invocation.answer(not_verified())
        invocation.answer(f"{output}: {len(neurons)} register neurons, and the ranking they are from")
        if report or figures:
            from testreg.calibration.split import held_out_images
            from testreg.report.page import write_report

            with invocation.phase("measuring for the report"):
                transform = loaded[0].transform
                images_shown = held_out_images(images, transform, held_out=held_out, num_images=num_images, seed=seed)
                write_report(
                    report,
                    loaded[0].model,
                    neurons,
                    images_shown[-REPORT_IMAGES:],  # if there are enough, the last had no part in the choice
                    command=invocation.command,
                    file=str(output),
                    figures=figures,
                    rule=outlier_rule,
                    batch_size=batch_size,
                )
            invocation.answer("\n".join(str(path) for path in (report, figures) if path))
        invocation.write(_result(neurons, output, report, figures))
    return Exit.DONE if neurons.verified else Exit.NOT_VERIFIED


def summary(neurons: RegisterNeurons) -> str:
    """The results of a calibration, in a few lines of text."""
    from testreg.calibration.effects import what_is_wrong_with_maps

    facts = neurons.calibration
    lines = [str(facts.verdict)]
    skipped = f", {facts.unreadable_images} unreadable" if facts.unreadable_images else ""
    if facts.stability is not None:
        agreement_in_words = f"halves of them agree on {facts.stability.overlap:.0%} of the neurons"
        lines.append(f"ranked on {facts.images} images{skipped}; {agreement_in_words}")
    if facts.curve:
        columns = ("neurons", "outliers left", "excess norm left", "change, pooled", "change, patches")
        lines.append(f"chosen on held-out images:\n{'  '.join(columns)}")
        for point in facts.curve:
            values = (point.remaining, point.excess, point.change_pooled, point.change_patches)
            cells = zip((str(point.neurons), *(f"{value:.3f}" for value in values)), columns, strict=True)
            lines.append("  ".join(f"{cell:>{len(column)}}" for cell, column in cells))
    if facts.registers:
        lines.append(_registers_in_words(facts.registers, neurons))
    for each in facts.rounds if len(facts.rounds) > 1 else ():
        blocks = ", ".join(str(block) for block in sorted({block for block, _, _ in each.added}))
        lines.append(
            f"round {each.round}: {len(each.added)} neurons of blocks {blocks} added, "
            f"{each.effect.remaining:.1%} of the outliers left"
        )
    for check in facts.verified_at:
        height, width = check.image_size
        on = "images that also chose," if facts.verified_on_others is False else "others"
        effect = check.effect
        lines.append(
            f"measured on {check.images} {on} at {height} x {width}: {effect.remaining:.1%} of the outliers left "
            f"at worst (block {effect.worst_block}), features changed by {effect.change_pooled:.3f} (pooled) and "
            f"{effect.change_patches:.3f} (patches)"
        )
        lines += _attention_in_words(check)
        lines += what_is_wrong_with_maps(check)
    if facts.target_met is False:
        lines.append(
            f"the target of {facts.target:.1%} was not reached: this set came closest. More images, another "
            "--max-block or a higher --target may help; testreg diagnose says what kind of outliers they are"
        )
    if facts.out_of_time:
        left_out = {
            "images": f"all images but {(facts.images or 0) + (facts.held_out or 0)}",
            "ranking": "ranking until halves of the images agree",
            "choosing": "further sets of neurons, so that more neurons or registers may do better",
        }
        lines.append(f"the --budget was too small for: {'; '.join(left_out[each] for each in facts.out_of_time)}")
    agreement = None if facts.chosen is None else facts.chosen.agreement
    if agreement is not None and agreement < HIGH_AGREEMENT:
        lines.append(f"the head agrees with itself on {agreement:.1%} of the images, with and without registers")
    if not neurons.verified:
        lines.append(not_verified())
    return "\n".join(lines)


def not_verified() -> str:
    """Why a list of neurons is not verified, in words."""
    from testreg.calibration.split import MIN_VERIFYING, NUM_CHOOSING

    return (
        f"not verified: that takes a target that is met, and clean maps, on at least {MIN_VERIFYING} held-out "
        f"images that had no part in the choice ({2 * (NUM_CHOOSING + MIN_VERIFYING)} images or more in all)"
    )


def _registers_in_words(registers: Sequence[Effect], neurons: RegisterNeurons) -> str:
    """How many registers were chosen and how they start, and by how much each measured choice changes the features."""
    number, starts = neurons.num_registers, {"zeros": "", "mean": " that start as the mean patch"}
    changes = ", ".join(
        f"{each.change_pooled:.3f} and {each.change_patches:.3f} with {each.num_registers}{starts[each.start]}"
        for each in registers
    )
    which = f"1 register{starts[neurons.start]}"
    if number > 1:
        which = f"{number} registers{starts[neurons.start]}, each with all of the neurons"
    return f"{which}: features (pooled and of patches) change by {changes}"


def _attention_in_words(check: Verification) -> list[str]:
    """How attention to the former outliers changed, as lines of text; [] if attention was not measured."""
    after, before = check.effect, check.before
    if before is None or None in (after.sink, after.hottest, after.hotter, after.unlike, before.sink, before.hottest):
        return []
    return [
        f"attention to a former outlier, over that to another patch: {before.sink:.1f} before, {after.sink:.1f} "
        f"now; share of the hottest patch: {before.hottest:.1%} before, {after.hottest:.1%} now (hotter in "
        f"{after.hotter:.0%} of the images); former outliers are {after.unlike:.0%} as unlike their neighbours "
        "as before"
    ]


def _result(neurons: RegisterNeurons, output: Path, report: Path | None, figures: Path | None) -> dict[str, Any]:
    """The result for --json: the paths of the files that were written, and the results without the ranking."""
    return {
        "output": str(output),
        "report": None if report is None else str(report),
        "figures": None if figures is None else str(figures),
        "neurons": neurons.by_block(),
        "verified": neurons.verified,
        "calibration": neurons.calibration.to_json(),
    }
