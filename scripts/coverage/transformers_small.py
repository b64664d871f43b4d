"""`Row`: a row of the table of transformers' models. `small_config`: their configurations, made small."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from coverage import transformers_inputs as inputs
from coverage.registry import Absent
from coverage.transformers_inputs import SIDE, MakeInputs

Settings = Mapping[str, Any]

SIZES = (
    (0, "pad_token_id"),
    (1, "layers encoder_layers decoder_layers"),
    (2, "num_experts_per_tok"),
    (3, "depth num_hidden_layers"),
    (4, "num_heads num_attention_heads attention_heads encoder_attention_heads decoder_attention_heads"),
    (4, "num_key_value_heads num_experts num_local_experts n_routed_experts"),
    (7, "image_token_id image_token_index"),
    (8, "head_dim"),
    (16, "moe_intermediate_size"),
    (32, "hidden_size embed_dim out_hidden_size text_hidden_size projection_dim encoder_hidden_size d_model"),
    (64, "intermediate_size mlp_dim encoder_ffn_dim decoder_ffn_dim ffn_dim max_position_embeddings"),
    (100, "vocab_size vocab_size_per_layer_input"),
    (SIDE, "patch_size"),
    (4 * SIDE, "image_size"),
)
SMALL = {name: size for size, names in SIZES for name in names.split()}
"""{field of a configuration: its value in small models}."""


@dataclass(frozen=True)
class Row:
    """Model classes that need the same settings and inputs."""

    names: str
    """The names of public classes, separated by spaces, where * stands for ForConditionalGeneration. In brackets at the
    end is what distinguishes this row from other rows with the same classes."""
    config: Settings = field(default_factory=dict)
    """Settings of the configuration beside its sizes."""
    inputs: MakeInputs = inputs.squares
    """Makes the inputs."""
    extras: Sequence[str] = ("hidden_states", "attentions")
    """Optional outputs to ask for. Those that depend on other images or on chance are left out."""
    packed: bool = False
    """Whether the tower returns one sequence (1, S, C) with the tokens of all images."""
    shared: str = ""
    """The name of an output that does not belong to a single image."""

    def each(self) -> Iterator[tuple[str, str]]:
        """Yield (class, class with the text in brackets) for each class."""
        names, bracket, variant = re.split(r"( ?\[|$)", self.names, maxsplit=1)
        for name in names.replace("*", "ForConditionalGeneration").split():
            yield name, name + bracket + variant


def transformers_class(name: str) -> type[Any]:
    """The public class of this name in transformers. Raises Absent if the installed release does not have it."""
    if not hasattr(transformers, name):
        raise Absent(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def small_config(config_class: type[PretrainedConfig], overrides: Settings) -> PretrainedConfig:
    """The default configuration with the sizes of `SMALL` and with `overrides`; the same for its parts."""
    default = config_class()
    known = default.to_dict()
    values = {**{name: size for name, size in SMALL.items() if isinstance(known.get(name), int)}, **overrides}
    for name in default.sub_configs:
        part, changes = getattr(default, name, None), dict(overrides.get(name) or {})
        if "model_type" in changes:
            values[name] = small_config(CONFIG_MAPPING[changes.pop("model_type")], changes).to_dict()
        elif isinstance(part, PretrainedConfig):
            given = getattr(getattr(config_class, "sub_configs_defaults", {}).get(name), "init_kwargs", {})
            # Settings that the model gives to this part are kept, except sizes.
            switches = {key: value for key, value in given.items() if key not in SMALL and not isinstance(value, dict)}
            values[name] = small_config(type(part), switches | changes).to_dict()  # transformers 4 wants dictionaries
    return config_class(**values)
