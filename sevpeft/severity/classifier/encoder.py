"""From a Hub id or folder to an encoder with a head for the severities, or one sentence why it cannot be trusted.

transformers fills weights that a checkpoint lacks with random numbers and makes up an empty tokenizer where there is
none, both in silence. Here an encoder to be fine-tuned may lack its head and pooler, and nothing else; a fitted
classifier may lack nothing, and must name its labels. Only safetensors are read and no code from the Hub is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sevpeft.data.read import look_for_hub
from sevpeft.errors import ModelError, SevpeftError, first_sentence
from sevpeft.severity.probabilities import SEVERITIES

LABELS = dict(enumerate(SEVERITIES))


def load_encoder(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder in float32, under a head of three random rows, to be fine-tuned; and its tokenizer.

    Args:
        name: Hub id or folder. A head that it has already is replaced where it is not one of three labels.

    Raises:
        ModelError: no such model, no safetensors weights, weights missing or damaged, no tokenizer, or own code.
    """
    model, loading = _load(name, num_labels=len(LABELS), id2label=LABELS, label2id=_positions())
    prefix = f"{model.base_model_prefix}."
    absent = [
        key
        for key in (*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"]))
        if key.startswith(prefix) and not key.startswith(f"{prefix}pooler.")
    ]
    if absent:
        raise ModelError(
            f"{name} lacks {len(absent)} of the weights that its config.json asks for, such as {sorted(absent)[0]}, "
            "and they would be random numbers; fetch it again, or name an encoder that is complete."
        )
    return model, _load_tokenizer(name, model)


def load_fitted(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier that was fitted here, in float32, and its tokenizer.

    Raises:
        ModelError: as `load_encoder`, and where there is no head for the severities in the order of `SEVERITIES`.
    """
    model, loading = _load(str(folder))
    if loading["missing_keys"] or loading["mismatched_keys"]:
        absent = sorted([*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])])
        raise ModelError(
            f"{folder} is an encoder without a fitted classification head ({absent[0]} is not there), whose severities "
            "would be random; fit one with `sevpeft classifier fit DATA FOLDER --kind transformer`."
        )
    named = {int(position): label for position, label in model.config.id2label.items()}
    if named != LABELS:
        raise ModelError(
            f"{folder} has the labels {', '.join(map(str, named.values()))}, not {', '.join(SEVERITIES)} in this "
            "order; fit it again with `sevpeft classifier fit`."
        )
    return model, _load_tokenizer(str(folder), model)


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int) -> int:
    """Tokens of the longest input: what was asked for, within what the encoder has positions for."""
    positions = getattr(model.config, "max_position_embeddings", asked)
    # RoBERTa and its kin begin to count positions after the pad token.
    if "roberta" in model.config.model_type or model.config.model_type == "camembert":
        positions -= (model.config.pad_token_id or 0) + 1
    return int(min(asked, positions, tokenizer.model_max_length))


def _positions() -> dict[str, int]:
    return {label: position for position, label in LABELS.items()}


def _load(name: str, **head: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        _refuse_unusable(folder)
    else:
        look_for_hub()
    with _plain_errors(name):
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            str(folder) if folder.is_dir() else name,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Judged by the callers, who can say what it means.
            ignore_mismatched_sizes=True,
            **head,
        )
    return model, loading


def _refuse_unusable(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is a folder without config.json, so it holds no transformers model; name one that does."
        )
    if any(folder.glob("*.safetensors")):
        return
    if any(path for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        raise ModelError(
            f"{folder} holds its weights as pickle files only, which can run code when they are read; convert it once, "
            "where that is no danger, with model.save_pretrained(FOLDER), which writes safetensors."
        )
    raise ModelError(f"{folder} holds no *.safetensors weights; copy them there, or name another folder.")


def _load_tokenizer(name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    folder = Path(name).expanduser()
    with _plain_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(_no_tokenizer(name))
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{name} has no pad token, so it is no encoder that can be fine-tuned here; name a BERT.")
    if len(tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"{name} has a tokenizer of {len(tokenizer)} tokens for a model that knows {model.config.vocab_size}; "
            "fetch both again, from one place."
        )
    return tokenizer


def _no_tokenizer(name: str) -> str:
    return f"{name} has no tokenizer that can be read; put its tokenizer.json and tokenizer_config.json there."


@contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    """Turns what transformers and the Hub raise while loading into one sentence."""
    try:
        yield
    except SevpeftError:
        raise
    except Exception as error:  # whatever a library raises on files that others wrote
        raise ModelError(_sentence(name, error)) from error


def _sentence(name: str, error: Exception) -> str:
    causes = list(_causes(error))
    local = Path(os.path.expanduser(name)).exists()
    reason = " ".join(str(error).split())
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{name} is gated: accept its licence at https://huggingface.co/{name} with your account, then run "
            "`hf auth login` here."
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"There is no model {name} on the Hub and no folder of that name here; correct --encoder or, if it is "
            "private, run `hf auth login`."
        )
    if "trust_remote_code" in reason or "custom code" in reason:
        return f"{name} wants to run code of its own, which is never done here; name another encoder."
    if any(isinstance(cause, SafetensorError) for cause in causes):
        return f"{name} has damaged weights ({first_sentence(error)}); fetch or copy them again."
    if "backend tokenizer" in reason:
        return _no_tokenizer(name)
    if "does not appear to have a file named" in reason and "safetensors" in reason:
        return (
            f"{name} has no safetensors weights on the Hub, and pickled ones can run code when they are read; name an "
            "encoder that has them, or convert it once with model.save_pretrained(FOLDER)."
        )
    if not local and isinstance(error, OSError):
        return (
            f"{name} is no folder here and could not be fetched from the Hub; check the name and the connection, or "
            "name a folder that holds the encoder."
        )
    return f"{name} could not be loaded ({first_sentence(error)}); fetch it again, or name another encoder."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
