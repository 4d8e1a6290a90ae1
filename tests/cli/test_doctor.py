"""doctor says whether this machine can train, and what mends each fault; it never fails itself, and keeps the token."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from sevpeft.cli import training
from tests.conftest import Cli

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the libraries that are here, whatever was written when the package was installed."""
    needs = ["torch>=2", "trl>=1", "pytest>100; extra == 'test'", "bitsandbytes>=0.1"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def findings(sevpeft_: Cli) -> tuple[int, dict[str, dict[str, Any]]]:
    code, out, _ = sevpeft_("doctor", "--json")
    found = json.loads(out)
    assert found["ready"] == (code == 0)
    return code, {one["name"]: one for one in found["findings"]}


def test_a_machine_that_can_train_is_told_so_and_no_token_is_shown(
    sevpeft_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    code, out, err = sevpeft_("doctor")
    assert code == 0 and "This machine can train" in out and "✗" not in out
    assert "verysecret" not in out + err and "trl" in out and max(map(len, out.splitlines())) <= 80
    code, found = findings(sevpeft_)
    assert code == 0 and found["Hub login"]["text"] == "yes" and not found["4 bit"]["remedy"]
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in findings(sevpeft_)[1]["Hub login"]["text"]


def test_a_broken_library_is_a_finding_with_its_remedy_and_no_crash(
    sevpeft_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        """As a wheel for another CUDA: an OSError on import."""

        def find_spec(self, name: str, *_: Any) -> None:
            if name == "torch":
                raise OSError("libcudart.so.13: cannot open shared object file")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    code, found = findings(sevpeft_)
    assert code == 1 and "libcudart" in found["torch"]["text"]
    assert found["torch"]["remedy"] == "pip install --force-reinstall 'torch>=2'"
    assert "GPU" not in found and not found.get("trl")


def test_what_is_absent_or_of_another_version_is_named_with_the_command(
    sevpeft_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["torch>=2", "no-such-library>=3", "rich<2,>=1"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs)
    code, out, _ = sevpeft_("doctor")
    assert code == 1 and "pip install --force-reinstall 'no-such-library>=3'" in out and "✗ no-such-library" in out
    assert "! rich" in out and "pip install 'rich<2,>=1'" in out
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs[:1] + needs[2:])
    code, found = findings(sevpeft_)
    assert code == 0 and found["rich"]["remedy"], "another version may work"


def test_what_a_training_can_do_without_is_no_reason_to_fail(sevpeft_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 5 * 2**30))
    code, found = findings(sevpeft_)
    assert code == 0 and "load_in_4bit" in found["4 bit"]["text"] and "pip" in found["4 bit"]["remedy"]
    assert found["Hub cache"]["remedy"].startswith("export HF_HOME=")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    assert findings(sevpeft_)[0] == 1
    monkeypatch.undo()


def test_a_cache_that_may_not_be_written_is_a_fault(sevpeft_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = os.environ["SEVPEFT_CACHE"]
    stock = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != closed and stock(path, mode))
    code, found = findings(sevpeft_)
    assert code == 1 and "SEVPEFT_CACHE" in found["Own cache"]["remedy"] and not found["Disk"]["remedy"]
    monkeypatch.setattr(os, "access", stock)
    monkeypatch.setenv("SEVPEFT_CACHE", f"{__file__}/below")  # below a file no folder can be made
    code, found = findings(sevpeft_)
    assert code == 1 and "SEVPEFT_CACHE" in found["Own cache"]["remedy"]


def test_a_gpu_is_judged_by_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    from sevpeft.training import resolve

    card = namedtuple("Card", "name total_memory major minor")("Some GPU", 23.6 * 2**30, 8, 9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(resolve, "device_memory", lambda recipe: round(23.6 * 0.95 * 2**30))
    found = {name: (text, remedy, fatal) for name, text, remedy, fatal in training._findings()}
    assert "2 × Some GPU, 23.6 GiB" in found["GPU"][0] and found["Computes in"][0] == "bfloat16"
    assert "27b" in found["Can train"][0] and found["4 bit"][1], "there is no CUDA for the 4-bit weights"
