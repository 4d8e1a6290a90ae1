"""Refuses names in the `lora` section that match nothing of a model.

PEFT looks for them module by module and says nothing where one is never met: a pattern with a slip of the pen leaves
every layer at the common rank, and an exclusion excludes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from sevpeft.errors import ModelError


def refuse_unmatched(config: LoraConfig, model: PreTrainedModel) -> None:
    """Raises ModelError for a name of `exclude_modules`, `rank_pattern`, `alpha_pattern`, `target_parameters` or
    `layers_to_transform` that the model does not have, with those that it has."""
    modules = [name for name, _ in model.named_modules() if name]
    kind = model.config.model_type
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if not any(re.fullmatch(excluded, name) for name in modules):
            raise _unmatched("exclude_modules", [excluded], kind, _last(modules))
    elif excluded:
        absent = [e for e in excluded if not any(name == e or name.endswith(f".{e}") for name in modules)]
        if absent:
            raise _unmatched("exclude_modules", absent, kind, _last(modules))
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, setting) or {}
        absent = [key for key in patterns if not any(get_pattern_key([key], name) == key for name in modules)]
        if absent:
            raise _unmatched(setting, absent, kind, _last(modules))
    parameters = [name for name, _ in model.named_parameters()]
    absent = [t for t in config.target_parameters or () if not any(p == t or p.endswith(f".{t}") for p in parameters)]
    if absent:
        raise _unmatched("target_parameters", absent, kind, {".".join(name.split(".")[-2:]) for name in parameters})
    layers = config.layers_to_transform
    if layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        beyond = [n for n in ([layers] if isinstance(layers, int) else layers) if not 0 <= n < count]
        if beyond:
            raise ModelError(
                f"lora.layers_to_transform names {', '.join(map(str, beyond))}, and {kind} has the layers 0 to "
                f"{count - 1}; name some of them."
            )


def _last(modules: list[str]) -> set[str]:
    """Last parts of the names, without the numbers of layers."""
    return {last for name in modules if not (last := name.rsplit(".", 1)[-1]).isdigit()}


def _unmatched(setting: str, absent: Iterable[str], kind: str, existing: set[str]) -> ModelError:
    return ModelError(
        f"lora.{setting} names {', '.join(sorted(absent))}, which {kind} does not have; it has "
        f"{', '.join(sorted(existing))}."
    )
