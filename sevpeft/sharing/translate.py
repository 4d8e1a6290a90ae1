"""Translates consultations with an instruction model and keeps rows whose translation passes all checks.

The published method (arXiv 2501.09825) drops rows with letters of another script and kept about 90 %. Further checks
here: equal numbers, a comparable length, and no truncation. No check detects a wrong word.
"""

import importlib.util
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from rich.console import Console

from sevpeft.console import Screen, print_labeled, row_progress
from sevpeft.data.read import load_consultations
from sevpeft.data.split import question_key
from sevpeft.data.text import DIGITS
from sevpeft.errors import DataError, ModelError, UsageError
from sevpeft.evaluation.evaluate import RowFile, finished_rows_are_kept
from sevpeft.evaluation.generate import EvaluationRows, fitting_prompts, generate
from sevpeft.modeling.loading import ResolvedModel, load_for_inference, resolve_model, resolved_name, uses_gpu
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import recipe_from_values
from sevpeft.runs import check_absent, check_one_process, plain_disk_errors, write_atomically
from sevpeft.severity.annotate import ENDINGS, write_rows
from sevpeft.severity.settings import TranslateSettings

BY = "translated_by"  # column with the model's name
# Code → language and the scripts of its letters; Greek letters are symbols in both.
LANGUAGES = {"ar": ("Arabic", ("ARABIC", "GREEK", "MICRO")), "en": ("English", ("LATIN", "GREEK", "MICRO"))}
_INSTRUCTION = "Translate this medical text into {}. Keep all numbers. Write nothing but the translation.\n\n"
_LARGEST_RATIO = 3  # of the lengths in characters, in both directions
_ROWS_OF_VLLM, _POSITIONS_OF_VLLM = 1024, 8192  # texts between two writes, and the most tokens of a text


def translate(settings: TranslateSettings, output: Path, console: Console | None = None) -> dict[str, Any]:
    """Writes rows with a valid translation to `output`, the others with a reason to NAME.rejected.jsonl.

    Returns their counts. NAME.translations.jsonl keeps finished translations for a resume until all are done.
    """
    check_one_process("translate")
    check_absent(output)
    if not settings.model or output.suffix not in ENDINGS:
        raise UsageError(f"Name an instruction model by model=ID, and end {output.name} in {', '.join(ENDINGS)}.")
    read, console = load_consultations(settings.data, keep="all"), console or Screen(quiet=True)
    rows = read.rows
    texts = [*rows["question"], *rows["answer"]]
    keys = [f"{question_key(text, 0):016x}" for text in texts]  # equal texts are translated once
    work = RowFile(output.with_suffix(".translations.jsonl"), settings.model_dump(exclude={"data"}))
    if left := {key: text for key, text in zip(keys, texts, strict=True) if (settings.to, key) not in work.lines}:
        prompts = [_INSTRUCTION.format(LANGUAGES[settings.to][0]) + text for text in left.values()]
        zeros = np.zeros(len(left), dtype=np.int64)
        with finished_rows_are_kept():
            todo = EvaluationRows([*left], prompts, prompts, None, zeros, zeros, "", "")
            batches = translations(settings, todo, console)
            with plain_disk_errors(output, remedy="choose another OUTPUT"):
                output.parent.mkdir(parents=True, exist_ok=True)
            with row_progress(console, "Translated texts", len(left)) as done:
                for batch in batches:
                    work.append([{"arm": settings.to, **line, "token_ids": None} for line in batch])
                    done(len(batch))
    lines = [work.lines[settings.to, key] for key in keys]
    faults = [fault(text, line, settings.to) for text, line in zip(texts, lines, strict=True)]
    reasons = np.array([one or other for one, other in zip(faults[: len(rows)], faults[len(rows) :], strict=True)])
    kept, lost = np.flatnonzero(reasons == ""), np.flatnonzero(reasons != "")
    translated = [line["prediction"] for line in lines]
    columns = {"question": translated[: len(rows)], "answer": translated[len(rows) :], BY: [settings.model] * len(rows)}
    rejected, new = output.with_suffix(".rejected.jsonl"), datasets.Dataset.from_dict(columns)
    entries = ({**rows[at], "reason": reasons[at], "translation": new[at]} for at in lost.tolist())
    write_atomically(rejected, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    counts = dict((Counter(reasons[lost].tolist()) + Counter(read.rejected)).most_common())
    if not len(kept):
        why = ", ".join(f"{number} {reason}" for reason, number in counts.items())
        raise DataError(f"No row has a valid translation ({why}); see {rejected}, or name another model.")
    others = rows.select_columns([name for name in rows.column_names if name not in (*columns, "row")])
    write_rows(datasets.concatenate_datasets([others, new], axis=1).select(kept), output)
    for path in (work.path, work.about):
        path.unlink()
    return {"rows": len(kept), "rate": len(kept) / len(rows), "rejected": counts}


def fault(original: str, line: dict[str, Any], to: str) -> str:
    """Why a translation, as a line of `generate`, is rejected; "" if it passes all checks."""
    text, ratio = line["prediction"], len(line["prediction"]) / len(original)
    if line["lost_words"] or line["truncated"] or not text:
        return "too long" if line["lost_words"] else "cut off" if text else "empty"
    if any(one.isalpha() and not unicodedata.name(one, "").startswith(LANGUAGES[to][1]) for one in text):
        return "residual script"
    if numbers(original) != numbers(text):
        return "other numbers"
    return "" if 1 / _LARGEST_RATIO <= ratio <= _LARGEST_RATIO else "other length"


def numbers(text: str) -> list[float]:
    """The numbers of a text in ascending order: Arabic-Indic or ASCII digits, with or without thousands separators."""
    plain = re.sub(r"(?<=\d)[,٬](?=\d{3}(?!\d))", "", text.translate(DIGITS)).replace("٫", ".")
    return sorted(map(float, re.findall(r"\d+(?:\.\d+)?", plain)))


def translations(settings: TranslateSettings, rows: EvaluationRows, console: Console) -> Iterator[list[dict[str, Any]]]:
    """Lines of `generate`: by vLLM if it is installed and the model runs unquantized on a GPU."""
    values = {
        "model": {"name_or_path": settings.model},
        "quantization": {"load_in_4bit": settings.load_in_4bit},
        "generation": {"max_new_tokens": settings.max_new_tokens},
    }
    recipe = recipe_from_values(values)
    with console.status(f"Loading {settings.model}"):
        base = resolve_model(recipe)
        format_ = {**recipe.prompt.model_dump(), "chat": bool(base.tokenizer.chat_template)}
        prompt = Prompt.build(base.tokenizer, base.config.get_text_config().vocab_size, **format_)
        if importlib.util.find_spec("vllm") and uses_gpu(recipe) and not settings.load_in_4bit:
            return by_vllm(base, prompt, rows)
        model = load_for_inference(recipe)
    return generate(model, prompt, rows, recipe.generation, lambda text: print_labeled(console, "Batches", text))


def by_vllm(base: ResolvedModel, prompt: Prompt, rows: EvaluationRows) -> Iterator[list[dict[str, Any]]]:
    """Lines of `generate` by vLLM's offline interface (0.11)."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # no telemetry; read at the import
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    most, text_config = base.recipe.generation.max_new_tokens, base.config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", _POSITIONS_OF_VLLM)
    positions = min(_POSITIONS_OF_VLLM, context)  # vLLM refuses more positions than the model has
    prompts, lost = fitting_prompts(rows, prompt, positions, [most] * len(rows))
    if not all(prompts):
        raise ModelError(f"max_new_tokens={most} leaves no room for a text in {positions:,} positions; lower it.")
    model = LLM(resolved_name(base.recipe), load_format="safetensors", max_model_len=positions)
    greedy = SamplingParams(temperature=0, max_tokens=most, stop_token_ids=[prompt.end_id])
    for begin in range(0, len(rows), _ROWS_OF_VLLM):
        part, batch = slice(begin, begin + _ROWS_OF_VLLM), []
        results = model.generate([{"prompt_token_ids": ids} for ids in prompts[part]], greedy, use_tqdm=False)
        for row_id, words, result in zip(rows.ids[part], lost[part], results, strict=True):
            text, cut = result.outputs[0].text.strip(), result.outputs[0].finish_reason != "stop"
            batch.append({"id": row_id, "prediction": text, "truncated": cut, "lost_words": words})
        yield batch
