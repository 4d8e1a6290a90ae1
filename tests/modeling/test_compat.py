"""What is private upstream is still where this room touches it, and still needs touching."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.backends.cpu.ops
import bitsandbytes.backends.default.ops
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as hf_deepspeed

import sevpeft.modeling
from sevpeft.modeling import compat
from tests.models import build_model


def test_the_launcher_still_speaks_through_these_variables() -> None:
    import accelerate.commands.launch
    import accelerate.state
    import accelerate.utils.launch

    for module in (accelerate.utils.launch, accelerate.state):
        source = inspect.getsource(module)
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"):
            assert name in source, (module.__name__, name)


def test_what_the_launcher_asks_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert compat.requested_engine() is None and not compat.cpu_requested() and not compat.weights_are_sharded()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert compat.requested_engine() == "FSDP" and compat.weights_are_sharded()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "1")
    assert compat.requested_engine() == "DeepSpeed"


def test_the_settings_of_deepspeed_are_put_aside_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero3:
        def is_zero3(self) -> bool:
            return True

    settings = Zero3()
    monkeypatch.setattr(hf_deepspeed, "_hf_deepspeed_config_weak_ref", lambda: settings)
    assert compat.zero3()
    with compat.on_meta_device():
        assert not compat.zero3()
        model = AutoModelForCausalLM.from_config(build_model("llama").config)
    assert compat.zero3() and {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_transformers_knows_a_quantization_by_its_name() -> None:
    assert compat.knows_quantization({"quant_method": "gptq", "bits": 4})
    assert compat.knows_quantization({"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert not compat.knows_quantization({"quant_method": "modelopt"})


def test_bitsandbytes_still_repacks_unless_the_switch_is_off() -> None:
    module = Linear4bit(8, 8)
    assert hasattr(module, "support_avx512bf16_for_cpu")
    assert "support_avx512bf16_for_cpu" in inspect.getsource(Linear4bit.forward)
    module.support_avx512bf16_for_cpu = True
    compat.disable_cpu_avx512_repack(torch.nn.Sequential(module))
    assert module.support_avx512bf16_for_cpu is False


def test_what_bitsandbytes_has_compiled_is_compiled_when_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "torch.compile(" in inspect.getsource(bitsandbytes.backends.default.ops)
    options_of: list[dict[str, bool]] = []

    def compiled(function: object, **options: bool) -> object:
        options_of.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    (tmp_path / "bitsandbytes.py").write_text("import torch\nsize = torch.compile(abs, dynamic=False)\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.reload(sevpeft.modeling)
    assert options_of == [] and torch.compile is compiled
    assert sys.modules["bitsandbytes"].size(-2) == 2 and options_of == [{"dynamic": False}]


def test_bitsandbytes_finds_no_code_of_the_hub_as_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "from kernels import get_kernel" in inspect.getsource(bitsandbytes.backends.cpu.ops)
    for name in ("bitsandbytes", "kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text("import kernels" if name == "bitsandbytes" else "")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.reload(sevpeft.modeling)
    assert "bitsandbytes" not in sys.modules and "kernels" not in sys.modules
    own = importlib.import_module("kernels")
    importlib.reload(sevpeft.modeling)
    assert "bitsandbytes" not in sys.modules and sys.modules["kernels"] is own


def test_a_frozen_head_is_not_copied_for_each_row() -> None:
    head, states = torch.nn.Linear(8, 32, bias=False).requires_grad_(False), torch.randn(3, 5, 8)[:, -1:]
    model = SimpleNamespace(get_output_embeddings=lambda: head)

    def copies() -> bool:
        with torch.no_grad(), torch.profiler.profile() as profile:
            head(states)
        return "aten::bmm" in {event.name for event in profile.events()}

    assert copies()  # else PyTorch folds by itself, and the hook is of no more use
    compat.copy_last_states(model)
    assert not copies()


def test_the_lm_head_of_trl_has_its_tiles() -> None:
    assert compat.LOGPROB_CHUNK_SIZE == 32768 and compat.TOKEN_CHUNK_SIZE == 4096


def test_storages_count_while_they_live() -> None:
    held = torch.zeros(1024)
    with compat.LiveBytes([held], 7, compat.FakeTensorMode()) as counted:
        one = torch.ones(1024)  # 4,096 bytes
        two = one + held
        del one
        view = two[:10]
        del two
        assert counted.now == [4096, 0], "a view keeps the whole storage"
        del view
        assert (counted.now, max(counted.trace)) == ([0, 0], [8192, 0])
        small, rows = torch.ones(1), torch.ones(7, 3)
        assert counted.now == [512, 12], "the allocator's smallest block, and what 7 rows share"
        del small, rows


def test_a_model_without_numbers_runs_as_on_a_cpu_and_as_fake_tensors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(architecture: str, fake: compat.FakeTensorMode) -> list[list[int]]:
        with compat.on_meta_device():
            model = AutoModelForCausalLM.from_config(build_model(architecture).config, dtype=torch.bfloat16)
        compat.move_shapes_to_cpu(model, fake)
        counted = compat.LiveBytes([*model.parameters(), *model.buffers()], 7, fake)
        with fake, counted, torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=torch.zeros(7, 5, dtype=torch.long)).logits
            logits.sum().backward()
        assert (tuple(logits.shape), logits.device.type, logits.dtype) == ((7, 5, 512), "cpu", torch.bfloat16)
        return counted.trace

    for architecture in ("gpt2", "lfm2"):
        ours = trace(architecture, compat.FakeTensorMode(allow_non_fake_inputs=True))
        with monkeypatch.context() as patch:
            patch.setattr(compat.LiveBytes, "_run", lambda _, func, args, kwargs: func(*args, **kwargs))
            assert ours == trace(architecture, compat.FakeTensorMode(allow_non_fake_inputs=True)), architecture
