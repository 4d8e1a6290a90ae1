"""Turns the `lora` section into a PEFT configuration, and says what of a model it will train."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from sevpeft.errors import ModelError
from sevpeft.recipe import Recipe


def lora_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """LoRA settings of the recipe for a causal language model.

    Raises:
        ModelError: PEFT refuses the combination, or `target_modules` names no module of this model.
    """
    settings = recipe.lora.settings()
    start = settings.get("init_lora_weights")
    if start in ("eva", "corda", "lora_ga"):
        raise ModelError(
            f"lora.init_lora_weights={start} needs a pass over the data before training, which is not made here, so it "
            "would start like plain LoRA; leave it out, or use olora."
        )
    try:
        config = LoraConfig(task_type="CAUSAL_LM", **settings)
    except (ValueError, TypeError, ImportError) as error:
        raise ModelError(f"PEFT refuses the lora section: {' '.join(str(error).split())}") from error
    _refuse_absent_targets(config, model)
    return config


def _refuse_absent_targets(config: LoraConfig, model: PreTrainedModel) -> None:
    targets = config.target_modules
    if not isinstance(targets, set | list):
        return
    names = [name for name, _ in model.named_modules()]
    absent = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))
    if absent:
        matrices = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
        linear = sorted({name.rsplit(".", 1)[-1] for name in matrices})
        raise ModelError(
            f"lora.target_modules names {', '.join(absent)}, which {model.config.model_type} does not have; "
            f"it has {', '.join(linear)}, or use all-linear."
        )


def trainable_parameters(model: PeftModel) -> tuple[int, int]:
    """(trainable, all) parameters, counting a 4-bit weight as the numbers it stands for."""
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)


def sort_target_modules(adapter: Path) -> None:
    """Writes `target_modules` of a saved adapter in alphabetical order.

    PEFT keeps them in a set, whose order changes from process to process, so that two equal runs would differ.
    """
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
