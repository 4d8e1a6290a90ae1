"""`builtin:tiny`: builds a toy decoder and tokenizer from the bundled consultations, once, in the cache folder.

Every recipe runs with it, without a network, on a laptop. It is trained only on the training split of the sample, so
validation figures of a quickstart are honest. It has seen a few hundred sentences and knows no medicine.
"""

import random
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
# Part of the folder's name: increase it with every change to the toy.
VERSION = "2"
VOCABULARY = 2048
CONTEXT = 128
STEPS = 150
BATCH = 8


def tiny_model_folder() -> Path:
    """Folder of the toy model; built at first use (about 20 seconds), then cached."""
    folder = cache_folder("models") / f"tiny-{VERSION}"
    if folder.exists():
        return folder
    with FileLock(f"{folder}.lock"):
        if not folder.exists():  # another process may have built it meanwhile
            print_text(
                f"Building {TINY} in {folder}: a toy of 0.8 million parameters, trained on 300 consultations. "
                "It demonstrates the steps from recipe to adapter; its answers are not medical advice.",
                stderr=True,
            )
            with whole_folder(folder, shared=True, **CACHE_REMEDY) as made:
                make_tiny_model(made)
    return folder


def make_tiny_model(folder: Path, steps: int = STEPS) -> None:
    """Trains tokenizer and model on the training split of the bundled sample; the bytes are reproducible."""
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
    # Shuffled texts, each with EOS, repeated until all steps have enough tokens.
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
