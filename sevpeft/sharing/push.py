"""Pushes an adapter to the Hub as one commit of known files, downloads it and compares.

A repository with other files is not changed. After an interruption the same command continues.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from transformers.utils import GENERATION_CONFIG_NAME

from sevpeft.console import Screen
from sevpeft.data.columns import TURNS
from sevpeft.data.mix import with_sources
from sevpeft.data.read import load_consultations
from sevpeft.errors import RunError, SevpeftError, UsageError, first_sentence
from sevpeft.evaluation.arms import check_adapter
from sevpeft.modeling.adapters import ADAPTER_CONFIG, attach_adapter, read_adapter_config
from sevpeft.modeling.chat_template import CHAT_TEMPLATE, save_tokenizer
from sevpeft.modeling.loading import load_for_inference, resolve_model, resolved_name
from sevpeft.modeling.prompts import Prompt
from sevpeft.recipe import JUDGE_KEY, Recipe, load_recipe
from sevpeft.runs import Run
from sevpeft.sharing import PushSettings
from sevpeft.sharing.card import HUB, adapter_card, base_id, is_unedited, license_of, public_recipe, rendered
from sevpeft.sharing.merge import logits_of, sample_texts

_CARD = "README.md"
# Keys of the Hub, OpenAI-compatible services, GitHub and AWS, and private keys.
_SECRETS = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{16,}|(gh[pousr]|github_pat)_\w{30,}|AKIA[0-9A-Z]{16}\b)|-----BEGIN [A-Z ]*PRIVATE"
)
# Words of the shortest data clause to search for; shorter ones match by chance. Many posts have commas only.
_WORDS = 6


def push(
    run: Run, repo_id: str, settings: PushSettings, *, dry_run: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Pushes a finished run's adapter, downloads it, and compares bytes and logits. Returns a report.

    `dry_run` only reports the files, without a network. RunError: a file is private, or the Hub refuses or changes it.
    """
    console = console or Screen(quiet=True)
    if not re.fullmatch(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]", repo_id):
        raise UsageError("Write REPO_ID as NAME/REPOSITORY, with letters, digits, -, _ and . only.")
    check_adapter(run)
    recipe = load_recipe(run.folder / "recipe.yaml")
    base, license_ = _checked_terms(recipe, repo_id, settings)
    with console.status("Collecting the files and searching them for private content"):
        prompt = resolve_model(recipe, run).prompt
        files = _files(run, recipe, prompt, repo_id, base, license_)
        unread = check_contents(files, run, recipe)
    sizes = {name: len(content) for name, content in files.items()}
    about: dict[str, Any] = {"repo_id": repo_id, "base_model": base, "license": license_, "files": sizes}
    about |= {"card": files[_CARD].decode(), "not_searched_for_data": unread}
    if dry_run:
        return about
    api = HfApi(library_name="sevpeft")
    with _hub_errors(repo_id), console.status("Checking account and repository"):
        account = api.whoami()
        owners = [account["name"], *(one["name"] for one in account.get("orgs", ()))]
        if repo_id.split("/")[0] not in owners:
            raise RunError(HUB["refusals"][403].format(repo_id) + f" ({', '.join(owners)}).")
        head, equal = _head(api, repo_id, settings, files)
    with console.status("Running base + adapter"):
        texts, _ = sample_texts(recipe, prompt)
        expected = _logits(recipe, run.adapter, texts)
    with _hub_errors(repo_id), console.status(f"Sending {len(files)} files to {repo_id}"):
        if head is None:
            api.create_repo(repo_id, private=settings.private, exist_ok=True)
            head, equal = _head(api, repo_id, settings, files)
        if not equal:
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            message = f"LoRA adapter for {base}, trained with sevpeft"
            head = api.create_commit(repo_id, added, commit_message=message, parent_commit=head).oid
        tag = f"sevpeft-{str(head)[:8]}"
        api.create_tag(repo_id, tag=tag, revision=head, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as cache, console.status("Downloading into an empty cache"):
        with _hub_errors(repo_id):
            pulled = Path(api.snapshot_download(repo_id, revision=tag, cache_dir=cache, allow_patterns=[*files]))
        there = {path.name: path.read_bytes() for path in pulled.iterdir()}
        if other := [name for name, content in files.items() if there.get(name) != content]:
            raise RunError(f"{repo_id} returned another {other[0]} than was sent; look at its page, and push again.")
        if not all(map(torch.equal, expected, _logits(recipe, pulled, texts))):
            raise RunError(f"The adapter downloaded from {repo_id} has other logits than {run.folder}; push again.")
    about |= {"commit": head, "tag": tag, "url": f"{api.endpoint}/{repo_id}", "sent": not equal}
    return {**about, "answer_tokens": sum(map(len, expected))}


def _checked_terms(recipe: Recipe, repo_id: str, settings: PushSettings) -> tuple[str, str]:
    """Hub id and license of the base model; RunError if one is unknown or does not allow sharing."""
    name, base = Path(recipe.model.name_or_path).name, settings.base_model or base_id(recipe)
    license_, examples = settings.license or license_of(recipe), recipe.prompt.examples or ()
    terms, subject = HUB["licenses"].get((license_ or "").lower(), {}), f"The license of {base}"
    begin, known = terms.get("named", ""), license_ and (terms or settings.license)
    if base is None:
        raise RunError(f"The base model {name} is not on the Hub; write base_model=NAME/MODEL of its original.")
    if "forbidden" in terms:
        raise RunError(f"{base} {terms['forbidden']}; ask its owner.")
    if not known:
        raise RunError(f"{subject} is unknown to sevpeft; read it, and if it allows sharing write license=NAME.")
    if not repo_id.split("/")[1].startswith(begin):
        raise RunError(f"{subject} requires a repository name such as NAME/{begin}-…; choose one.")
    if examples and not settings.examples:
        public = f"The chat template contains the {len(examples)} consultations of prompt.examples"
        raise RunError(f"{public}; if they may be published, write examples=true.")
    return base, str(license_)


def _files(run: Run, recipe: Recipe, prompt: Prompt, repo_id: str, base: str, license_: str) -> dict[str, bytes]:
    """Name → content of all files to send; an edited card is sent unchanged."""
    config, card = read_adapter_config(run.adapter), run.adapter / _CARD
    # The commit of the training, so that later commits to the base model have no effect.
    commit = run.metrics()["model"].get("commit") if base == recipe.model.name_or_path else None
    config |= {"base_model_name_or_path": base, "revision": commit}
    rendered = adapter_card(run, repo_id, base, license_)
    text = card.read_text(encoding="utf-8") if card.is_file() and not is_unedited(card) else rendered
    with tempfile.TemporaryDirectory(prefix="sevpeft-") as scratch:
        save_tokenizer(prompt, Path(scratch))
        files = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    own = {run.adapter / name for name in (SAFETENSORS_WEIGHTS_NAME, GENERATION_CONFIG_NAME)}
    files |= {path.name: path.read_bytes() for path in own & {*run.adapter.iterdir()}}
    files[ADAPTER_CONFIG] = (json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    files |= {"recipe.yaml": f"{public_recipe(recipe)}\n".encode(), _CARD: text.encode()}
    return dict(sorted(files.items()))


def check_contents(files: Mapping[str, bytes], run: Run, recipe: Recipe) -> str | None:
    """Raises RunError for a key, folder or data sentence in a file, without quoting it; returns why data is unread."""
    texts = {name: content.decode(errors="replace") for name, content in files.items()}
    weights = files[SAFETENSORS_WEIGHTS_NAME]  # eight bytes for the length of the header, then the header as text
    texts[SAFETENSORS_WEIGHTS_NAME] = weights[8 : 8 + int.from_bytes(weights[:8], "little")].decode(errors="replace")
    parsed = {name: json.loads(text) for name, text in texts.items() if name.endswith(".json")}
    texts |= {name: json.dumps(content, ensure_ascii=False) for name, content in parsed.items()}  # decodes \u0646
    keys = {*filter(None, (get_token(), os.environ.get(JUDGE_KEY)))}
    sources = [recipe.data.path, *(recipe.data.mix.sources.values() if recipe.data.mix else ())]
    paths = (Path(path).expanduser() for path in (run.folder.resolve(), resolved_name(recipe), *sources))
    folders = {f"{Path.home()}/", *(str(path) for path in paths if path.is_absolute())}
    for name, text in texts.items():
        secret = "a possible secret key" if _SECRETS.search(text) or any(key in text for key in keys) else ""
        secret = "a folder of this machine" if any(folder in text for folder in folders) else secret
        if secret:
            raise RunError(f"{name} contains {secret}; remove it from the recipe or {run.adapter}, and push again.")
    examined = texts.keys() - {"tokenizer.json", "vocab.json"} - ({CHAT_TEMPLATE} if recipe.prompt.examples else set())
    notice = " ".join(rendered("limits.md.jinja", {}).split())  # its advice stands in answers of the data too
    public = " ".join(" ".join(texts[name].split()) for name in examined).replace(notice, "")
    try:
        rows = with_sources(load_consultations(recipe.data), recipe.data, "mapped").rows
    except SevpeftError as error:
        return first_sentence(error)
    columns = [name for name in ("question", "answer", TURNS) if name in rows.column_names]
    for batch in rows.select_columns(columns).iter(batch_size=1000):
        conversations = [json.loads(turns) for turns in batch.get(TURNS, ()) if turns]
        earlier = [text for exchanges in conversations for exchange in exchanges for text in exchange[:2]]
        private = "\n".join(filter(None, (*batch["question"], *batch["answer"], *earlier)))
        for sentence in re.split(r"[.!?؟\n,،;؛:]+", private):
            words = sentence.split()
            if len(words) >= _WORDS and " ".join(words) in public:
                raise RunError("The card or the prompt contains a sentence of the data; remove it, and push again.")
    return None


def _logits(recipe: Recipe, adapter: Path, texts: Any) -> list[torch.Tensor]:
    return logits_of(attach_adapter(load_for_inference(recipe), adapter, recipe), texts)


def _head(api: HfApi, repo_id: str, settings: PushSettings, files: Mapping[str, bytes]) -> tuple[str | None, bool]:
    """The newest commit (None without a repository), and whether it has these files; RunError if it has others."""
    try:
        info = api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        return None, False
    if settings.private and not info.private:
        raise RunError(f"{repo_id} exists and is public; make it private on its page, or name another repository.")
    there = {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in info.siblings or ()}
    there.pop(".gitattributes", None)
    ours = {name: (git_hash(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    equal = all(there.get(name) in hashes for name, hashes in ours.items())
    if there and not equal and not (settings.parent_commit and str(info.sha).startswith(settings.parent_commit)):
        remedy = f"to commit the adapter on top of it write parent_commit={str(info.sha)[:12]}"
        raise RunError(f"{repo_id} has a commit with other files. Look at it; {remedy}, or name another repository.")
    return info.sha, equal


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Translates errors of huggingface_hub without text of the request, which contains the token."""
    try:
        yield
    except (httpx2.HTTPError, RuntimeError, OSError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__ or cause.__context__
        messages, code = HUB["refusals"], cause.response.status_code if cause else 0
        message = messages.get(type(error).__name__) or messages.get(code, messages["else"])
        raise RunError(f"{message.format(repo_id)}.") from error
