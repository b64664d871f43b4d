"""testreg diagnose"""

from __future__ import annotations

import itertools

from testreg.cli.exits import Exit
from testreg.cli.models import chosen_device, load
from testreg.cli.options import (
    BatchSize,
    Device,
    DType,
    Images,
    ImageSize,
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

REPORT_IMAGES = 32


def diagnose(
    run: Run,
    model: Model,
    *,
    images: Images,
    report: ReportFile = None,
    image_size: ImageSize = None,
    device: Device = None,
    dtype: DType = None,
    trust_remote_code: TrustRemoteCode = False,
    num_images: NumImages = 200,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    seed: Seed = 0,
    threshold: Threshold = None,
    rule: Rule = "robust",
) -> Exit:
    """Where a model's outliers are, and whether registers fix them."""
    from testreg.io.processes import process_group, rank
    from testreg.io.sources import check_images
    from testreg.measure import diagnose as measure
    from testreg.measure.outliers import OutlierRule

    outlier_rule = OutlierRule(threshold=threshold, mixture=rule == "mixture")
    check_file(report, *PAGES)
    check_images(images)  # before a model is loaded for nothing
    with process_group(chosen_device(device)) as own:
        loaded = load(run, model, own, image_size=image_size, dtype=dtype, trust_remote_code=trust_remote_code)
        found = measure.diagnose(
            loaded.model,
            images,
            transform=loaded.transform,
            batch_size=batch_size,
            num_images=num_images,
            rule=outlier_rule,
            workers=workers,
            seed=seed,
            progress=not run.quiet,
        )
        is_first = rank() == 0
    if is_first:
        run.answer(found.verdict)
        run.say("\n".join(["", found.table(), "", *found.notes]))
        run.write(found.to_dict())
        if report is not None:
            from testreg.io.images import ImageStream
            from testreg.report.diagnosis import write_diagnosis_report

            with run.phase("measuring for the report"):
                stream = ImageStream(images, loaded.transform, num_images=num_images, seed=seed)
                shown = [image for _, image in itertools.islice(stream.numbered(), REPORT_IMAGES)]
                write_diagnosis_report(report, found, loaded.model, shown, command=run.command, rule=outlier_rule)
            run.answer(str(report))
    return {"movable": Exit.DONE, "none": Exit.NOTHING_TO_FIX}.get(found.kind, Exit.NOT_FIXABLE)
