"""From answers and references to BERTScore, as the `bert-score` package computes it, for any encoder and any text.

BERTScore (Zhang et al. 2020) matches each token of one text with its nearest in the other by the hidden states of one
layer of an encoder. The published results use bert-base-multilingual-cased, layer 9, without rescaling and without idf
weights: the defaults here. The package loads models by what their name looks like (a path with "t5" in it is a T5),
by pickle where there is nothing else, and in its own list of layers only; so encoder and tokenizer are loaded here,
with exactly the layers asked for, and handed to its scoring. The numbers are its own.

Limits: an unrelated fluent Arabic answer scores .6 and more (there is no Arabic baseline to rescale by), and negation
hardly lowers it. Read it beside its floors only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bert_score.utils import bert_cos_score_idf
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from sevpeft.data.read import look_for_hub
from sevpeft.errors import ModelError, SevpeftError, first_sentence

DEFAULT_ENCODER = "bert-base-multilingual-cased"
DEFAULT_LAYER = 9
BATCH_SIZE = 64

_T5 = {"t5", "mt5", "umt5"}


@dataclass(frozen=True)
class Scores:
    """BERTScore of each row, three arrays (n,) of float64 between −1 and 1, in practice .5 to 1."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


class Encoder:
    """An encoder cut after one of its layers, loaded once for all arms and floors."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, num_layers: int):
        self.name = name
        self.num_layers = num_layers
        self._model = model
        self._tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        name: str = DEFAULT_ENCODER,
        num_layers: int = DEFAULT_LAYER,
        *,
        revision: str | None = None,
        device: str | None = None,
    ) -> Encoder:
        """Encoder of a Hub id or folder, in float32, with its first `num_layers` layers.

        Args:
            num_layers: the layer whose hidden states are compared, counted from 1.
            device: torch device; unset, CUDA where there is one.

        Raises:
            ModelError: no such model, no safetensors weights, weights missing or damaged, no such layer, no tokenizer,
                no pad token, or code of its own.
        """
        folder = Path(name).expanduser()
        place = str(folder) if folder.is_dir() else name
        if not folder.is_dir():
            look_for_hub()
        origin: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
        with _plain_errors(name, revision):
            config = AutoConfig.from_pretrained(place, **origin)
            _cut(config, num_layers, name)
            kind = T5EncoderModel if config.model_type in _T5 else AutoModel
            # Layers above the cut are in the checkpoint and not asked for; what is asked for and absent is refused.
            model, loading = kind.from_pretrained(
                place, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **origin
            )
            tokenizer = AutoTokenizer.from_pretrained(place, **origin)
        _check(name, loading, tokenizer)
        # A tokenizer without a length of its own says 10^30, which its truncation cannot count to.
        tokenizer.model_max_length = _longest(config, tokenizer)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if hasattr(model, "decoder") and hasattr(model, "encoder"):
            model = model.encoder
        return cls(model.eval().to(device), tokenizer, name=name, num_layers=num_layers)

    def score(self, predictions: Sequence[str], references: Sequence[str], *, batch_size: int = BATCH_SIZE) -> Scores:
        """BERTScore of predictions against references, row by row.

        A row whose prediction or reference is empty scores 0: the package sets an empty candidate to 0 as well, where
        it does not stop at it.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions, but {len(references)} references")
        scores = np.zeros((3, len(predictions)))
        filled = [i for i, pair in enumerate(zip(predictions, references, strict=True)) if all(map(self._says, pair))]
        if filled:
            # As the package weighs without idf: every token 1, the separators 0.
            weights: defaultdict[int | None, float] = defaultdict(lambda: 1.0)
            weights[self._tokenizer.sep_token_id] = 0
            weights[self._tokenizer.cls_token_id] = 0
            scored = bert_cos_score_idf(
                self._model,
                [references[i] for i in filled],
                [predictions[i] for i in filled],
                self._tokenizer,
                weights,
                batch_size=batch_size,
                device=self._model.device,
            )
            scores[:, filled] = scored.double().cpu().numpy().T
        return Scores(*scores)

    def _says(self, text: str) -> bool:
        """Whether the tokenizer finds anything in a text; invisible marks alone are nothing to many."""
        return bool(text.strip()) and bool(self._tokenizer(text.strip(), add_special_tokens=False)["input_ids"])


def _cut(config: PretrainedConfig, num_layers: int, name: str) -> None:
    """Sets how many layers are loaded: the package's way to choose a layer, without the rest in memory."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ModelError(f"{name} does not say how many layers it has, so it is no encoder for BERTScore; name a BERT.")
    if not 1 <= num_layers <= layers:
        raise ModelError(
            f"{name} has layers 1 to {layers} and no layer {num_layers}; name one of these as the BERTScore layer."
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:num_layers]


def _check(name: str, loading: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses what transformers would fill with random numbers or make up in silence."""
    mismatched = [entry[0] for entry in loading["mismatched_keys"]]
    absent = sorted(key for key in (*loading["missing_keys"], *mismatched) if "pooler" not in key)
    if absent:
        raise ModelError(
            f"{name} lacks {len(absent)} of the weights that its config.json asks for, such as {absent[0]}, and they "
            "would be random numbers; fetch it again, or name an encoder that is complete."
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{name} has no tokenizer that can be read; put its tokenizer.json there.")
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{name} has no pad token, so it is no encoder for BERTScore; name a BERT.")


def _longest(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    positions = getattr(config, "max_position_embeddings", None) or 512
    if "roberta" in config.model_type or config.model_type in ("camembert", "xlm"):
        # RoBERTa and its kin begin to count positions after the pad token.
        positions -= (config.pad_token_id or 0) + 1
    return int(min(positions, tokenizer.model_max_length))


@contextmanager
def _plain_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns what transformers and the Hub raise while loading into one sentence."""
    try:
        yield
    except SevpeftError:
        raise
    except Exception as error:  # whatever a library raises on files that others wrote
        raise ModelError(_sentence(name, revision, error)) from error


def _sentence(name: str, revision: str | None, error: Exception) -> str:
    folder = Path(name).expanduser()
    causes = list(_causes(error))
    reason = " ".join(str(error).split())
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run `hf auth login` here."
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{name} has no revision {revision!r}; correct it or leave it out."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"There is no model {name} on the Hub and no folder of that name here; correct the BERTScore encoder."
    if "trust_remote_code" in reason or "custom code" in reason:
        return f"{name} wants to run code of its own, which is never done here; name another BERTScore encoder."
    if any(isinstance(cause, SafetensorError) for cause in causes):
        return f"{name} has damaged weights ({first_sentence(error)}); fetch or copy them again."
    if folder.is_dir() and not (folder / "config.json").is_file():
        return f"{name} is a folder without config.json, so it holds no transformers model; name one that does."
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        return (
            f"{name} holds no *.safetensors weights, and pickled ones can run code when they are read; convert it once "
            "with model.save_pretrained(FOLDER)."
        )
    if not folder.exists() and isinstance(error, OSError):
        return (
            f"The BERTScore encoder {name} is no folder here and could not be fetched from the Hub; check the name and "
            "the connection, name a folder that holds an encoder, or leave BERTScore out of the metrics."
        )
    return f"The BERTScore encoder {name} could not be loaded ({first_sentence(error)}); name another one."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
