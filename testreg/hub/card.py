"""The model card of a repository with register neurons, or with a patched checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testreg.files import plain
from testreg.records.calibration import Calibration

CARD = "README.md"
_MARK = "<!-- Written by testreg, and again whenever it pushes. Delete this line to keep a text of your own. -->"
_BASES = {"hf": "", "timm": "timm/"}  # where the Hub has a checkpoint of that name


def is_ours(card: str) -> bool:
    """Whether testreg wrote the card, and nobody claims it since."""
    return _MARK in card


def model_card(
    repository: str,
    *,
    blocks: Mapping[int, Sequence[int]],
    verified: bool,
    model: Mapping[str, Any],
    calibration: Calibration,
    provenance: Mapping[str, Any],
    is_checkpoint: bool,
) -> str:
    """The card, in Markdown with its YAML header.

    Args:
        blocks: the neurons in use, `{block: [units]}`.
        verified, model, calibration, provenance: those of their list, see `testreg.RegisterNeurons`.
        is_checkpoint: whether a patched checkpoint is in the repository, and not the neurons alone.
    """
    import jinja2
    from huggingface_hub import ModelCardData

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(plain=plain, percent=lambda value: f"{value:.1%}")
    template = environment.from_string((Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8"))
    text = template.render(
        repository=repository,
        is_checkpoint=is_checkpoint,
        name=model.get("name", "a model that is not named"),
        blocks=blocks,
        count=sum(map(len, blocks.values())),
        verified=verified,
        checks=calibration.verified_at,
        facts={key: value for key in _FACTS if (value := getattr(calibration, key)) is not None},
        provenance={key: value for key, value in provenance.items() if isinstance(value, str)},
    )
    data = ModelCardData(
        library_name="testreg", tags=["testreg", "test-time-registers"], base_model=_base_of(model.get("names", ()))
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_MARK}\n\n{text}"


_FACTS = ("verdict", "source", "images", "rule", "score", "made_at")


def _base_of(names: Sequence[str]) -> str | None:
    """The checkpoint's repository on the Hub, if one of its names says which that is."""
    for name in names:
        library, _, rest = name.partition(":")
        base = f"{_BASES[library]}{rest}" if library in _BASES else ""
        if base.count("/") == 1 and ":" not in base and not base.startswith((".", "/")):
            return base
    return None
