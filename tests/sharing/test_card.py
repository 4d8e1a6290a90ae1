"""What is printed can be run: commands only for what the server reads, and the prompt of the training."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import recipe_from_values
from sevpeft.sharing.card import adapter_command, modelfile
from tests.models import build_tokenizer


def test_vllm_is_given_a_rank_that_it_knows() -> None:
    for rank, shown in ((1, 8), (8, 8), (12, 16), (300, 320), (512, 512)):
        command, reason = adapter_command("org/base", "my runs/a/adapter", {"r": rank, "bias": "none"})
        assert reason == "" and command == (
            f"vllm serve org/base --enable-lora --lora-modules severity='my runs/a/adapter' --max-lora-rank {shown}"
            " --chat-template chat_template.jinja"
        )


def test_what_vllm_would_refuse_or_misread_gets_no_command() -> None:
    for config, named in (
        ({"use_dora": True}, "lora.use_dora"),
        ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save"),
        ({"lora_bias": True}, "lora.lora_bias"),
        ({"bias": "all"}, "lora.bias"),
        ({"trainable_token_indices": [3]}, "lora.trainable_token_indices"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}}, "lora.rank_pattern, lora.alpha_pattern"),
        ({"r": 513}, "lora.r=513"),
    ):
        command, reason = adapter_command("org/base", "run/adapter", {"r": 8, "bias": "none"} | config)
        assert command is None and named in reason


def test_the_modelfile_ends_with_the_cue_and_leaves_the_beginning_to_llama_cpp() -> None:
    recipe = recipe_from_values({"prompt": {"system": "أنت طبيب."}, "generation": {"max_new_tokens": 50}})
    tokenizer: PreTrainedTokenizerFast = build_tokenizer()
    prompt = Prompt.build(tokenizer, **recipe.prompt.model_dump())
    assert modelfile(prompt, recipe) == (
        'FROM ./model-q4_k_m.gguf\nTEMPLATE """أنت طبيب.\n\nالسؤال: {{ .Prompt }}\nالجواب:"""\n'
        'PARAMETER stop "<|endoftext|>"\nPARAMETER temperature 0\nPARAMETER num_predict 50\n'
    )
    filled = modelfile(prompt, recipe).split('"""')[1].replace("{{ .Prompt }}", "عندي صداع")
    assert filled == prompt.text("عندي صداع")
    examples = [{"question": "سر", "answer": "لا"}]
    more = recipe_from_values({"prompt": {"severity": "predicted", "examples": examples, "system": "أنت طبيب."}})
    assert modelfile(Prompt.build(tokenizer, **more.prompt.model_dump()), recipe) == modelfile(prompt, recipe)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}{% for one in messages %}{{ one['content'] }}<|im_end|>{% endfor %}"
    recipe = recipe_from_values({"prompt": {"chat": True}, "generation": {"do_sample": True, "temperature": 0.7}})
    text = modelfile(Prompt.build(tokenizer, **recipe.prompt.model_dump()), recipe)
    assert 'TEMPLATE """{{ .Prompt }}<|im_end|>"""' in text and "PARAMETER temperature 0.7" in text
