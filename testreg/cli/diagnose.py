"""The command `testreg diagnose`, which tells where a model has outliers, and whether registers fix them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from testreg.cli.exits import Exit
from testreg.cli.invocation import Invocation
from testreg.cli.models import check_drawn, chosen_device, load
from testreg.cli.options import (
    BatchSize,
    Images,
    Loading,
    Models,
    NumImages,
    ReportFile,
    Rule,
    Seed,
    Threshold,
    Workers,
)
from testreg.cli.outputs import PAGES, check_file

if TYPE_CHECKING:
    from testreg.measure.diagnosis import Diagnosis

REPORT_IMAGES = 32  # the report measures at most so many images, the first ones


def diagnose(
    invocation: Invocation,
    models: Models,
    *,
    images: Images,
    report: ReportFile = None,
    loading: Loading,
    num_images: NumImages = 200,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    seed: Seed = 0,
    threshold: Threshold = None,
    rule: Rule = "robust",
) -> Exit:
    """Where a model's outliers are, and whether registers fix them.

    Several models are compared in one table, on the same images, each with its own preprocessing.
    """
    from testreg.io.processes import process_group, rank
    from testreg.io.sources import check_images
    from testreg.measure import diagnose as measure
    from testreg.measure.outliers import OutlierRule

    outlier_rule = OutlierRule(threshold=threshold, mixture=rule == "mixture")
    if report is not None and len(models) > 1:
        raise ValueError("a report shows one model: name one, or leave --report out")
    check_file(report, *PAGES)
    check_images(images)  # so that an error comes before a model is loaded
    diagnoses: dict[str, Diagnosis] = {}
    with process_group(chosen_device(loading.device)) as own_device:
        for model in dict.fromkeys(models):
            loaded = load(invocation, model, loading, own_device)
            if report is not None:
                check_drawn(loaded)
            diagnoses[model] = measure.diagnose(
                loaded.model,
                images,
                transform=loaded.transform,
                batch_size=batch_size,
                num_images=num_images,
                rule=outlier_rule,
                workers=workers,
                seed=seed,
                progress=not invocation.quiet,
            )
        is_first = rank() == 0
    first = next(iter(diagnoses.values()))
    if is_first and len(diagnoses) > 1:
        from testreg.measure import several

        invocation.answer(several.verdicts(diagnoses))
        invocation.say(f"\n{several.table(diagnoses)}")
        invocation.write([{"name": name, **each.to_json()} for name, each in diagnoses.items()])
    elif is_first:
        invocation.answer(first.verdict)
        invocation.say("\n".join(["", first.table(), "", *first.notes]))
        invocation.write(first.to_json())
        if report is not None:
            from testreg.io.images import ImageStream
            from testreg.report.diagnosis import write_diagnosis_report

            with invocation.phase("measuring for the report"):
                stream = ImageStream(images, loaded.transform, num_images=num_images, seed=seed)
                images_shown = [image for _, image in itertools.islice(stream.numbered(), REPORT_IMAGES)]
                write_diagnosis_report(
                    report, first, loaded.model, images_shown, command=invocation.command, rule=outlier_rule
                )
            invocation.answer(str(report))
    if len(diagnoses) > 1:
        return Exit.DONE
    return {"movable": Exit.DONE, "none": Exit.NOTHING_TO_FIX}.get(first.kind, Exit.NOT_FIXABLE)
