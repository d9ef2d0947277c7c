"""What is made of the facts: a line each, and what to do where it is bad news."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kvtrain.training.estimate import Estimate, readable
from kvtrain.training.preflight.facts import AllReduce, Facts, Folder
from kvtrain.training.preflight.world import World

_CHECKPOINTS = 2  # that must fit; while one is written there may be four


class Finding(NamedTuple):
    """A line of the table.

    Attributes:
        subject: What was looked at.
        found: What it is.
        remedy: What to do; empty where it is well.
    """

    subject: str
    found: str
    remedy: str = ""


class Asked(NamedTuple):
    """What a recipe asks of a launch.

    Attributes:
        nodes: ``trainer.num_nodes``.
        devices: ``trainer.devices`` as a number.
        backend: ``gloo`` on CPUs, ``nccl`` on GPUs.
        run: The run folder.
    """

    nodes: int
    devices: int
    backend: str
    run: Path


def processes(asked: Asked, world: World, facts: list[Facts]) -> Finding:
    """Whether as many ranks run as the recipe trains with."""
    wanted, nodes = asked.nodes * asked.devices, len({fact.node for fact in facts})
    recipe = f"the recipe has {_count(asked.nodes, 'node')} of {_count(asked.devices, 'device')}"
    if not world.launcher:
        found = f"one, without a launcher; {recipe}"
        if asked.nodes > 1:
            return Finding("processes", found, "start it with a launcher: kvtrain recipes --launchers lists them")
        return Finding("processes", found + (", and fit starts the others itself" if wanted > 1 else ""))
    found = f"{world.size} on {_count(nodes, 'node')}, by {world.launcher}; {recipe}"
    if (world.size, nodes) == (wanted, asked.nodes):
        return Finding("processes", found)
    each, rest = divmod(world.size, nodes)
    options = f", or give --trainer.num_nodes {nodes} --trainer.devices {each}" if not rest else ""
    return Finding("processes", found, f"start {_count(wanted, 'process')} on {_count(asked.nodes, 'node')}{options}")


def nodes(facts: list[Facts]) -> list[Finding]:
    """A line for each node: its ranks, where they are reached, and whether each has a device."""
    found = []
    for node in sorted({fact.node for fact in facts}):
        ranks = [fact for fact in facts if fact.node == node]
        first, lacking = ranks[0], [fact.rank for fact in ranks if not fact.device]
        interface = f" ({first.interface})" if first.interface else ""
        where = f"{first.host} at {first.address}{interface}, {first.device or 'no device'}"
        remedy = f"no GPU for {_ranks(lacking)}: start as many processes as the node has GPUs" if lacking else ""
        found.append(Finding(f"node {node}", f"{_ranks(fact.rank for fact in ranks)} on {where}", remedy))
    return found


def addresses(asked: Asked, facts: list[Facts]) -> Finding | None:
    """Ranks on several nodes that would announce an address which leads back to themselves; None if all is well."""
    lost = [fact for fact in facts if fact.address.startswith("127.")]
    if not lost or len({fact.node for fact in facts}) == 1:
        return None
    variable = "GLOO_SOCKET_IFNAME" if asked.backend == "gloo" else "NCCL_SOCKET_IFNAME"
    names = {fact.node: fact.route or "its interface" for fact in facts}
    if len(set(names.values())) == 1:
        setting = f"export {variable}={names[lost[0].node]} on all nodes"
    else:
        setting = f"export {variable} on each node: " + ", ".join(f"{name} on node {n}" for n, name in names.items())
    found = f"{_ranks(fact.rank for fact in lost)} of several nodes would be looked for at {lost[0].address}"
    return Finding("addresses", found, f"{setting} (for the deepspeed launcher: a line in .deepspeed_env)")


def all_reduce(measured: AllReduce, size: int, gradients: int) -> Finding:
    """How fast ranks exchange gradients.

    Args:
        measured: The figures.
        size: Number of ranks.
        gradients: Bytes of a step's gradients; 0 where they are not known.
    """
    if measured.error:
        return Finding(
            "all-reduce",
            f"failed: {measured.error}",
            "open all ports between the nodes, and set GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (GPU) to the "
            "interface on which they reach each other; NCCL_DEBUG=INFO says what NCCL tries",
        )
    speed = 2 * (size - 1) / size * measured.size / measured.seconds  # what each rank sends, in bytes a second
    figures = f"{measured.latency * 1e3:.2f} ms at least; {readable(measured.size)} in {measured.seconds * 1e3:.1f} ms"
    step = f"; a step's gradients: {gradients / measured.size * measured.seconds:.2g} s" if gradients else ""
    return Finding("all-reduce", f"{figures}, {readable(speed)}/s a rank{step}")


def run_folder(folder: Folder, facts: list[Facts]) -> Finding:
    """Whether all ranks share it."""
    run = facts[0].run
    if folder.error:
        return Finding("run folder", folder.error, "choose another --trainer.default_root_dir")
    if not folder.apart:
        who = "written and read by all ranks" if len(facts) > 1 else "can be written"
        return Finding("run folder", f"{run}: {who}")
    elsewhere = sorted({fact.run for fact in facts if fact.rank in folder.apart} - {run})
    found = f"{run}: {_ranks(folder.apart)} do not see what rank 0 writes there, or may not write"
    return Finding(
        "run folder",
        found + (f" (there it is {elsewhere[0]})" if elsewhere else ""),
        "give --trainer.default_root_dir a path on a file system that all nodes mount and this user may write",
    )


def disk(free: int, checkpoint: int) -> Finding:
    """Whether two checkpoints fit."""
    need = _CHECKPOINTS * checkpoint
    found = f"{readable(free)} free; a checkpoint has {readable(checkpoint)}, up to four exist at a time"
    remedy = f"make room for {readable(need)} at least, or choose another --trainer.default_root_dir"
    return Finding("disk", found, remedy if free < need else "")


def memory(figures: Estimate, facts: list[Facts], asked: Asked) -> Finding:
    """Whether what a rank holds fits into what it has."""
    share = {fact.node: 0 for fact in facts}
    for fact in facts:
        share[fact.node] += 1
    processes_a_node = asked.devices if len(facts) == 1 else 0  # which fit will start
    room = min(
        fact.memory // (max(share[fact.node], processes_a_node) if asked.backend == "gloo" else 1) for fact in facts
    )
    found = f"{readable(figures.peak_bytes)} of tensors a rank, {readable(room)} there for it"
    if figures.peak_bytes <= room or not room:
        return Finding("memory", found)
    return Finding(
        "memory",
        found,
        "lower --data.batch_size or --data.sequence_length, recompute layers "
        "(--model.activation_checkpointing true), or shard more (kvtrain estimate --strategy zero3)",
    )


def versions(facts: list[Facts]) -> Finding:
    """Whether all ranks run the same code."""
    first = facts[0].versions
    odd = [fact for fact in facts if fact.versions != first]
    if not odd:
        return Finding(
            "versions", ", ".join(f"{name} {version}" for name, version in first.items() if version != "none")
        )
    name = next(name for name in first if odd[0].versions.get(name) != first[name])
    found = f"rank 0 has {name} {first[name]}, {_ranks(fact.rank for fact in odd)} {odd[0].versions.get(name)}"
    return Finding("versions", found, "install the same packages on all nodes (constraints.txt names a tested set)")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def _ranks(numbers: Iterable[int]) -> str:
    """``ranks 0-3, 6``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'' if sum(map(len, runs)) == 1 else 's'} {text}"
