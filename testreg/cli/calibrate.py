"""testreg calibrate"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from testreg.cli.exits import Exit
from testreg.cli.models import check_drawn, chosen_device, load
from testreg.cli.options import (
    BatchSize,
    Device,
    DType,
    Images,
    ImageSizes,
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
from testreg.cli.running import Run
from testreg.files import check_writable_folder

if TYPE_CHECKING:
    from testreg.neurons import RegisterNeurons

REPORT_IMAGES = 32
HIGH_AGREEMENT = 0.99  # of a head with itself, which needs no mention


def calibrate(
    run: Run,
    model: Model,
    *,
    images: Images,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="JSON", help="where the neurons are written")],
    report: ReportFile = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="write its pictures as PNG, for papers")] = None,
    target: Annotated[float, typer.Option(help="outliers that may be left")] = 0.05,
    max_change: Annotated[
        float | None, typer.Option(help="how much features may change, 1 - cosine (default: any)")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="take about so long (default: as long as it takes)")
    ] = None,
    held_out: Annotated[int, typer.Option(help="images to choose and verify on")] = 48,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="keep the state there (safetensors); go on from it")
    ] = None,
    num_images: NumImages = 500,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    seed: Seed = 0,
    block: Annotated[
        int | None, typer.Option(help="block to look for outliers at (default: where they stand out)")
    ] = None,
    threshold: Threshold = None,
    rule: Rule = "robust",
    max_block: Annotated[
        int | None, typer.Option(help="last block to take neurons from (default: the last one with outliers)")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="how many neurons to recommend (default: chosen by measuring)")
    ] = None,
    score: Annotated[
        Literal["attribution", "contribution", "activation"], typer.Option(help="activation: the paper's")
    ] = "attribution",
    sparsity_filter: Annotated[bool, typer.Option("--sparsity-filter", help="as in the released code")] = False,
    amp: Annotated[Literal["bfloat16", "float16"] | None, typer.Option(help="run under autocast")] = None,
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
    check_images(images)  # before a model is loaded for nothing
    sizes: list[int | None] = [*image_size] if image_size else [None]
    with process_group(chosen_device(device)) as own:
        loaded = [
            load(run, model, own, image_size=size, dtype=dtype, trust_remote_code=trust_remote_code) for size in sizes
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
            progress=not run.quiet,
        )
        is_first = rank() == 0
    if is_first:
        neurons.save(output)
        run.say(found(neurons))
        if run.quiet and not neurons.verified:
            run.answer(not_verified())
        run.answer(f"{output}: {len(neurons)} register neurons, and the ranking they are from")
        if report or figures:
            from testreg.calibration.view import held_out_images
            from testreg.report.page import write_report

            with run.phase("measuring for the report"):
                transform = loaded[0].transform
                shown = held_out_images(images, transform, held_out=held_out, num_images=num_images, seed=seed)
                write_report(
                    report,
                    loaded[0].model,
                    neurons,
                    shown[-REPORT_IMAGES:],  # the last were not chosen on
                    command=run.command,
                    file=str(output),
                    figures=figures,
                    rule=outlier_rule,
                    batch_size=batch_size,
                )
            run.answer("\n".join(str(path) for path in (report, figures) if path))
        run.write(_result(neurons, output, report, figures))
    return Exit.DONE if neurons.verified else Exit.NOT_VERIFIED


def found(neurons: RegisterNeurons) -> str:
    """What calibration found, in a few lines."""
    from testreg.calibration.effects import what_is_wrong_with_maps

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
    if registers := facts.get("registers"):
        lines.append(_registers_in_words(registers, neurons.num_registers))
    if len(rounds := facts.get("rounds") or ()) > 1:
        for each in rounds:
            blocks = ", ".join(str(block) for block in sorted({block for block, _, _ in each["added"]}))
            lines.append(
                f"round {each['round']}: {len(each['added'])} neurons of blocks {blocks} added, "
                f"{each['remaining']:.1%} of the outliers left"
            )
    for each in facts.get("verified_at", ()):
        height, width = each["image_size"]
        on = "others" if facts.get("verified_on_others", True) else "images that also chose,"
        lines.append(
            f"measured on {each['images']} {on} at {height} x {width}: {each['remaining']:.1%} of the outliers left "
            f"at worst (block {each['worst_block']}), features changed by {each['change_pooled']:.3f} (pooled) and "
            f"{each['change_patches']:.3f} (patches)"
        )
        lines += _attention_in_words(each)
        lines += what_is_wrong_with_maps(each)
    if not facts.get("target_met", True):
        lines.append(
            f"the target of {facts['target']:.1%} was not reached: this set came closest. More images, another "
            "--max-block or a higher --target may help; testreg diagnose says what kind of outliers they are"
        )
    if cut := facts.get("out_of_time"):
        left_out = {
            "images": f"all images but {facts['images'] + facts['held_out']}",
            "ranking": "ranking until halves of the images agree",
            "choosing": "further sets of neurons, so that more neurons or registers may do better",
        }
        lines.append(f"the --budget was too small for: {'; '.join(left_out[each] for each in cut)}")
    agreement = facts.get("chosen", {}).get("agreement")
    if agreement is not None and agreement < HIGH_AGREEMENT:
        lines.append(f"the head agrees with itself on {agreement:.1%} of the images, with and without registers")
    if not neurons.verified:
        lines.append(not_verified())
    return "\n".join(lines)


def not_verified() -> str:
    """What a list that is not verified lacks."""
    from testreg.calibration.view import MIN_VERIFYING, NUM_CHOOSING

    return (
        f"not verified: that takes a target that is met, and clean maps, on at least {MIN_VERIFYING} held-out "
        f"images that had no part in the choice ({2 * (NUM_CHOOSING + MIN_VERIFYING)} images or more in all)"
    )


def _registers_in_words(registers: Sequence[Mapping[str, Any]], number: int) -> str:
    """How many registers were chosen, and what each number of them changes."""
    changes = ", ".join(
        f"{max(each['change_pooled'], each['change_patches']):.3f} with {each['num_registers']}" for each in registers
    )
    which = "1 register" if number == 1 else f"{number} registers, each with all of the neurons"
    return f"{which}: features change by {changes}"


def _attention_in_words(check: Mapping[str, Any]) -> list[str]:
    """What became of the attention to the patches that were outliers, where it can be seen."""
    if check.get("sink") is None or check.get("hottest") is None:
        return []
    before = check["before"]
    return [
        f"attention to a former outlier, over that to another patch: {before['sink']:.1f} before, {check['sink']:.1f} "
        f"now; share of the hottest patch: {before['hottest']:.1%} before, {check['hottest']:.1%} now (hotter in "
        f"{check['hotter']:.0%} of the images); former outliers are {check['unlike']:.0%} as unlike their neighbours "
        "as before"
    ]


def _result(neurons: RegisterNeurons, output: Path, report: Path | None, figures: Path | None) -> dict[str, Any]:
    """What --json writes: where everything is, and what was found, without the ranking."""
    return {
        "output": str(output),
        "report": None if report is None else str(report),
        "figures": None if figures is None else str(figures),
        "neurons": neurons.by_block(),
        "verified": neurons.verified,
        "calibration": dict(neurons.calibration),
    }
