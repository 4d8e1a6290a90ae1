"""What is printed can be run: commands only for what the server reads, and the prompt of the training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

from sevpeft.errors import RunError
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import recipe_from_values
from sevpeft.runs import Run, file_hash
from sevpeft.sharing.card import (
    adapter_card,
    adapter_command,
    is_unedited,
    modelfile,
    note_figures,
    public_recipe,
    write_card,
)
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
        "PARAMETER top_p 1\nPARAMETER top_k 0\nPARAMETER repeat_penalty 1\nPARAMETER repeat_last_n -1\n"
    )
    filled = modelfile(prompt, recipe).split('"""')[1].replace("{{ .Prompt }}", "عندي صداع")
    assert filled == prompt.text("عندي صداع")
    examples = [{"question": "سر", "answer": "لا"}]
    more = recipe_from_values({"prompt": {"severity": "predicted", "examples": examples, "system": "أنت طبيب."}})
    assert modelfile(Prompt.build(tokenizer, **more.prompt.model_dump()), recipe) == modelfile(prompt, recipe)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}{% for one in messages %}{{ one['content'] }}<|im_end|>{% endfor %}"
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2}
    recipe = recipe_from_values({"prompt": {"chat": True}, "generation": sampled})
    text = modelfile(Prompt.build(tokenizer, **recipe.prompt.model_dump()), recipe)
    assert 'TEMPLATE """{{ .Prompt }}<|im_end|>"""' in text and "PARAMETER temperature 0.7" in text
    assert "PARAMETER top_p 0.9\nPARAMETER top_k 50\nPARAMETER repeat_penalty 1.2\n" in text


def test_a_card_shows_what_was_measured_of_this_adapter_and_nothing_else(made_run: Callable[..., Run]) -> None:
    run = made_run()
    card = ModelCard(adapter_card(run, base="org/base", license_="llama3.1"))
    assert "## Test" not in card.text and "Do the weights help?" not in card.text and "Built with Llama" in card.text
    assert 'dtype="float32"' in card.text and '`"temperature": 0`' in card.text, "as it was trained and evaluated"
    assert [(one.metric_type, one.metric_value) for one in card.data.eval_results] == [("loss", 4.0)]
    assert card.data.license == "llama3.1" and card.data.base_model_relation == "adapter" and not card.data.datasets
    about = {"label": "NLL", "unit": "nats a token", "shown_times": 1}
    estimates = {
        name: {"value": value, "low": 1.0, "high": 3.0} for name, value in (("adapter", 2.0), ("shuffled", 2.5))
    }
    content = {
        "adapter": "sha256:of another",
        **{
            "metrics": {"nll": about},
            "columns": dict.fromkeys(estimates, "so"),
            "evaluation": {"confidence_level": 0.9},
        },
        "data": {"evaluated": 9},
        "notes": ["Few rows.", "Left out: /home/me/bert"],
        "scores": {"critical": {"rows": 9, "metrics": {"nll": estimates}}},
    }
    run.write_json("evaluation.json", content)
    assert "## Test" not in adapter_card(run)
    run.write_json("evaluation.json", content | {"adapter": file_hash(run.adapter / "adapter_model.safetensors")})
    comparison = {"runs": {"balanced": [run.folder.name]}, "claim": {}, "verdict": "Shown: so.", "power": "Enough."}
    Run(run.folder.parent).write_json("comparison.json", comparison)
    text = adapter_card(run)
    assert "2.000 [1.000, 3.000] | 2.500 [1.000, 3.000] |" in text and "90 % intervals" in text
    assert "Few rows." in text and "/home/me" not in text and "Shown: so." not in text, "no claim was tested"
    Run(run.folder.parent).write_json("comparison.json", comparison | {"claim": {"arm": "balanced"}})
    assert "arm `balanced` of a comparison. Shown: so." in adapter_card(run)
    results = ModelCard(adapter_card(run)).data.eval_results
    assert [(one.dataset_split, one.dataset_config, one.metric_value) for one in results][-1] == (
        "test",
        "critical",
        2.0,
    )


def test_a_card_is_written_anew_until_somebody_edits_it(made_run: Callable[..., Run]) -> None:
    run = made_run()
    card = write_card(run)
    note_figures(run, after={"loss": 3.5})
    assert "| all | 5.0000 | 3.5000 |" in card.read_text(encoding="utf-8") and is_unedited(card)
    card.write_text(f"{card.read_text(encoding='utf-8')}\nAsk me.\n", encoding="utf-8")
    note_figures(run, after={"loss": 3.0})
    assert "3.5000" in card.read_text(encoding="utf-8") and not is_unedited(card)


def test_figures_are_not_shown_for_other_weights_than_those_of_the_training(made_run: Callable[..., Run]) -> None:
    run = made_run()
    run.update_metrics(adapter=file_hash(run.adapter / "adapter_model.safetensors"))
    assert "5.0000" in adapter_card(run)
    run.update_metrics(adapter=file_hash(run.adapter / "adapter_config.json"))
    with pytest.raises(RunError, match="restore them"):
        adapter_card(run)


def test_a_published_recipe_names_no_folder_host_or_row() -> None:
    examples = [{"question": "سر", "answer": "لا"}]
    values = {
        "model": {"name_or_path": "/home/me/models/base"},
        "data": {"path": "~/patients/rows.csv", "mix": {"sources": {"en": "/srv/en.csv"}, "ratios": "60-40"}},
        "severity": {"source": "linear", "classifier": "/home/me/clf"},
        "evaluation": {"bertscore_model": "/models/bert", "judge": {"model": "m", "url": "http://host/v1"}},
        "prompt": {"examples": examples},
    }
    text = public_recipe(recipe_from_values(values))
    assert not [word for word in ("home", "patients", "srv", "models/", "host", "سر") if word in text]
    assert recipe_from_values(yaml.safe_load(text)).severity.classifier == "clf"
