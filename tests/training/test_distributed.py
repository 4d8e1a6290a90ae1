"""FSDP2 and DeepSpeed with real processes on gloo: their adapter is that of one process, also after a resume."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from sevpeft.cli import main
from sevpeft.errors import ModelError, RunError
from sevpeft.modeling.loading import Precision, quantization_config
from sevpeft.recipe import load_recipe, recipe_from_values
from sevpeft.runs import Run
from sevpeft.training.distributed import (
    check_adapter_is_complete,
    check_engine,
    check_engine_of_model,
    check_same_processes,
    check_sharding,
    set_up_engine,
)
from sevpeft.training.resolve import sft_config
from sevpeft.training.train import train
from tests.models import build_model
from tests.training.children import exit_codes, message_of, start, train_in_child
from tests.training.sharded_on_gloo import ENGINES_DEVICE, pose_as_gpus

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
ON_CPU = Precision(torch.float32, bf16=False, fp16=False)
# Adam divides a gradient by its own size, so that rounding in the sum over processes moves a weight that has hardly a
# gradient by a part of a step of 1e-3; the losses agree far closer.
SAME_WEIGHT, SAME_LOSS = 1e-4, 1e-6


@pytest.fixture
def settings(model_folder: Callable[..., Path]) -> list[str]:
    return [
        f"model.name_or_path={model_folder('llama')}",
        "data.max_rows=60",
        "data.validation_size=5",
        "lora.lora_dropout=0",
        "training.max_length=160",
        "training.gradient_accumulation_steps=4",
        "training.per_device_eval_batch_size=4",
        "training.gradient_checkpointing=false",
        "training.max_steps=3",
        "training.learning_rate=1e-3",
        "training.logging_steps=2",
        "training.save_strategy=steps",
        "training.save_steps=2",
        "training.save_total_limit=2",
        "training.eval_strategy=no",
    ]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_as_one_process(run: Path, settings: list[str], engine: str) -> None:
    one = train(load_recipe(QUICKSTART, [*settings, "training.per_device_train_batch_size=2"]), run.parent / "one")
    environment = Run(run).read_json("environment.json")
    assert (environment["processes"], environment["engine"]) == (2, engine)
    first, second = weights_of(one.folder), weights_of(run)
    assert {name: tensor.shape for name, tensor in first.items()} == {n: tensor.shape for n, tensor in second.items()}
    for name in first:
        assert float((first[name] - second[name]).abs().max()) <= SAME_WEIGHT, name
    assert any(bool(first[name].any()) for name in first if "lora_B" in name)
    for moment in ("before", "after"):
        assert Run(run).metrics()[moment] == pytest.approx(one.metrics()[moment], rel=SAME_LOSS)


def variables_of(config: str) -> dict[str, str]:
    """What `accelerate launch` puts into the environment for an engine of accelerate_configs/."""
    path = ROOT / "accelerate_configs" / f"{config}.yaml"
    words = ["--config_file", str(path), "--main_process_port", "0", "-m", "sevpeft"]
    requested, config_file, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    requested.deepspeed_fields_from_accelerate_config = ",".join(config_file.deepspeed_config)
    found = prepare_deepspeed_cmd_env(requested)[1] if requested.use_deepspeed else prepare_multi_gpu_env(requested)
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def train_sharded(recipe: Path, settings: list[str], folder: Path) -> None:
    pose_as_gpus()
    train_in_child(recipe, settings, folder, None)


def train_on_two(config: str, run: Path, settings: list[str]) -> None:
    """As the launcher would begin it with an engine of accelerate_configs/, one row for each of two processes."""
    words = [*settings, "training.per_device_train_batch_size=1"]
    variables = {**variables_of(config), **ENGINES_DEVICE, "ACCELERATE_USE_CPU": "false"}
    cache = str(run.parent / "cache")
    processes = start(train_sharded, QUICKSTART, words, run, cache, processes=2, variables=variables)
    assert exit_codes(processes) == [0, 0]


def test_fsdp2_divides_a_4bit_model_and_resumes_to_the_same_bits(tmp_path: Path, settings: list[str]) -> None:
    settings += ["quantization.load_in_4bit=true", "training.gradient_checkpointing=true"]
    run, killed = tmp_path / "several", tmp_path / "killed"

    train_on_two("fsdp2_qlora", run, settings)
    assert_same_as_one_process(run, settings, "FSDP2")
    shutil.copytree(run, killed)
    shutil.rmtree(killed / "adapter")
    shutil.rmtree(killed / "checkpoints" / "checkpoint-3")
    train_on_two("fsdp2_qlora", killed, settings)
    assert Run(killed).metrics()["training"]["resumed_from"] == "checkpoint-2"
    whole, resumed = weights_of(run), weights_of(killed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole) and whole.keys() == resumed.keys()


@pytest.mark.skipif(not is_deepspeed_available(), reason="DeepSpeed is not installed: pip install '.[deepspeed]'")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_the_adapter_of_one_process(tmp_path: Path, settings: list[str], stage: int) -> None:
    run = tmp_path / "several"
    train_on_two(f"deepspeed_zero{stage}", run, settings)
    assert_same_as_one_process(run, settings, f"ZeRO-{stage}")


def test_a_launch_for_fsdp_that_would_become_ddp_is_an_error(tmp_path: Path) -> None:
    """Two processes as the launcher starts them for fsdp2.yaml; it is accelerate that would take DDP, on a CPU."""
    run = tmp_path / "run"
    requested = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "false"}
    processes = start(train_in_child, QUICKSTART, [], run, None, str(tmp_path), processes=2, variables=requested)
    assert exit_codes(processes) == [1, 1]
    assert "cpu_2.yaml" in message_of(processes[0], tmp_path)
    assert not run.exists()


# What is refused before the first step


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment that `accelerate launch` makes of fsdp2.yaml."""
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def refuse(tmp_path: Path, *changes: str) -> None:
    recipe = load_recipe(QUICKSTART, list(changes))
    check_sharding(recipe, sft_config(recipe, ON_CPU, tmp_path / "checkpoints"))


def test_what_fsdp2_can_do_is_let_through(fsdp: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse(tmp_path)
    refuse(tmp_path, "training.optim=adamw_torch", "quantization.load_in_4bit=true", "training.packing=true")


def test_what_would_train_or_save_wrongly_under_fsdp_is_refused_with_the_remedy(
    fsdp: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for setting, remedy in {
        "training.optim=paged_adamw_8bit": "training.optim=adamw_torch",
        "quantization.load_in_8bit=true": "quantization.load_in_4bit=true",
        "lora.loraplus_lr_ratio=16": "lora.loraplus_lr_ratio",
    }.items():
        with pytest.raises(RunError, match=remedy):
            refuse(tmp_path, setting)
    fsdp.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    with pytest.raises(RunError, match="fsdp_state_dict_type: FULL_STATE_DICT"):
        refuse(tmp_path)


def test_another_engine_than_asked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate replaces FSDP on a CPU, and DeepSpeed beside it, by DDP or one process without a word."""
    kinds, wrong = DistributedType, []
    for variable, kind, message in (
        (None, kinds.NO, ""),
        (None, kinds.MULTI_GPU, ""),
        ("ACCELERATE_USE_FSDP", kinds.MULTI_CPU, "asked for FSDP, and DDP"),
        ("ACCELERATE_USE_FSDP", kinds.NO, "asked for FSDP, and one process"),
        ("ACCELERATE_USE_FSDP", kinds.MULTI_GPU, ""),
        ("ACCELERATE_USE_DEEPSPEED", kinds.MULTI_GPU, "asked for DeepSpeed, and DDP"),
        ("ACCELERATE_USE_DEEPSPEED", kinds.DEEPSPEED, ""),
    ):
        with monkeypatch.context() as patch:
            if variable:
                patch.setenv(variable, "true")
            try:
                check_engine(SimpleNamespace(distributed_type=kind))  # type: ignore[arg-type]
                found = ""
            except RunError as error:
                found = str(error)
            if bool(message) != bool(found) or message not in found or (found and "cpu_2.yaml" not in found):
                wrong.append((variable, kind, found))
    assert wrong == []


def test_processes_that_cannot_find_one_another_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def alone(**_: object) -> None:
        raise ValueError("Looks like distributed multinode run but MASTER_ADDR env not set. Set it.")

    monkeypatch.setattr("sevpeft.training.train.PartialState", alone)
    with pytest.raises(RunError, match="`accelerate launch`"):
        train(recipe_from_values({}), tmp_path / "run")


def test_each_configuration_is_accepted_by_accelerate_and_says_when_to_use_it() -> None:
    configs = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    wrong = []
    for path in configs:
        lines = path.read_text(encoding="utf-8").splitlines()
        header = [line for line in lines if line.startswith("#")]
        command = any(f"--config_file accelerate_configs/{path.name}" in line for line in header)
        if not (load_config_from_file(str(path)).num_processes >= 1 and command and header[0] == lines[0]):
            wrong.append(path.name)
    assert len(configs) == 9 and wrong == []


@pytest.mark.parametrize("verb", ["evaluate", "compare", "chat"])
def test_what_one_process_does_is_refused_to_several(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["sevpeft", verb, "quickstart" if verb == "compare" else str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert f"start `sevpeft {verb}` itself" in capsys.readouterr().err


def test_quantized_weights_pose_as_the_type_that_is_divided(fsdp: pytest.MonkeyPatch) -> None:
    def storage(precision: Precision, *changes: str) -> torch.dtype:
        recipe = load_recipe(QUICKSTART, ["quantization.load_in_4bit=true", *changes])
        return quantization_config(recipe, precision).bnb_4bit_quant_storage

    assert storage(ON_CPU) == torch.float32
    mixed = Precision(torch.float32, bf16=True, fp16=False)
    assert storage(mixed) == torch.bfloat16
    with pytest.raises(ModelError, match=r"bnb_4bit_quant_storage=uint8.*auto"):
        storage(mixed, "quantization.bnb_4bit_quant_storage=uint8")
    fsdp.delenv("ACCELERATE_USE_FSDP")
    assert storage(mixed) == torch.uint8
    assert storage(mixed, "quantization.bnb_4bit_quant_storage=float16") == torch.float16


# What the engine is given, and what it leaves


def adapted(architecture: str = "llama") -> torch.nn.Module:
    return get_peft_model(build_model(architecture), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


def test_every_layer_that_fsdp_looks_for_is_there(fsdp: pytest.MonkeyPatch) -> None:
    """Gemma 3 names parts of a picture tower that its models do not have, and accelerate fails on them."""
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None, mixed_precision_policy=None)
    set_up_engine(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), adapted("gemma3"))
    assert "Gemma3DecoderLayer" in plugin.transformer_cls_names_to_wrap
    assert "SiglipMultiheadAttentionPoolingHead" not in plugin.transformer_cls_names_to_wrap


def test_log_probabilities_are_not_rounded_by_fsdp(fsdp: pytest.MonkeyPatch) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision("bf16")
    model = adapted().to(torch.bfloat16)
    set_up_engine(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_model_that_is_not_in_fsdps_hands_takes_no_step(fsdp: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"FSDP.*fsdp2\.yaml"):
        check_engine_of_model(Accelerator(cpu=True), adapted())


def test_an_adapter_that_was_not_gathered_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(RunError, match=r"fsdp2\.yaml"):
        check_adapter_is_complete(tmp_path, model)
    model.save_pretrained(tmp_path)
    check_adapter_is_complete(tmp_path, model)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    name = sorted(whole)[0]
    for part in (torch.empty(0), whole[name][: len(whole[name]) // 2].clone()):
        save_file(whole | {name: part}, path)
        with pytest.raises(RunError, match=r"fsdp2\.yaml"):
            check_adapter_is_complete(tmp_path, model)


def test_a_run_is_resumed_by_the_processes_that_began_it_only() -> None:
    here = Accelerator(cpu=True)
    check_same_processes(here, {"processes": 1, "engine": "one process"})
    with pytest.raises(RunError, match=r"2 × FSDP2.*1 × one process"):
        check_same_processes(here, {"processes": 2, "engine": "FSDP2"})
