"""Small models of the real architectures with random weights, and a tokenizer trained here: no test needs the Hub."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "السلام عليكم عندي صداع شديد من امبارح ومش قادر انام",
    "ابني عمره سنتين وحرارته مرتفعة منذ يومين ولا يأكل",
    "بحس بألم في صدري لما اطلع السلم وضيق في التنفس",
    "راجع طبيب القلب اليوم ولا تبذل مجهودا حتى الفحص",
    "أعطه سوائل كثيرة واعرضه على طبيب الأطفال إن استمرت الحرارة",
    "اذهب إلى الطوارئ الآن ولا تنتظر",
    "السؤال: شو الحل لحكة الجلد؟ الجواب: مرطب خفيف وراجع طبيب الجلدية",
    "وش افضل وقت للتطعيم؟ حسب جدول التطعيمات في بلدك",
]

VOCABULARY = 512

_SHAPE = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
_TWO_KINDS = ["sliding_attention", "full_attention"]
# Real configuration classes at the smallest sizes at which every layer kind of the architecture is there.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_embd=48, n_layer=2, n_head=4, n_positions=256),
    "bloom": dict(hidden_size=48, n_layer=2, n_head=4),
    "lfm2": dict(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    **{name: _SHAPE for name in ("qwen2", "qwen3", "llama", "mistral", "jais2")},
    # The scale and the caps of the logits are ones at which leaving them out shows.
    "cohere2": dict(_SHAPE, layer_types=_TWO_KINDS, sliding_window=64, logit_scale=4.0),
    "gemma2": dict(_SHAPE, layer_types=_TWO_KINDS, sliding_window=64, head_dim=16, final_logit_softcapping=0.3),
    "gemma3_text": dict(_SHAPE, layer_types=_TWO_KINDS, sliding_window=64, head_dim=16),
    "gemma3": dict(
        text_config=dict(_SHAPE, layer_types=_TWO_KINDS, sliding_window=64, head_dim=16),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            vision_use_head=False,
        ),
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
    ),
    "falcon_h1": dict(
        _SHAPE,
        mamba_d_ssm=48,
        mamba_n_heads=4,
        mamba_d_head=12,
        mamba_d_state=16,
        mamba_chunk_size=32,
        mamba_rms_norm=True,
        lm_head_multiplier=4.0,
    ),
}


# As the tokenizers of these models bring them, reduced to what a system-less single exchange uses.
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and thinking_blank %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking_blank and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CHAT_TEMPLATES = {
    "chatml": _CHATML,
    "qwen3": "{% set thinking_blank = true %}" + _CHATML,
    "llama-3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
        "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
        "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
}


@functools.cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return str(tokenizer.to_str())


def build_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def save_model(folder: Path, architecture: str, chat_template: str | None = None) -> Path:
    """Writes a model and its tokenizer, as a user would have them; returns the folder."""
    build_model(architecture).save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _drawn_model(architecture: str, seed: int, vocab_size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    settings: dict[str, Any] = dict(ARCHITECTURES[architecture])
    tokens = dict(vocab_size=vocab_size, eos_token_id=0, pad_token_id=1, bos_token_id=None)
    if "text_config" in settings:
        settings["text_config"] = settings["text_config"] | tokens
    else:
        settings |= tokens
    config = transformers.AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(seed)
    with torch.device("cpu"):  # also where the first who asks for it makes models without numbers
        return AutoModelForCausalLM.from_config(config).eval(), torch.get_rng_state()


def build_model(architecture: str, seed: int = 0, vocab_size: int = VOCABULARY) -> torch.nn.Module:
    """A copy, with the generator of random numbers where drawing the weights has left it."""
    model, state = _drawn_model(architecture, seed, vocab_size)
    torch.set_rng_state(state)
    return copy.deepcopy(model)
