"""Rows a second of `generate` against the published loop, which asks one question at a time.

Both answer the same questions greedily with the same cap, and must say the same tokens; the two are timed in turn, so
that a busy machine slows both. The published loop (arXiv 2604.06346) is `model.generate` on one row, sampled at T .7;
sampling is off here to make the answers comparable.

    python -m tests.benchmarks.generation            # builtin:tiny and a GPT-2 of 100 million parameters (long)
    python -m tests.benchmarks.generation --rows 16 --pairs 1 --threads 2
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

# As the command line does, before torch loads OpenMP: spinning threads distort both sides on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from sevpeft.cli.application import quiet_libraries
from sevpeft.evaluation.generation import GenerationSettings, generate
from sevpeft.evaluation.rows import EvaluationRows
from sevpeft.modeling.loading import load_config, load_tokenizer
from sevpeft.modeling.prompts import Prompt
from sevpeft.modeling.tiny import tiny_model_folder
from sevpeft.recipe import recipe_from_values
from sevpeft.training.preparation import load_splits, prompt_of


@dataclass
class Measured:
    published: list[float]
    ours: list[float]
    cpu_ratios: list[float]
    same: int
    rows: int

    def line(self, name: str) -> str:
        one, many = (statistics.median(self.rows / seconds for seconds in side) for side in (self.published, self.ours))
        cpu = statistics.median(self.cpu_ratios)
        ratios = [slow / fast for slow, fast in zip(self.published, self.ours, strict=True)]
        return (
            f"{name:24} {one:9.2f} {many:9.2f} {statistics.median(ratios):8.1f}×  "
            f"({min(ratios):.1f}–{max(ratios):.1f})  {cpu:8.1f}×  {self.same}/{self.rows}"
        )


def with_adapter(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear", init_lora_weights=False)
    ).eval()


def tiny() -> PreTrainedModel:
    return with_adapter(AutoModelForCausalLM.from_pretrained(tiny_model_folder()))


def gpt2_100m(vocabulary: int) -> PreTrainedModel:
    """GPT-2 small with random weights and the tokenizer's vocabulary padded to 20,000: 101 million parameters."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=max(20_000, vocabulary), eos_token_id=0, bos_token_id=0)
    return with_adapter(AutoModelForCausalLM.from_config(config))


def published_loop(model: PreTrainedModel, prompt: Prompt, rows: EvaluationRows, cap: int) -> dict[str, list[int]]:
    said = {}
    for identity, question in zip(rows.ids, rows.questions, strict=True):
        ids = torch.tensor(prompt.prompt_ids([question]))
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=cap,
                do_sample=False,
                use_cache=True,
                eos_token_id=prompt.end_id,
                pad_token_id=prompt.tokenizer.pad_token_id,
            )
        said[identity] = output[0, ids.shape[1] :].tolist()
    return said


def measure(model: PreTrainedModel, prompt: Prompt, rows: EvaluationRows, cap: int, batch: int, pairs: int) -> Measured:
    settings = GenerationSettings(max_new_tokens=cap, per_device_eval_batch_size=batch)
    list(generate(model, prompt, rows.take([0, 1]), settings))  # warm
    published_loop(model, prompt, rows.take([0]), cap)
    found = Measured([], [], [], 0, len(rows))
    for _ in range(pairs):
        started, cpu = time.perf_counter(), time.process_time()
        alone = published_loop(model, prompt, rows, cap)
        found.published.append(time.perf_counter() - started)
        cpu_alone = time.process_time() - cpu
        started, cpu = time.perf_counter(), time.process_time()
        together = {one.id: list(one.token_ids) for many in generate(model, prompt, rows, settings) for one in many}
        found.ours.append(time.perf_counter() - started)
        found.cpu_ratios.append(cpu_alone / (time.process_time() - cpu))
        found.same = sum(alone[identity] == together[identity] for identity in rows.ids)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=256)
    arguments.add_argument("--pairs", type=int, default=3)
    arguments.add_argument("--cap", type=int, default=50, help="new tokens; 50 is the published figure")
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--models", default="tiny,gpt2", help="builtin:tiny, GPT-2 of 101 million parameters")
    arguments.add_argument("--threads", type=int, default=2)
    asked = arguments.parse_args()
    quiet_libraries()
    torch.set_num_threads(asked.threads)
    recipe = recipe_from_values({})
    tokenizer = load_tokenizer(recipe, load_config(recipe))
    prompt = prompt_of(recipe, tokenizer)
    table, _, _ = load_splits(recipe)
    read = table.rows[: asked.rows]
    count = len(read["id"])
    zeros = np.zeros(count, dtype=np.int64)
    rows = EvaluationRows(read["id"], read["question"], read["answer"], None, zeros, np.arange(count), "sample", "")
    print(f"{asked.rows} rows, at most {asked.cap} tokens, batches of {asked.batch}, {asked.threads} threads")
    print(f"{'model':24} {'one/s':>9} {'batched/s':>9} {'ratio':>9}  (min–max)  CPU time  same tokens")
    models = {"tiny": lambda: tiny(), "gpt2": lambda: gpt2_100m(len(tokenizer))}
    for name in asked.models.split(","):
        model = models[name]()
        print(measure(model, prompt, rows, asked.cap, asked.batch, asked.pairs).line(name), flush=True)


if __name__ == "__main__":
    main()
