"""Trains the arms of the experiment on a critical phase, those of one seed and fold in a process.

The trainer is the project's. What a recipe cannot say is here: which rows each step has, a start from the CE adapter, a
KL term on some rows, and the way between two adapters: ΔW = (1 − λ) ΔW_CE + λ ΔW_phase, exactly, by concatenated ranks.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from torch.func import functional_call
from torch.nn.functional import kl_div
from transformers import PrinterCallback, TrainerCallback
from transformers import logging as transformers_logging

from sevpeft.data.split import question_key
from sevpeft.data.text import fold_for_matching
from sevpeft.modeling.adapters import cast_trained, lora_config
from sevpeft.modeling.loading import choose_precision, load_config, load_model, resolve_model
from sevpeft.recipe import recipe_from_values
from sevpeft.severity.classifier.examples import Examples
from sevpeft.severity.classifier.linear import features, fit_linear
from sevpeft.severity.probabilities import SEVERITIES
from sevpeft.severity.weights import severity_weights
from sevpeft.training.compat import IGNORED
from sevpeft.training.data import add_token_weights, encode_rows
from sevpeft.training.resolve import sft_config, with_training
from sevpeft.training.trainer import SeveritySFTTrainer
from tests.experiments.critical_phase import BRANCHES, Arm
from tests.experiments.upper_layers import keep_upper_layers

Weights = dict[str, torch.Tensor]


def cycled(generator: np.random.Generator, pool: np.ndarray, steps: int, size: int) -> np.ndarray:
    """(steps, size) of a pool, one permutation of it after the other."""
    passes = [generator.permutation(pool) for _ in range(steps * size // len(pool) + 1)]
    return np.concatenate(passes)[: steps * size].reshape(steps, size)


def between(first: Weights, last: Weights, share: float) -> Weights:
    """An adapter of twice the rank, whose ΔW is (1 − share) ΔW of the first + share · ΔW of the last."""
    pairs = {name.replace(".default.", ".between."): (weight, last[name]) for name, weight in first.items()}
    parts = {
        name: pair if "lora_A" in name else ((1 - share) * pair[0], share * pair[1]) for name, pair in pairs.items()
    }
    return {name: torch.cat(part, 0 if "lora_A" in name else 1) for name, part in parts.items()}


class Batches(TrainerCallback):
    """Gives the trainer, in the place of a curriculum, the rows of each step, their weights and a KL term.

    Args:
        tokens: of the training rows. order: (steps, rows of a batch). weights: (n,) of the rows.
        replayed: (n,) bool, rows with the term `strength` · KL(before ‖ now) at each answer token. before: an adapter.
    """

    def __init__(self, tokens: list[Any], order: np.ndarray, weights: Any, replayed: Any, strength: float, before: Any):
        self.trainer: Any = None
        self.tokens, self.order, self.weights = tokens, order, weights
        self.replayed, self.strength, self.before = replayed, strength, before

    def batches(self, step: int) -> Iterator[dict[str, Any]]:
        longest_first = sorted(self.order[step], key=lambda row: -len(self.tokens[row]["labels"]))
        parts = self.trainer.args.gradient_accumulation_steps
        assert self.replayed is None or parts == 1, "drift knows the rows of the last part only"
        for rows in np.split(np.array(longest_first), parts):
            self.rows, batch = rows, []
            for row in rows.tolist():
                weights = (np.asarray(self.tokens[row]["labels"]) != IGNORED) * self.weights[row]
                batch.append({**self.tokens[row], "token_weights": weights.tolist()})
            yield self.trainer.data_collator(batch)

    def drift(self, inputs: dict[str, Any]) -> Any:
        if self.replayed is None:
            return 0.0
        model, mask = self.trainer.model, inputs["labels"][:, 1:] != IGNORED
        vocabulary = self.trainer._labeled_positions.vocabulary
        model.eval()  # without dropout
        with torch.no_grad():
            before = vocabulary(lambda **inputs: functional_call(model, self.before, (), inputs), inputs)
        divergence = kl_div(vocabulary(model.train(), inputs), before, reduction="none", log_target=True).sum(-1)
        of_rows = torch.tensor(self.replayed[self.rows], device=mask.device)[:, None]
        return self.strength * of_rows * divergence.new_zeros(mask.shape).masked_scatter(mask, divergence)


class Part:
    """Training of one seed and fold; rows, severities, base model and CE adapter are made once."""

    def __init__(self, settings: dict[str, Any], options: argparse.Namespace) -> None:
        datasets.disable_progress_bars()
        transformers_logging.set_verbosity_error()
        self.settings, self.part, self.seed, self.fold = settings, options.part, options.seed, options.fold
        self.name = f"{self.part} {self.seed}/{self.fold}"
        self.about, self.result = settings[options.part], Path(options.output) / f"{options.part}.jsonl"
        self.result.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(prefix="critical-phase-")
        scratch, values = Path(self._scratch.name), copy.deepcopy(settings["recipe"])
        on_gpu = torch.cuda.is_available()
        dtype = options.dtype or ("auto" if on_gpu else "float32")
        values["model"] = {"name_or_path": options.model, "dtype": dtype}
        layers = load_config(recipe_from_values(values)).get_text_config().num_hidden_layers
        kept = min(layers, settings["top_layers"])
        values["lora"]["layers_to_transform"] = list(range(kept))  # the others are cut off
        self.recipe = recipe_from_values(values)
        resolved, self.precision, self.scratch = resolve_model(self.recipe), choose_precision(self.recipe), scratch
        self.tokenizer, size = resolved.tokenizer, values["training"]["global_batch_size"]

        # Rows as a training has them; those that it would refuse are left out.
        lines = Path(options.data).read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["label_block"][0] in self.about["blocks"]]
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[: options.rows]]
        texts = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in ("question", "answer")})
        strata = np.array([SEVERITIES.index(row["severity"]) for row in rows], dtype=np.int8)
        limit = values["training"]["max_length"]
        encoded, _ = encode_rows(texts, resolved.prompt, limit, strata=strata, cache_file=scratch / "encoded.arrow")
        self.rows = [rows[i] for i in encoded["source_index"]]
        self.labels = np.asarray(encoded["severity"])
        self.groups = np.array([str(question_key(fold_for_matching(row["question"]), 0)) for row in self.rows])
        folds = StratifiedGroupKFold(self.about["folds"], shuffle=True, random_state=self.seed)
        self.train, self.test = list(folds.split(self.labels, self.labels, self.groups))[self.fold]
        if share := self.about.get("critical_share"):
            critical = self.labels[self.train] == 2
            count = max(1, round((~critical).sum() * share / (1 - share)))
            few = self.generator("thin").permutation(self.train[critical])[:count]
            self.train = np.sort(np.concatenate([self.train[~critical], few]))
        plain = add_token_weights(encoded, np.ones(len(encoded)), "tokens", cache_file=scratch / "weighted.arrow")
        self.dataset = plain.select(self.train).select_columns(["input_ids", "labels", "token_weights"])
        self.tokens = list(self.dataset.select_columns(["input_ids", "labels"]))
        tested = encoded.select(self.test).select_columns(["input_ids", "labels"])
        tested = tested.add_column("severity", np.arange(len(tested)))  # a stratum each: single rows are measured
        longest_first = np.argsort([-len(ids) for ids in tested["input_ids"]], kind="stable")
        self.tested = datasets.Dataset.from_list(list(tested.select(longest_first)))
        self.steps = max(2, round(len(self.train) * values["training"]["num_train_epochs"] / size))
        self.order = cycled(self.generator("order"), np.arange(len(self.train)), self.steps, size)

        # One base with two adapters: that which is trained, and one of twice the rank for what lies between two.
        torch.manual_seed(self.seed)
        base = load_model(self.recipe, self.precision).to("cuda" if on_gpu else "cpu")
        states = self.result.with_name(f"{self.part}-states-{len(rows)}.safetensors")
        keep_upper_layers(base, encoded["input_ids"], kept, self.tokenizer.pad_token_id, states)
        config = lora_config(self.recipe, base)
        self.model = get_peft_model(base, copy.deepcopy(config))
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        self.model.add_adapter("between", config)
        self.model.set_adapter("default")
        cast_trained(self.model)
        self.initial = self.adapter_weights()
        gc.collect()
        gc.freeze()  # each training ends in a collection of garbage
        self.write_rows()

    def generator(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.fold, *purpose.encode()])

    def adapter(self, name: str = "default") -> dict[str, torch.nn.Parameter]:
        return {key: weight for key, weight in self.model.named_parameters() if f".{name}." in key}

    def adapter_weights(self) -> Weights:
        return {key: weight.detach().clone() for key, weight in self.adapter().items()}

    @cached_property
    def severities(self) -> dict[str, np.ndarray]:
        """Labels → (n, 3) probabilities of the training rows; each predicted one by rows of other questions."""

        def of_both(row: dict[str, Any]) -> list[str]:
            return [f"{name}:{part}" for name in ("question", "answer") for part in features(row[name])]

        gold, groups = np.eye(3)[self.labels[self.train]], self.groups[self.train]
        found = {"gold": gold, "permuted": self.generator("permute").permutation(gold)}
        if self.part == "final":
            tfidf = TfidfVectorizer(analyzer=of_both, sublinear_tf=True, min_df=2)
            model, folds = make_pipeline(tfidf, LogisticRegression(max_iter=1000)), StratifiedGroupKFold(5)
            predict = partial(cross_val_predict, model, cv=folds, method="predict_proba")
            found["predicted"] = predict([self.rows[i] for i in self.train], gold.argmax(1), groups=groups)
            found["permuted-predicted"] = self.generator("permute").permutation(found["predicted"])
        return found

    def critical(self, labels: str) -> np.ndarray:
        """(n,) bool: as many training rows as the probabilities sum to, the most probable ones."""
        probabilities = self.severities[labels][:, 2]
        order = np.argsort(-probabilities, kind="stable")
        return np.isin(np.arange(len(order)), order[: max(1, round(probabilities.sum()))])

    def router(self, labels: str) -> list[float]:
        """P(critical) of the test questions, without answers, by a linear classifier of the training questions."""
        hard = np.where(self.critical(labels), 2, self.severities[labels][:, :2].argmax(1))
        questions = [[self.rows[i]["question"] for i in part] for part in (self.train, self.test)]
        fitted = fit_linear(Examples(questions[0], hard, self.groups[self.train], self.train))
        return fitted.probabilities(questions[1])[:, -1].round(6).tolist()

    def write(self, **record: Any) -> None:
        with self.result.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps({"seed": self.seed, "fold": self.fold, **record}) + "\n")

    def finished(self) -> set[Arm]:
        """Arms whose measurements are all there."""
        found: dict[Any, set[float]] = {}
        for line in self.result.read_text(encoding="utf-8").splitlines():
            if (one := json.loads(line))["arm"] and (one["seed"], one["fold"]) == (self.seed, self.fold):
                found.setdefault(Arm(*one["arm"]), set()).add(one["interpolation"])
        ways = len({*self.settings["interpolation"], 1.0})
        return {arm for arm, measured in found.items() if len(measured) == (ways if arm.kind in BRANCHES else 1)}

    def write_rows(self) -> None:
        """What the analysis has to know of the test rows; no text."""
        by_row = sorted(self.tested, key=lambda row: row["severity"])
        tokens = [sum(label != IGNORED for label in row["labels"]) for row in by_row]
        about = {"row": [self.rows[i]["row"] for i in self.test], "tokens": tokens, "steps": self.steps}
        about |= {"group": self.groups[self.test].tolist(), "severity": self.labels[self.test].tolist()}
        about |= {"router": {labels: self.router(labels) for labels in self.severities}}
        gold = self.labels[self.train] == 2
        about["auc"] = {labels: float(roc_auc_score(gold, p[:, 2])) for labels, p in self.severities.items()}
        self.write(arm=None, critical_share=self.about.get("critical_share"), **about)

    def train_arm(self, arm: Arm) -> None:
        kind, everyone, size = arm.kind, np.arange(len(self.train)), self.order.shape[1]
        if kind == "ce":
            _ = self.ce
        elif kind == "base":
            self.run(arm, self.initial, self.order)
        elif kind in self.settings["weights"]:
            coefficients = tuple(self.settings["weights"][kind])
            weights = severity_weights(self.severities[arm.labels], coefficients, normalize="mean")
            self.run(arm, self.initial, self.order, weights=weights)
        else:
            ce, generator, steps = self.ce, self.generator("phase"), max(1, round(arm.length * self.steps))
            if kind == "ce_extra":
                order = cycled(generator, everyone, steps, size)
            else:
                critical, half = self.critical(arm.labels), round(size * self.settings["critical_share"])
                pools = [(everyone[critical], half), (everyone[~critical], size - half)]
                order = np.hstack([cycled(generator, pool, steps, count) for pool, count in pools])
            if kind == "late":
                self.run(arm, self.initial, np.vstack([self.order[:-steps], order]))
            else:
                replay = {"weights": critical.astype(float), "replayed": ~critical} if kind == "replay" else {}
                self.run(arm, ce, order, rate=arm.rate, **replay)

    @cached_property
    def ce(self) -> Weights:
        """The adapter after plain cross-entropy; kept beside the results, so that a killed process goes on after it."""
        kept = self.result.with_name(f"{self.part}-ce-{self.seed}-{self.fold}.safetensors")
        if not kept.exists():
            self.run(Arm("ce"), self.initial, self.order)
            save_file(self.adapter_weights(), kept)
        return load_file(kept, device=str(self.model.device))

    def run(
        self, arm: Arm, start: Any, order: np.ndarray, *, rate: float = 1.0, weights: Any = None, replayed: Any = None
    ) -> None:
        """Trains from `start` on the batches `order`, and measures the test rows, also between CE and the arm."""
        began = time.monotonic()
        self.set_adapter("default", start)
        rate *= self.recipe.training.settings()["learning_rate"]
        recipe = with_training(self.recipe, max_steps=len(order), learning_rate=rate, seed=self.seed)
        weights = np.ones(len(self.train)) if weights is None else weights
        trainer = SeveritySFTTrainer(
            model=self.model,
            args=sft_config(recipe, self.precision, self.scratch),
            train_dataset=self.dataset,
            processing_class=self.tokenizer,
            curriculum=Batches(self.tokens, order, weights, replayed, self.settings["replay"], start),
        )
        trainer.remove_callback(PrinterCallback)
        try:
            if arm.kind != "base":
                trainer.train()
            seconds = time.monotonic() - began
            self.measure(trainer, arm, 1.0)
            after = self.adapter_weights()
            for share in (share for share in self.settings["interpolation"] if share < 1 and arm.kind in BRANCHES):
                self.set_adapter("between", between(self.ce, after, share))
                self.measure(trainer, arm, share)
        finally:
            self.model.set_adapter("default")
            for module in (self.model, self.model.get_base_model()):  # each trainer wraps what the one before has left
                module.__dict__.pop("forward", None)
        in_all = time.monotonic() - began
        print(f"{self.name} {arm}: {len(order)} steps in {seconds:.1f} s, {in_all:.1f} s in all", flush=True)

    def set_adapter(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        self.model.set_adapter(name)
        with torch.no_grad():
            for key, weight in self.adapter(name).items():
                weight.copy_(weights[key])

    def measure(self, trainer: Any, arm: Arm, interpolation: float) -> None:
        """Writes the NLL (nats) of every test row; each is a stratum of the trainer's validation."""
        trainer.strata = len(self.tested)
        trainer.evaluation_loop(trainer.get_eval_dataloader(self.tested), "Measuring", prediction_loss_only=True)
        self.write(arm=list(arm), interpolation=interpolation, nll=trainer._validation[:, 0].numpy().round(5).tolist())
