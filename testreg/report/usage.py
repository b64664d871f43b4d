"""Lines of Python and shell that show how to use register neurons on a model."""

from __future__ import annotations

import shlex

from testreg.files import plain


def python_lines(name: str, neurons: str) -> list[str]:
    """Lines of Python that load the model with its library, and patch it.

    Args:
        name: the model's name, as `testreg.load_model` takes it. For any other name, a comment stands for the loading.
        neurons: the file of the neurons.
    """
    library, _, rest = name.partition(":")
    patch = f"testreg.patch(model, {neurons!r})"
    match library:
        case "demo":
            return ["import testreg", "model = testreg.demo_model()", patch]
        case "timm" if rest:
            return ["import timm, testreg", f"model = timm.create_model({rest!r}, pretrained=True).eval()", patch]
        case "hf" if rest:
            return [
                "import testreg, transformers",
                f"model = transformers.AutoModel.from_pretrained({rest!r}).eval()",
                patch,
            ]
        case "open_clip" if "/" in rest:
            arch, _, tag = rest.rpartition("/")
            return [
                "import open_clip, testreg",
                f"model = open_clip.create_model({arch!r}, pretrained={tag!r}).eval()",
                patch,
            ]
        case "hub" if rest.count("/") == 2:
            repository, _, entry = rest.rpartition("/")
            return ["import testreg, torch", f"model = torch.hub.load({repository!r}, {entry!r}).eval()", patch]
        case "torchvision" if rest:
            return [
                "import testreg, torchvision",
                f"model = torchvision.models.get_model({rest!r}, weights='DEFAULT').eval()",
                patch,
            ]
        case _:
            return [
                "import testreg",
                f"# model: the {plain(' '.join(name.split()))} that was calibrated, loaded as you always do",
                patch,
            ]


def shell_line(name: str, neurons: str) -> str:
    """The shell command that saves the patched model."""
    return shlex.join(["testreg", "apply", name, "--neurons", neurons, "-o", "patched"])
