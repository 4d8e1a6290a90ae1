"""Finds out whether what runs is what the launcher was asked for: as many processes and machines, and that engine.

accelerate replaces what it cannot do in silence. On a CPU, `accelerate launch --cpu --num_processes 2` and
`distributed_type: MULTI_CPU` start one process, and FSDP becomes DDP with the whole model in each process; the run then
looks complete. What was asked for is read from the command line of the launcher itself, which is an ancestor of this
process, with accelerate's own parser, and from the environment in which the launcher starts its processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from accelerate import DistributedType, PartialState
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import is_deepspeed_available

from sevpeft.errors import RunError
from sevpeft.modeling.compat import deepspeed_requested, fsdp_requested

ON_A_CPU = (DistributedType.NO, DistributedType.MULTI_CPU)


@dataclass(frozen=True)
class Launch:
    """What a command line asks of `accelerate launch`.

    Attributes:
        processes: over all machines; None when accelerate is left to count the devices.
        machines: that work together.
        engine: FSDP or DEEPSPEED; None for any other.
    """

    processes: int | None
    machines: int
    engine: DistributedType | None


def refuse_absent_deepspeed() -> None:
    """Raises RunError when DeepSpeed is asked for and not installed; to be called before accelerate looks for it."""
    if deepspeed_requested() and not is_deepspeed_available():
        raise RunError(
            "accelerate launch was asked for DeepSpeed, which is not installed: pip install 'sevpeft[deepspeed]', or "
            "use accelerate_configs/fsdp2.yaml, which needs nothing more."
        )


def check_launch(state: PartialState) -> None:
    """Raises RunError when `accelerate launch` was asked for another number of processes or machines, or for another
    engine, than runs."""
    check_processes(state.num_processes)
    asked = _asked()
    for engine, wanted, runs in (
        ("FSDP", asked.engine is DistributedType.FSDP or fsdp_requested(), state.distributed_type not in ON_A_CPU),
        (
            "DeepSpeed",
            asked.engine is DistributedType.DEEPSPEED or deepspeed_requested(),
            state.distributed_type is DistributedType.DEEPSPEED,
        ),
    ):
        if wanted and not runs:
            instead = "DDP, the whole model in each process," if state.num_processes > 1 else "a single process"
            raise RunError(
                f"accelerate launch was asked for {engine}, but {instead} would run, because this run is on the CPU; "
                "run it where `nvidia-smi` lists GPUs, or use accelerate_configs/cpu_2.yaml on a CPU."
            )


def check_processes(running: int) -> None:
    """Raises RunError when `accelerate launch` was asked for another number of processes or machines than runs.

    Args:
        running: processes, over all machines.
    """
    asked = _asked()
    if asked.processes is not None and asked.processes != running:
        raise RunError(
            f"accelerate launch was asked for {asked.processes} processes, but {running} "
            f"run{'s' if running == 1 else ''}; "
            "on a CPU it starts several only with `distributed_type: MULTI_GPU` and `use_cpu: true`, "
            "as in accelerate_configs/cpu_2.yaml."
        )
    machines = _machines()
    if asked.machines != machines:
        raise RunError(
            f"accelerate launch was asked for {asked.machines} machines, but {machines} "
            f"take{'s' if machines == 1 else ''} part; start the same command on each, with its own --machine_rank "
            "and the same --main_process_ip, as accelerate_configs/multi_node.yaml says."
        )


def _asked() -> Launch:
    """What the nearest launcher above this process was asked for; nothing in particular where there is none."""
    nothing = Launch(None, _machines(), None)
    return next(filter(None, (asked_launch(line) for line in _ancestors())), nothing)


def _machines() -> int:
    """Number of machines that work together, from what torchrun or DeepSpeed's launcher sets."""
    return int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("CROSS_SIZE") or 1)


def asked_launch(command: Sequence[str]) -> Launch | None:
    """What a command line asks of `accelerate launch`: on the line itself, else in the config file.

    Args:
        command: the words of the command line.

    Returns:
        None for another command.
    """
    arguments = _launch_arguments(command)
    if arguments is None:
        return None
    try:
        parsed, _ = launch_command_parser().parse_known_args(arguments)
    except SystemExit:
        return None
    path = parsed.config_file or (
        default_config_file if Path(default_config_file).is_file() and not parsed.cpu else None
    )
    config = load_config_from_file(path) if path is not None and Path(path).is_file() else None
    processes = parsed.num_processes or getattr(config, "num_processes", None)
    machines = parsed.num_machines or getattr(config, "num_machines", None)
    flags = {
        DistributedType.FSDP: parsed.use_fsdp,
        DistributedType.DEEPSPEED: parsed.use_deepspeed,
        None: parsed.multi_gpu or parsed.cpu or parsed.tpu,
    }
    # A flag of the command line puts the file's distributed_type out of force.
    chosen = [engine for engine, set_here in flags.items() if set_here]
    engine = chosen[0] if chosen else getattr(config, "distributed_type", None)
    return Launch(
        processes=int(processes) if processes and processes > 0 else None,
        machines=int(machines) if machines else 1,
        engine=engine if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED) else None,
    )


def launcher_is_parent() -> bool:
    """Whether this process was started by `accelerate launch` itself."""
    return any(_launch_arguments(line) is not None for line in _ancestors()[:1])


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
