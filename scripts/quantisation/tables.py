"""The results in Markdown."""

from __future__ import annotations

from typing import Any

from restoration.tables import interval, markdown, number

from quantisation.fake import PLAIN

REAL = {"torchao": "torchao, static, largest, symmetric", "onnxruntime": "onnxruntime, dynamic, image, asymmetric"}


def of_places(made: dict[str, Any]) -> str:
    """What each column is that has been run."""
    done = made["embed"]["settings"]["float"]["own"]["values"]
    return markdown([["column", "what"], *([name, what] for name, what in made["columns"].items() if name in done)])


def of_own(made: dict[str, Any]) -> str:
    """How near each column stays to its own float network."""
    return _headed(made, _values(made["embed"]["settings"], "own"))


def of_nearness(made: dict[str, Any]) -> str:
    """How near each column is to the plain network in float."""
    return _headed(made, _values(made["embed"]["settings"], "plain"))


def of_gaps(made: dict[str, Any]) -> str:
    """How far each column is from the plain network in the same setting, with its interval."""
    rows = []
    for setting, metrics in made["embed"]["settings"].items():
        rows += [
            [setting, metric, *(interval(each, 3) for each in metrics[metric]["difference"].values())]
            for metric in ("own", "plain")
        ]
    names = list(made["embed"]["settings"]["float"]["own"]["difference"])
    return _headed(made, markdown([["setting", "to", *names], *rows]))


def of_knn(made: dict[str, Any]) -> str:
    """The accuracy of nearest neighbours, and how far it is from the plain network's in the same setting."""
    settings = {name: metrics["top1"] for name, metrics in made["knn"]["settings"].items()}
    names = list(settings["float"]["values"])
    rows = [["setting", *names, *(f"{name} - plain, 95 % interval" for name in names if name != PLAIN)]]
    for name, found in settings.items():
        differences = (interval(each, 3) for each in found["difference"].values())
        rows.append([name, *(number(value, 3) for value in found["values"].values()), *differences])
    return _headed(made, markdown(rows))


def of_real(made: dict[str, Any]) -> str:
    """What the recipes do with real small numbers."""
    rows = [["quantiser", "to", PLAIN, "together", "recipe", "recipe - plain, 95 % interval"]]
    for name, what in REAL.items():
        if name in made:
            for metric, found in made[name]["settings"]["8 bit"].items():
                values = [number(value, 3) for value in found["values"].values()]
                rows.append([what, metric, *values, interval(found["difference"]["recipe"], 3)])
    return _headed(made, markdown(rows))


def _values(settings: dict[str, Any], metric: str) -> str:
    """A line for each setting: bold where the interval of the difference from plain lies above 0, italic below."""
    rows = []
    for setting, metrics in settings.items():
        found = metrics[metric]
        row = [setting]
        for name, value in found["values"].items():
            _, low, high = found["difference"].get(name, (0, 0, 0))
            mark = "**" if low > 0 else "*" if high < 0 else ""
            row.append(f"{mark}{number(value, 3)}{mark}")
        rows.append(row)
    return markdown([["setting", *settings["float"][metric]["values"]], *rows])


def _headed(made: dict[str, Any], table: str) -> str:
    return f"**{made['note']}**\n\n{table}"
