"""BERTScore of answers against references: the `bert-score` package with an encoder that this module loads.

BERTScore (Zhang et al. 2020) matches each token of one text with the nearest token of the other, by the hidden states
of one encoder layer. A recipe's defaults are those of the published results: bert-base-multilingual-cased, layer 9,
without rescaling and idf weights. The package's own loader guesses the architecture from the name and reads pickles.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModel, AutoTokenizer

from sevpeft.data.read import look_for_hub
from sevpeft.errors import ModelError, loading_errors
from sevpeft.recipe import EvaluationSection

BATCH_SIZE = 64
_SETTING = "evaluation.bertscore_model"


def load_encoder(settings: EvaluationSection) -> tuple[Encoder | None, str | None]:
    """The encoder and None, or None and the reason: the machine may be offline and not have it."""
    if not settings.bertscore:
        return None, "BERTScore is left out: evaluation.bertscore=false."
    try:
        return Encoder(settings.bertscore_model, settings.bertscore_layer), None
    except ModelError as error:
        return None, f"BERTScore is left out: {error}"


class Encoder:
    """An encoder (Hub id or folder) in float32, loaded once for all arms and floors.

    `num_layers`: the layer whose hidden states are compared, from 1; the layers above it are not loaded. Raises
    ModelError: a missing model or layer, no valid safetensors weights, a tokenizer that cannot pad, code from the Hub.
    """

    def __init__(self, name: str, num_layers: int) -> None:
        place = os.path.expanduser(name)
        if not os.path.isdir(place):
            look_for_hub()
        with loading_errors(name, setting=_SETTING):
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            # The package selects a layer in the same way: the layers above it are not built.
            config.num_hidden_layers = num_layers
            if getattr(config, "layer_types", None):
                config.layer_types = list(config.layer_types)[:num_layers]
            safe = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
            model, loading = AutoModel.from_pretrained(place, config=config, output_loading_info=True, **safe)
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        # transformers initializes missing weights at random, and builds an empty tokenizer if its files are missing.
        if absent := sorted(key for key in loading["missing_keys"] if "pooler" not in key):
            raise ModelError(f"{name} lacks {absent[0]}; download it again, or lower evaluation.bertscore_layer.")
        if len(tokenizer) <= len(tokenizer.all_special_tokens) or tokenizer.pad_token_id is None:
            raise ModelError(f"{name} has no tokenizer with words and a pad token; name a BERT in {_SETTING}.")
        # A tokenizer without a maximum length has model_max_length=10^30, too large for its own truncation.
        positions = getattr(config, "max_position_embeddings", None) or 512
        if "roberta" in config.model_type or config.model_type in ("camembert", "xlm"):
            positions -= (config.pad_token_id or 0) + 1  # these models number positions from pad_token_id + 1
        tokenizer.model_max_length = int(min(positions, tokenizer.model_max_length))
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = tokenizer

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
        """Precision, recall and F1 of each row, (3, n), in practice .5 to 1; 0 for a row with a text without tokens."""
        from bert_score.utils import bert_cos_score_idf  # imported here because it loads matplotlib

        scores, pairs = np.zeros((3, len(predictions))), list(zip(predictions, references, strict=True))
        tokens = partial(self._tokenizer, add_special_tokens=False)
        filled = [i for i, pair in enumerate(pairs) if all(tokens(text.strip())["input_ids"] for text in pair)]
        if filled:
            # The package's weights without idf: 1 for every token, 0 for the separators.
            weights: defaultdict[int | None, float] = defaultdict(lambda: 1.0)
            weights[self._tokenizer.sep_token_id] = weights[self._tokenizer.cls_token_id] = 0
            result = bert_cos_score_idf(
                self._model,
                [references[i] for i in filled],
                [predictions[i] for i in filled],
                self._tokenizer,
                weights,
                batch_size=BATCH_SIZE,
                device=self._model.device,
            )
            scores[:, filled] = result.double().cpu().numpy().T
        return scores
