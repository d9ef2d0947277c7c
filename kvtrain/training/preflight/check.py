"""The order in which a launch is looked over."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvtrain.data.picture import Piece
from kvtrain.errors import in_one_line, is_mistake
from kvtrain.training.cli import ReadRecipe, read_recipe
from kvtrain.training.estimate import Estimate, estimate_recipe
from kvtrain.training.preflight import verdicts
from kvtrain.training.preflight.facts import (
    AllReduce,
    Facts,
    Folder,
    as_facts,
    gather_facts,
    time_all_reduce,
    try_folder,
)
from kvtrain.training.preflight.meeting import Meeting
from kvtrain.training.preflight.trial import Trial, not_tried, try_batch
from kvtrain.training.preflight.verdicts import Asked, Finding
from kvtrain.training.preflight.world import find_world


class Preflight(NamedTuple):
    """What came of it.

    Attributes:
        rank: Of this process; the first one tells.
        findings: The lines of the table.
        text: What the first row of the first batch says, and what of it is learned; empty where that was not tried.
    """

    rank: int
    findings: list[Finding]
    text: list[Piece]

    @property
    def failed(self) -> bool:
        """Whether anything must be mended first."""
        return any(finding.remedy for finding in self.findings)


@contextmanager
def check_launch(arguments: list[str], timeout: float, try_first: bool = True) -> Iterator[Preflight]:
    """Look a launch over: every process of it calls this. Nothing is left behind but tokenised text in the cache.

    Processes leave together, when the first one is through with the outcome: a launcher ends all with the first that
    leaves with an error.

    Args:
        arguments: A command line of ``kvtrain fit``.
        timeout: Seconds to wait for processes that have not come.
        try_first: Let one process that trains alone read its data and train one micro-batch.

    Raises:
        UsageError: The recipe is wrong, or not all processes came.
    """
    recipe, world = read_recipe(arguments), find_world()
    asked, meeting = asked_of(recipe.trainer), Meeting(world, timeout)
    facts = as_facts(meeting.share("facts", gather_facts(world, asked.run, asked.backend)))
    folder = try_folder(meeting, asked.run)
    measured = None
    if world.size > 1 and not verdicts.addresses(asked, facts) and all(fact.device for fact in facts):
        measured = time_all_reduce(meeting, asked.backend)
    findings: list[Finding] = []
    trial = Trial([], [])
    if world.rank == 0:
        launch = [verdicts.processes(asked, world, facts), *verdicts.nodes(facts), verdicts.addresses(asked, facts)]
        needs = _needs(recipe, asked, facts, folder, measured)
        findings = [finding for finding in (*launch, *needs, verdicts.versions(facts)) if finding]
        if try_first:
            trial = _tried(recipe, max(world.size, asked.nodes * asked.devices))
            findings += trial.findings
    shared = meeting.share("findings", findings)[0]
    yield Preflight(world.rank, [Finding(*finding) for finding in shared], trial.text)
    meeting.close()


def _tried(recipe: ReadRecipe, processes: int) -> Trial:
    reason = not_tried(recipe, processes)
    return Trial([reason], []) if reason else try_batch(recipe)


def _needs(
    recipe: ReadRecipe, asked: Asked, facts: list[Facts], folder: Folder, measured: AllReduce | None
) -> Iterator[Finding]:
    """What the recipe needs, beside what is there."""
    figures, refusal = _estimated(recipe, max(len(facts), asked.nodes * asked.devices))
    if measured:
        yield verdicts.all_reduce(measured, len(facts), figures.gradient_bytes if figures else 0)
    yield verdicts.run_folder(folder, facts)
    if figures is None:
        yield Finding("memory", "no estimate", refusal)
        return
    if not folder.error:
        yield verdicts.disk(folder.free, figures.checkpoint_bytes)
    yield verdicts.memory(figures, facts, asked)


def _estimated(recipe: ReadRecipe, ranks: int) -> tuple[Estimate | None, str]:
    """What the recipe needs, or why that cannot be told."""
    try:
        return estimate_recipe(*recipe, ranks=ranks), ""
    except (OSError, ValueError) as error:
        if not is_mistake(error):
            raise
        return None, in_one_line(error)


def asked_of(trainer: dict[str, Any]) -> Asked:
    """What the trainer's settings ask of a launch."""
    accelerator = trainer.get("accelerator") or "auto"
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    run = Path(trainer["default_root_dir"])
    devices = _number_of(trainer.get("devices") or "auto", on_cpu)
    return Asked(trainer.get("num_nodes") or 1, devices, "gloo" if on_cpu else "nccl", run)


def _number_of(devices: Any, on_cpu: bool) -> int:
    """``8``, ``"8"``, ``[0, 1]``, ``"0,1"``, ``auto`` and ``-1`` as a number of devices, as Lightning reads them."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices).strip()
    if text in ("auto", "-1"):
        return 1 if on_cpu else max(1, torch.cuda.device_count())
    return len([part for part in text.split(",") if part]) if "," in text else int(text)
