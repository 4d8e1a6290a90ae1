"""Memory that `sevpeft plan` foresees against what training steps on this machine take.

Every case runs in a process of its own: two accumulated batches and a step of the optimiser, twice, on a CPU in
float32. Planned is `MemoryPlan`, real is the peak of the resident memory above what the process held before the model
was built, sampled every 2 ms. glibc keeps what was freed; with a fixed mmap threshold it gives it back, so that what is
compared is what lives and not what was left lying about.

    python -m tests.benchmarks.memory                # every case
    python -m tests.benchmarks.memory llama-plain    # one
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

_SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=2000)
_LARGE = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, vocab_size=16_000)
_MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", intermediate_size=1408, num_key_value_heads=4),
    "llama-small": dict(
        **dict(model_type="llama", intermediate_size=704, num_key_value_heads=4),
        **dict(hidden_size=256, num_hidden_layers=3, vocab_size=8000),
    ),
    "gpt2": dict(model_type="gpt2", n_positions=1024, bos_token_id=0, eos_token_id=0),
    "gemma2": dict(model_type="gemma2", intermediate_size=1408, num_key_value_heads=4, head_dim=64),
    "bloom": dict(model_type="bloom"),
    "lfm2": dict(
        model_type="lfm2",
        intermediate_size=1408,
        num_key_value_heads=4,
        layer_types=["conv", "full_attention"] * 4,
        block_auto_adjust_ff_dim=False,
    ),
}
# Name → model, rows, length, settings.
CASES: dict[str, tuple[str, int, int, list[str]]] = {
    "llama-plain": ("llama", 8, 256, ["training.gradient_checkpointing=false"]),
    "llama-checkpointing": ("llama", 8, 256, []),
    "llama-r64-long": ("llama", 2, 512, ["lora.r=64", "training.gradient_checkpointing=false"]),
    "llama-4bit": ("llama", 8, 256, ["quantization.load_in_4bit=true", "training.gradient_checkpointing=false"]),
    "llama-4bit-checkpointing": ("llama", 8, 256, ["quantization.load_in_4bit=true"]),
    "llama-dora": ("llama", 8, 256, ["lora.use_dora=true", "training.gradient_checkpointing=false"]),
    "llama-4bit-dora": (
        *("llama", 8, 256),
        ["quantization.load_in_4bit=true", "lora.use_dora=true", "training.gradient_checkpointing=false"],
    ),
    "llama-4bit-dora-checkpointing": ("llama", 8, 256, ["quantization.load_in_4bit=true", "lora.use_dora=true"]),
    "llama-small": ("llama-small", 4, 96, ["training.gradient_checkpointing=false"]),
    "gpt2-plain": ("gpt2", 8, 256, ["training.gradient_checkpointing=false"]),
    "gpt2-checkpointing": ("gpt2", 8, 256, []),
    "gemma2-plain": ("gemma2", 4, 256, ["training.gradient_checkpointing=false"]),
    "bloom-plain": ("bloom", 4, 256, ["training.gradient_checkpointing=false"]),
    "lfm2-plain": ("lfm2", 8, 256, ["training.gradient_checkpointing=false"]),
}
# Numbers of glibc's mallopt.
_MALLOPT = {"M_TRIM_THRESHOLD": (-1, 65536), "M_MMAP_THRESHOLD": (-3, 65536), "M_ARENA_MAX": (-8, 1)}


def measured(case: str) -> dict[str, float]:
    """Planned and real bytes of a case, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", case, "--here"]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError(said.stderr)
    result: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return result


def measure_here(case: str) -> dict[str, float]:
    import psutil
    import torch
    from transformers import AutoConfig

    from sevpeft.modeling.memory import MemoryPlan
    from sevpeft.recipe import recipe_from_values
    from sevpeft.training.compat import CPU_VOCABULARY_TILE

    torch.set_num_threads(1)
    for parameter, value in _MALLOPT.values():
        ctypes.CDLL(None).mallopt(parameter, value)
    name, rows, length, settings = CASES[case]
    values: dict[str, Any] = {
        "lora": {"target_modules": "all-linear", "lora_dropout": 0.05},
        "quantization": {},
        "training": {"per_device_train_batch_size": rows, "max_length": length, "eval_strategy": "no"},
    }
    for setting in settings:
        key, value = setting.split("=")
        section, field = key.split(".")
        values[section][field] = json.loads(value)
    recipe = recipe_from_values(values)
    config = AutoConfig.for_model(**{**_LARGE, **_MODELS[name]})
    plan = MemoryPlan(recipe, config, on_gpu=False, vocabulary_tile=CPU_VOCABULARY_TILE)
    planned = sum(plan.budget().values())
    small = {**_MODELS[name], **_SMALL, "intermediate_size": 128}
    if "layer_types" in small:
        small["layer_types"] = small["layer_types"][:2]
    if "head_dim" in small:
        small["head_dim"] = 16
    _train(recipe, AutoConfig.for_model(**small), 2, 16)  # what libraries load at their first step is no model's
    gc.collect()
    process = psutil.Process()
    before = peak = process.memory_info().rss
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)

    def ready() -> None:
        watcher.start()

    _train(recipe, config, rows, length, ready)
    over.set()
    watcher.join()
    return {"planned": planned, "real": peak - before}


def _train(recipe: Any, config: Any, rows: int, length: int, ready: Any = lambda: None) -> None:
    """Builds the model and takes two steps. `ready` is called when it is there: loading may take more for a moment."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    from sevpeft.modeling.compat import disable_cpu_avx512_repack
    from sevpeft.training.compat import CPU_VOCABULARY_TILE

    model = AutoModelForCausalLM.from_config(config)
    if recipe.quantization.load_in_4bit:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            four_bit = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit)
        disable_cpu_avx512_repack(model)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()  # out of the mapped file, which would count as a whole
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **recipe.lora.settings()))
    if recipe.training.settings().get("gradient_checkpointing") is not False:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    base = model.get_base_model()
    head = base.get_output_embeddings()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    gc.collect()
    ready()
    for _ in range(2):
        for _ in range(2):
            ids = torch.randint(0, config.get_text_config().vocab_size, (rows, length))
            hidden = base.base_model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).last_hidden_state
            scored = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            log_probs = ChunkedLogProbFunction.apply(
                scored,
                head.weight,
                head.bias,
                ids[:, 1:].reshape(-1),
                1.0,
                CPU_VOCABULARY_TILE,
                None,
                1.0,
                ("entropy", "is_top1"),
            )[0]
            (-log_probs.mean()).backward()
            del hidden, scored, log_probs
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="all by default")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure_here(asked.cases[0])))
        return
    print(f"{'case':28}{'planned':>10}{'real':>10}{'planned/real':>15}   MiB")
    for case in asked.cases or CASES:
        found = measured(case)
        planned, real = found["planned"], found["real"]
        print(f"{case:28}{planned / 2**20:10.0f}{real / 2**20:10.0f}{planned / real:15.3f}", flush=True)


if __name__ == "__main__":
    main()
