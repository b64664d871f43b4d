"""The model card (README.md) of a Hub repository that holds register neurons or a patched checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testreg.files import plain
from testreg.records.calibration import Calibration

CARD = "README.md"
_MARK = "<!-- Written by testreg, and again whenever it pushes. Delete this line to keep a text of your own. -->"
_HUB_PREFIXES = {"hf": "", "timm": "timm/"}  # {library: what precedes a checkpoint's name on the Hub}


def is_ours(card: str) -> bool:
    """Whether testreg wrote the card, and may write it again: nobody has deleted its mark since."""
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
    """The card as text: Markdown with a YAML header.

    Args:
        repository: ORGANISATION/NAME.
        blocks: the neurons in use, `{block: [units]}`.
        verified, model, calibration, provenance: attributes of the list of neurons, see `testreg.RegisterNeurons`.
        is_checkpoint: whether the repository holds a patched checkpoint, and not only the list of neurons.
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
"""Attributes of the calibration that the card lists."""


def _base_of(names: Sequence[str]) -> str | None:
    """The Hub repository of the model that the neurons belong to, if one of the model's `names` tells; else None."""
    for name in names:
        library, _, rest = name.partition(":")
        base = f"{_HUB_PREFIXES[library]}{rest}" if library in _HUB_PREFIXES else ""
        if base.count("/") == 1 and ":" not in base and not base.startswith((".", "/")):
            return base
    return None
