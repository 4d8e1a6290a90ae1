"""`builtin:tiny`: a toy decoder and its tokenizer, made once from the bundled consultations, into the cache folder.

Every recipe runs with it, without a network, on a laptop. It has read only the training part of the sample, so a
quickstart's validation figures are honest, but it knows a few hundred sentences and nothing of medicine.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sevpeft.console import print_text
from sevpeft.data.read import load_consultations
from sevpeft.runs import CACHE_REMEDY, cache_folder, whole_folder

TINY = "builtin:tiny"
# Part of the folder's name: a changed recipe for the toy is another toy.
VERSION = "2"
VOCABULARY = 2048
CONTEXT = 128
STEPS = 150
BATCH = 8


def tiny_model_folder() -> Path:
    """Folder of the toy model; made on first use (about 20 seconds), then read from the cache."""
    folder = cache_folder("models") / f"tiny-{VERSION}"
    with FileLock(f"{folder}.lock") if not folder.exists() else nullcontext():
        if not folder.exists():
            print_text(
                f"Making {TINY} in {folder}: a toy of 0.8 million parameters that has read 300 consultations. "
                "It shows the way from recipe to adapter; never take its answers for advice.",
                stderr=True,
            )
            with whole_folder(folder, shared=True, **CACHE_REMEDY) as made:
                make_tiny_model(made)
    return folder


def make_tiny_model(folder: Path, steps: int = STEPS) -> None:
    """Trains the tokenizer and the toy from the training part of the bundled sample; twice gives the same bytes."""
    rows = load_consultations("builtin:consultations").rows
    rows = rows.filter(lambda split: split == "train", input_columns="split", load_from_cache_file=False)
    texts = [*rows["question"][:], *rows["answer"][:]]
    tokenizer = _tokenizer(texts)
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(1)
            torch.manual_seed(0)
            model = _pretrain(tokenizer, texts, steps)
        finally:
            torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=512
    )


def _pretrain(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "max_position_embeddings": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads, **ends)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    # Shuffled texts, each closed by EOS, repeated until every step has its tokens.
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    shuffle, tokens = random.Random(0), list[int]()
    while len(tokens) < steps * BATCH * CONTEXT:
        shuffle.shuffle(encoded)
        tokens += chain.from_iterable(encoded)
    stream = torch.tensor(tokens)
    for step in range(steps):
        batch = stream[step * BATCH * CONTEXT : (step + 1) * BATCH * CONTEXT].view(BATCH, CONTEXT)
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()
