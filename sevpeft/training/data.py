"""Training data of a recipe: splits, encoded rows with token weights, batches."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from sevpeft.data.columns import TURNS, trained_turns
from sevpeft.data.mix import SOURCE, draw, with_sources
from sevpeft.data.read import Consultations, is_prepared, load_consultations
from sevpeft.data.split import SIDES, Splits, question_key, question_keys, split_rows, without_questions
from sevpeft.data.text import fold_for_matching
from sevpeft.errors import DataError, WeightError
from sevpeft.modeling.loading import learned_positions
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import AsPublishedSection, Recipe, TrainingDataSection
from sevpeft.runs import workers_end_with_this_process
from sevpeft.severity.probabilities import SEVERITIES, has_severity
from sevpeft.severity.source import Severity, prompt_severity, severity_of
from sevpeft.severity.weights import WeightSummary, oversample, severity_weights
from sevpeft.training.compat import IGNORED
from sevpeft.training.curriculum import MEASURED, difficulty_of

# With fewer rows, the progress bars of the single steps are too short to be read.
ROWS_WORTH_A_BAR = 20_000
# Column of the severity that a row's prompt names.
PROMPT_SEVERITY = "prompt_severity"
# Column of training rows: position in SEVERITIES of each token's consultation, -1 if not known.
TOKEN_SEVERITY = "token_severity"
_TRAINED_ON = ["input_ids", "labels", "token_weights", TOKEN_SEVERITY]


@dataclass(frozen=True)
class Prepared:
    """Rows for `SeveritySFTTrainer`, and a summary of their preparation."""

    train: Dataset
    validation: Dataset
    weights: WeightSummary
    summary: dict[str, Any]
    difficulty: list[np.ndarray]  # (n,) of the training and of the validation rows, larger for harder ones
    unpacked: Dataset  # the training rows before packing, with severity, source_index and lost_words


def prepare(recipe: Recipe, prompt: Prompt, scratch: Path, config: Any = None) -> Prepared:
    """Loads, splits, encodes and weighs the data. `scratch` holds memory-mapped Arrow files until the training ends."""
    table, splits, severity = load_splits(recipe)
    settings, encoded, reports = recipe.training.settings(), {}, {}
    if len(table.rows) >= ROWS_WORTH_A_BAR:
        datasets.enable_progress_bars()
    with workers_end_with_this_process():
        for name in ("train", "validation"):
            rows = getattr(splits, name)
            encoded[name], reports[name] = encode_rows(
                rows,
                prompt,
                settings["max_length"],
                strata=None if severity is None else severity.strata[source_index(rows)],
                cache_file=scratch / f"{name}.arrow",
                num_proc=settings.get("dataset_num_proc"),
                mix=recipe.data if recipe.data.mix and name == "train" else None,
                published=recipe.as_published if name == "train" else AsPublishedSection(),
            )
        longest, context = max(report["longest"] for report in reports.values()), config and learned_positions(config)
        if context and longest > context:
            problem = f"A row has {longest} tokens, and {recipe.model.name_or_path} reads at most {context}"
            raise DataError(f"{problem}; set training.max_length={context}.")
        kept = source_index(splits.train)[source_index(encoded["train"])]
        if severity is not None and recipe.severity.control == "oversampled":
            drawn = oversample(weigh(recipe, severity, kept, control="none")[0], settings["seed"])
            encoded["train"], kept = encoded["train"].select(drawn), kept[drawn]
        weights, summary = weigh(recipe, severity, kept)
        weights = weights * np.asarray(encoded["train"][TURN_WEIGHT])
        weights = weights * (settings["global_batch_size"] if recipe.as_published.unnormalized else 1)
        cache_file = scratch / "weighted.arrow"
        weighted = add_token_weights(encoded["train"], weights, recipe.severity.reduction, cache_file=cache_file)
        train = weighted.select_columns(_TRAINED_ON)
        if settings.get("packing"):
            train = pack_rows(train, settings["max_length"], cache_file=scratch / "packed.arrow")
    datasets.disable_progress_bars()
    data_summary = summary_of(table, splits, severity, reports)
    if config and longest > (usual := learned_positions(config, rotary=True) or longest):
        data_summary["pretrained_positions"] = usual
    if recipe.data.mix:
        data_summary["mix"], data_summary["rows"]["train"] = reports["train"].pop("mix"), len(kept)
    # Longest first: batches then need little padding, and too little memory shows in the first one.
    longest_first = np.argsort(-lengths_of(encoded["validation"]), kind="stable")
    held_out = encoded["validation"].select(longest_first)
    places = [kept, source_index(splits.validation)[source_index(held_out)]]
    lengths = [lengths_of(encoded["train"]), lengths_of(held_out)]
    return Prepared(
        train=train,
        validation=held_out.select_columns(["input_ids", "labels", "severity"]),
        weights=summary,
        summary=data_summary,
        difficulty=difficulty_of(recipe.curriculum, table, severity, places, lengths),
        unpacked=weighted,
    )


def load_splits(recipe: Recipe) -> tuple[Consultations, Splits, Severity | None]:
    """The consultations, their splits, and their severity: None for plain cross-entropy of rows without severity."""
    data, weighting = recipe.data, recipe.severity
    keep = ["group"] if is_prepared(Path(data.path).expanduser()) else []
    keep += [weighting.weight_column] if weighting.source == "weight" else []
    keep += {recipe.curriculum.difficulty} - MEASURED
    own = load_consultations(data, keep=keep or "mapped")
    table = with_sources(own, data, keep or "mapped")
    # Plain cross-entropy needs no severity of the sources in data.mix.
    severity, plain = None, weighting.control == "uniform" and weighting.source == "columns"
    if not plain or has_severity(own.rows):
        names = {column: name for name, column in (table.columns | table.carried).items()}
        column = names.get(weighting.weight_column, weighting.weight_column)
        how = weighting.model_copy(update={"weight_column": column})
        try:
            severity = severity_of(own.rows if plain else table.rows, how)
        except (DataError, WeightError) as error:
            raise (WeightError if isinstance(error, WeightError) else DataError)(f"{table.source}: {error}") from None
        unknown = np.full((len(table.rows) - len(severity.probabilities), len(SEVERITIES)), np.nan)
        severity = replace(severity, probabilities=np.concatenate([severity.probabilities, unknown]))
    rows, first = table.rows.add_column("source_index", np.arange(len(table.rows))), range(len(own.rows))
    named_by = None
    if recipe.prompt.severity != "none":
        named, named_by = prompt_severity(table.rows, recipe.prompt.severity, weighting.classifier)
        rows = rows.add_column(PROMPT_SEVERITY, named)
    keys = None
    if "group" in own.rows.column_names:  # near-duplicate questions, found by `sevpeft prepare`
        # Hashed, because validation rows are taken from the train rows in the order of these numbers.
        keys = np.asarray([question_key(group, data.seed) for group in own.rows["group"]], dtype=np.uint64)
    strata = None if severity is None else severity.strata[: len(first)]
    splits = split_rows(rows.select(first), data, strata=strata, keys=keys, fold=data.fold)
    if data.mix:  # all other sources are training rows, without questions that are held out
        held_out = np.concatenate([question_keys(part) for part in (splits.validation, splits.test)])
        others = without_questions(rows.select(range(len(first), len(rows))), held_out)
        splits = splits._replace(train=datasets.concatenate_datasets([splits.train, others]))
    if recipe.prompt.examples:
        # Prompts show the answers of the examples, so these rows are left out of all splits.
        questions = (fold_for_matching(one.question) for one in recipe.prompt.examples)
        shown = np.array([question_key(folded, 0) for folded in questions], dtype=np.uint64)
        splits = splits._replace(**{name: without_questions(getattr(splits, name), shown) for name in SIDES})
    return table, splits._replace(prompt_severity=named_by), severity


def lengths_of(rows: Dataset) -> np.ndarray:
    """(n,) number of tokens of each encoded row, from Arrow's offsets."""
    tables = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in tables])


def summary_of(
    table: Consultations, splits: Splits, severity: Severity | None, encoding: dict[str, Any]
) -> dict[str, Any]:
    """The data section of a run's metrics.json."""
    return {
        "source": table.source,
        "fingerprint": table.fingerprint,
        "prepared": table.provenance or None,
        "columns": table.columns,
        "rejected": table.rejected,
        "severity": None if severity is None else severity.origin,
        "split_by": splits.by,
        "questions_in_two_splits": splits.leaks,
        "rows": {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        "encoding": encoding,
        **({"prompt_severity": splits.prompt_severity} if splits.prompt_severity else {}),
    }


def weigh(
    recipe: Recipe, severity: Severity | None, kept: np.ndarray, control: Any = None
) -> tuple[np.ndarray, WeightSummary]:
    """Weights (n,) of the training rows at `kept`, and their summary. `control` replaces that of the recipe."""
    weighting, strata = recipe.severity, None if severity is None else severity.strata[kept]
    if severity is None or weighting.control == "uniform":
        return np.ones(len(kept)), WeightSummary.of(np.ones(len(kept)), strata)
    ready = severity.weights
    weights = severity_weights(
        severity.probabilities[kept] if ready is None else ready[kept, None],
        weighting.coefficients() if ready is None else (1.0,),
        normalize=weighting.normalize,
        control=control or weighting.control,
        seed=recipe.training.settings()["seed"],
    )
    return weights, WeightSummary.of(weights, strata)


def source_index(rows: Dataset) -> np.ndarray:
    """(n,) position of every row in the table that it was taken from."""
    return np.asarray(rows.with_format("numpy")["source_index"][:])


_COUNTS = ("lost_words", "answer_length", "unknown_tokens")
# Column of the weight that a conversation gives an answer; multiplied with the severity weight.
TURN_WEIGHT = "turn_weight"
_FEATURES = Features(
    {
        **{name: List(Value("int32")) for name in ("input_ids", "labels")},
        **{"severity": Value("int8"), "source_index": Value("int64")},
        **{name: Value("int32") for name in _COUNTS},
        TURN_WEIGHT: Value("float64"),
    }
)


def encode_rows(
    rows: Dataset,
    prompt: Prompt,
    max_length: int | None,
    *,
    strata: np.ndarray | None,
    cache_file: Path,
    num_proc: int | None = None,
    mix: TrainingDataSection | None = None,
    published: AsPublishedSection = AsPublishedSection(),  # noqa: B008  (frozen)
) -> tuple[Dataset, dict[str, Any]]:
    """Tokenizes a split.

    Args:
        rows: columns question, answer and, optionally, dialect, turns and prompt_severity. prompt: as in generation.
        max_length: tokens of prompt and answer together; None for no limit.
        strata: (n,) position in SEVERITIES of every row; None for -1, not known.
        cache_file: Arrow file of the result. num_proc: processes, as in `datasets.Dataset.map`.
        mix: draws the rows by source; the report is of the drawn rows.
        published: tokens and labels as in a published training loop.

    Returns input_ids, labels, severity, source_index (row of `rows`), lost_words and turn_weight; and a report: counts
    of rows, lengths in tokens, words cut from questions. Raises DataError: no row is left.
    """
    strata = np.full(len(rows), -1, dtype=np.int8) if strata is None else strata
    encoded = rows.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_FEATURES,
        fn_kwargs={"prompt": prompt, "max_length": max_length, "strata": strata, "published": published},
        cache_file_name=str(cache_file),
        load_from_cache_file=False,
        num_proc=num_proc,
        desc="Encoding",
    )
    conversations = rows[TURNS] if TURNS in rows.column_names else [None] * len(rows)
    answers = sum(1 for turns in conversations for _ in trained_turns("", "", turns))
    if len(encoded) == 0:
        raise DataError(f"None of {len(rows)} answers fits training.max_length={max_length}; raise it.")
    report: dict[str, Any] = {"rows": len(encoded), "refused": answers - len(encoded)}
    if mix is not None:
        drawn, report["mix"] = draw(lengths_of(encoded), np.array(rows[SOURCE])[source_index(encoded)], mix)
        encoded, report["rows"] = encoded.select(drawn), len(drawn)
    counts = encoded.select_columns(list(_COUNTS)).with_format("numpy")[:]
    lengths, lost = lengths_of(encoded), counts["lost_words"]
    report |= {
        "shortened": int((lost > 0).sum()),
        "lost_words": int(lost.sum()),
        "most_lost_words": int(lost.max()),
        "median_length": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "answer_tokens": int(counts["answer_length"].sum()),
        "unknown_token_share": float(counts["unknown_tokens"].sum() / lengths.sum()),
    }
    return encoded.remove_columns(["answer_length", "unknown_tokens"]), report


def _encode_batch(
    batch: dict[str, Any], indices: list[int], prompt: Prompt, max_length: int | None, strata: Any, published: Any
) -> dict[str, list[Any]]:
    missing = [None] * len(indices)
    texts = zip(batch["question"], batch["answer"], batch.get(TURNS) or missing, strict=True)
    about = zip(indices, batch.get("dialect") or missing, batch.get(PROMPT_SEVERITY) or missing, strict=True)
    # Each answer of a conversation is a row, with the prompt that generation would have at that turn.
    turns = [(*of, *turn) for of, text in zip(about, texts, strict=True) for turn in trained_turns(*text)]
    places, dialects, severities, questions, replies, weights, earlier = zip(*turns, strict=True)
    prompts, answers = prompt.prompt_ids(questions, dialects, severities, earlier), prompt.answer_ids(replies)
    rows, unknown = [], prompt.tokenizer.unk_token_id  # byte-level tokenizers have none, or name EOS
    for n, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        answer, lost = answer[: -1 if published.no_end_token else None], 0
        if max_length is not None and len(ids) + len(answer) > max_length:
            room = max_length - len(answer)
            shorter = prompt.shortened(room, questions[n], dialects[n], severities[n], earlier[n])
            if shorter is None:
                continue
            ids, lost = shorter
        counted = 0 if unknown in (None, prompt.end_id) else (ids + answer).count(unknown)
        ids, labels, stratum = ids + answer, [IGNORED] * len(ids) + answer, int(strata[places[n]])
        if published.labels == "all":
            # Without an attention mask padding attends to padding, unlike in the notebook. An answer never does.
            ids += [prompt.end_id] * ((max_length or 0) - len(ids))
        if published.labels != "answer":
            labels = [IGNORED, *ids[1:]]  # nothing predicts the first token
        rows.append((ids, labels, stratum, places[n], lost, len(answer), counted, weights[n]))
    return {name: [row[number] for row in rows] for number, name in enumerate(_FEATURES)}


def add_token_weights(encoded: Dataset, weights: np.ndarray, reduction: str, *, cache_file: Path) -> Dataset:
    """Adds `token_weights`, one float per token, zero where the label is ignored, and `TOKEN_SEVERITY`.

    With reduction "tokens" every answer token of consultation i has the weight w_i, and the batch loss is divided by
    the number of answer tokens. With "examples" the weight is w_i / L_i for an answer of L_i tokens, and the loss is
    divided by the number of consultations: the paper's (1/L) Σ_t w · (−log P) (arXiv 2604.06346, eq. 3).

    `weights`: (n,) weights w of the rows of `encoded`, which `encode_rows` has made.
    """
    if len(weights) != len(encoded):
        raise WeightError(f"There are {len(weights)} severity weights for {len(encoded)} consultations.")

    def weigh_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[np.ndarray]]:
        masks = [np.asarray(labels) != IGNORED for labels in batch["labels"]]
        each = weights[indices] / [mask.sum() if reduction == "examples" else 1 for mask in masks]
        strata = batch.get("severity") or [-1] * len(masks)
        of_tokens = [np.full(len(mask), stratum) for mask, stratum in zip(masks, strata, strict=True)]
        return {"token_weights": [mask * w for mask, w in zip(masks, each, strict=True)], TOKEN_SEVERITY: of_tokens}

    added = {"token_weights": List(Value("float32")), TOKEN_SEVERITY: List(Value("int8"))}
    return encoded.map(
        weigh_batch,
        batched=True,
        with_indices=True,
        features=Features({**encoded.features, **added}),
        cache_file_name=str(cache_file),
        load_from_cache_file=False,
        desc="Weighting",
    )


def check_weights(dataset: Dataset) -> None:
    """Checks all token weights before the first step.

    Raises WeightError: weights are missing, differ in number from the tokens, or are not finite, negative or all zero.
    """
    missing = [name for name in ("input_ids", "labels", "token_weights") if name not in dataset.column_names]
    if missing:
        raise WeightError(f"The training data has no {', '.join(missing)}; give weights, all ones for cross-entropy.")
    highest = 0.0
    for table in dataset.select_columns(["token_weights", "labels"]).with_format("arrow").iter(batch_size=2000):
        column, labels = table["token_weights"].combine_chunks(), table["labels"].combine_chunks()
        values = pc.list_flatten(column).to_numpy(zero_copy_only=False)  # null becomes NaN
        if column.null_count or not np.isfinite(values).all():
            raise WeightError("The training data has token_weights that are missing or not finite.")
        if not pc.all(pc.equal(pc.list_value_length(column), pc.list_value_length(labels))).as_py():
            raise WeightError("A row of the training data has more or fewer token_weights than tokens.")
        if (values < 0).any():
            raise WeightError("The training data has negative token_weights.")
        highest = max(highest, values.max(initial=0.0))
    if not highest:
        raise WeightError("All token_weights of the training data are zero, so nothing would be learned.")


def pack_rows(encoded: Dataset, max_length: int, *, cache_file: Path) -> Dataset:
    """Packs rows into blocks of at most `max_length` tokens with TRL's best-fit-decreasing packer."""
    file = {"cache_file_name": str(cache_file), "load_from_cache_file": False, "desc": "Packing"}
    return pack_dataset(encoded.select_columns(_TRAINED_ON), max_length, strategy="bfd", map_kwargs=file)


@dataclass
class SeverityCollator(DataCollatorForLanguageModeling):
    """Collates rows of `input_ids, labels, token_weights` (training) or `input_ids, labels, severity` (validation).

    Returns the output of TRL's collator, with the columns that the rows have of `token_weights` (float32) and
    `TOKEN_SEVERITY` (int64), both of the shape of `labels`, and `severity` (int64, one number per row).
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        output = super().torch_call(examples)
        for name, dtype, filling in (("token_weights", torch.float32, 0.0), (TOKEN_SEVERITY, torch.long, -1)):
            if name not in examples[0]:
                continue
            rows = [torch.tensor(example[name], dtype=dtype) for example in examples]
            output[name] = pad(
                [torch.cat(rows)] if self.padding_free else rows,
                padding_value=filling,
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
            )
        if "severity" in examples[0]:
            output["severity"] = torch.tensor([example["severity"] for example in examples], dtype=torch.long)
        return output


def rows_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The consultations of a batch that is padded, padding-free or packed, as input for the collator."""
    columns = [name for name in batch if name in _TRAINED_ON]
    if "attention_mask" in batch:
        masks = enumerate(batch["attention_mask"].bool())
        rows = [{name: batch[name][number][mask].tolist() for name in columns} for number, mask in masks]
    else:
        begins = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        parts = list(pairwise([*begins, batch["input_ids"].shape[1]]))
        # Padding at the end has position 0 too; a consultation has a prompt and an answer.
        rows = [{name: batch[name][0, a:b].tolist() for name in columns} for a, b in parts if b - a > 1]
    if "severity" in batch:
        rows = [{**row, "severity": severity} for row, severity in zip(rows, batch["severity"].tolist(), strict=False)]
    return rows


def answer_starts(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) with only the first label of every answer, so that their number is that of the answers.

    The first position of a row is never predicted. In a packed row every document begins with an ignored label.
    """
    starts = labels != IGNORED
    starts[:, 0] = False
    starts[:, 1:] &= labels[:, :-1] == IGNORED
    return labels.masked_fill(~starts, IGNORED)
