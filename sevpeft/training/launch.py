"""Finds out whether as many processes run as the launcher was asked for, and whether they share one model.

On a CPU, `accelerate launch --cpu --num_processes 2` and `distributed_type: MULTI_CPU` start one process and say
nothing; half of the work is then missing from a run that looks complete. What was asked for is read from the command
line of the launcher itself, which is an ancestor of this process, with accelerate's own parser.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import TrainingArguments

from sevpeft.errors import RunError


def check_processes(running: int) -> None:
    """Raises RunError when `accelerate launch` was asked for another number of processes than are running."""
    asked = next(filter(None, (asked_processes(line) for line in _ancestors())), None)
    if asked is not None and asked != running:
        raise RunError(
            f"accelerate launch was asked for {asked} processes, but {running} run{'s' if running == 1 else ''}; "
            "on a CPU it starts several only with `distributed_type: MULTI_GPU` and `use_cpu: true`, "
            "as in accelerate_configs/cpu_2.yaml."
        )


def sharding_engine(args: TrainingArguments) -> str | None:
    """FSDP or DeepSpeed, where one of them cuts the model into parts; None where every process holds all of it."""
    if args.deepspeed_plugin is not None:
        return "DeepSpeed"
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    return "FSDP" if launched or args.fsdp else None


def asked_processes(command: Sequence[str]) -> int | None:
    """Number of processes that a command line asks of `accelerate launch`.

    Args:
        command: the words of the command line.

    Returns:
        The number from `--num_processes`, else from the config file; None for another command or when accelerate is
        left to count the devices.
    """
    arguments = _launch_arguments(command)
    if arguments is None:
        return None
    try:
        parsed, _ = launch_command_parser().parse_known_args(arguments)
    except SystemExit:
        return None
    if parsed.num_processes is not None:
        return int(parsed.num_processes)
    config = parsed.config_file or (default_config_file if Path(default_config_file).is_file() else None)
    if config is None or not Path(config).is_file():
        return None
    number = getattr(load_config_from_file(config), "num_processes", None)
    return int(number) if number and number > 0 else None


def _launch_arguments(command: Sequence[str]) -> list[str] | None:
    for index, word in enumerate(command):
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return list(command[index + 1 :])
        is_cli = name in ("accelerate", "accelerate.commands.accelerate_cli")
        if is_cli and command[index + 1 : index + 2] == ["launch"]:
            return list(command[index + 2 :])
    return None


def _ancestors() -> list[list[str]]:
    """Command lines of the processes above this one, nearest first; those of other users are left out."""
    lines = []
    for process in psutil.Process().parents():
        try:
            lines.append(process.cmdline())
        except psutil.Error:
            continue
    return lines
