"""``kvtrain fit`` and ``kvtrain validate``: Lightning's CLI with our defaults, run folders and short errors."""

import contextlib
import functools
import itertools
import logging
import operator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import lightning.pytorch as pl
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from kvtrain import run_folder, run_lock, strict_yaml
from kvtrain.data.chat.module import ChatDataModule
from kvtrain.data.listops import ListOpsDataModule
from kvtrain.data.masking import MaskedDataModule
from kvtrain.data.module import DataModule, PackedDataModule
from kvtrain.data.recall import RecallDataModule, RetrievalDataModule
from kvtrain.errors import UsageError, causes
from kvtrain.logging_setup import configure_logging
from kvtrain.recipes import read_recipe_file
from kvtrain.renamed import OLD_NAMES, option_with_new_name, with_new_names
from kvtrain.stop_signals import STOPPED_EXIT_CODE
from kvtrain.training import messages, training_modules
from kvtrain.training.base import TrainingModule
from kvtrain.training.callbacks.run_summary import RunRecord
from kvtrain.training.ranks import report_end
from kvtrain.training.refusals import refusals
from kvtrain.training.resume import find_checkpoint, require_readable
from kvtrain.training.strategies.base import traits
from kvtrain.training.trainer import DEFAULT_RUN, KVTrainer, check_numbers, check_strategy

HELP_ALL = "--help-all"
logger = logging.getLogger("kvtrain")
# Imported here, so that a recipe may name them without their modules.
DATA_MODULES = (
    PackedDataModule,
    ChatDataModule,
    MaskedDataModule,
    RecallDataModule,
    RetrievalDataModule,
    ListOpsDataModule,
)
_CONFIG_FLAGS = ("--config", "-c")
# Of Trainer.fit and Trainer.validate: given by us, or of no use on a command line.
_NOT_OPTIONS = {"model", "datamodule", "train_dataloaders", "val_dataloaders", "dataloaders", "weights_only", "verbose"}

_STRICT = "strict"  # our name for the parser's own reader of YAML behind our checks


class _Values(dict[str, Any]):
    """What texts stand for; the parser asks for each plain word again and again, and those are kept."""

    def __missing__(self, text: str) -> Any:
        strict_yaml.check(text)
        value = get_loader("yaml")(text)
        if isinstance(value, (dict, list)):  # the parser writes into these
            return with_new_names(value) if OLD_NAMES.search(text) else value
        return self.setdefault(text, value)


set_loader(_STRICT, functools.partial(operator.getitem, _Values()), (yaml.YAMLError,))


class RecipeParser(LightningArgumentParser):
    """Loads no YAML that is not looked over, and raises its complaints, causes included, so that they fit a line."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"parser_mode": _STRICT, **settings})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage and leaving.

        Raises:
            UsageError: Always, unless an outer parser wants its own kind of error.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        raise UsageError("\n".join(map(str, causes(ex))) or message) from ex


class RecipeCLI(LightningCLI):
    """Reads a recipe and runs one command on it.

    Args:
        arguments: The command line, without the command.

    Raises:
        UsageError: The command line or the recipe is wrong.
    """

    command: ClassVar[str]

    def __init__(self, arguments: list[str]) -> None:
        training_modules()  # imports them all: a recipe may name a class without its module
        self.arguments = [option_with_new_name(word) if OLD_NAMES.search(word) else word for word in arguments]
        super().__init__(
            TrainingModule,
            DataModule,
            save_config_callback=None,
            trainer_class=KVTrainer,
            trainer_defaults={"default_root_dir": DEFAULT_RUN},
            seed_everything_default=0,
            parser_class=RecipeParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[self.command, *self.arguments],
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # checkpoints hold no hyper-parameters, so that they load weights_only
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Packed text unless a recipe says otherwise: then its settings need no class."""
        chosen = f"{PackedDataModule.__module__}.{PackedDataModule.__qualname__}"
        parser.set_defaults({"data": {"class_path": chosen}})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """One parser alone: each costs time to build."""
        return {self.command: _NOT_OPTIONS}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and explain what is wrong in a line."""
        messages.check_values(self.arguments)
        texts = {path: Path(path).read_text(encoding="utf-8") for path in _recipes_in(self.arguments)}
        try:
            self.config = parser.parse_args(args)
            self._check_seed()
        except UsageError as error:
            places = list(messages.places_on_command_line(self.arguments))
            for path, text in texts.items():
                places.extend(messages.places_in_file(path, text))
            raise UsageError(messages.explain(str(error), places, self.vocabulary())) from error

    def _check_seed(self) -> None:
        seed = self.config[self.command]["seed_everything"]
        if not isinstance(seed, bool) and not 0 <= seed < 1 << 32:
            raise UsageError(f"seed_everything must be from 0 to {(1 << 32) - 1}, not {seed}")

    def instantiate_classes(self) -> None:
        """Build trainer and modules; what they refuse comes out of the parser's wrapping.

        Raises:
            UsageError: One of them refused its settings.
        """
        with refusals():
            super().instantiate_classes()

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would load the checkpoint to look for hyper-parameters, and there are none."""

    def vocabulary(self) -> messages.Vocabulary:
        """Everything that may be set, and every class that may be chosen."""
        parser = self._subcommand_parsers[self.command]
        options = {string.lstrip("-") for action in parser._actions for string in action.option_strings}
        modules = training_modules()
        for chosen in modules:
            options |= messages.setting_names(chosen, "model")
        sources = [
            *DATA_MODULES,
            *(other for other in messages.concrete_subclasses(DataModule) if other not in DATA_MODULES),
        ]
        for chosen in sources:
            options |= messages.setting_names(chosen, "data")
        short = [chosen.__name__ for chosen in modules]
        full = [f"kvtrain.training.{name}" for name in short]
        return messages.Vocabulary(sorted(options), [*short, *full, *(chosen.__name__ for chosen in sources)])

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self._get(self.config, "trainer")["default_root_dir"])

    def resolved_recipe(self) -> str:
        """The whole recipe as YAML, every default written out, without what belongs to this call alone."""
        config = self.config[self.command].clone()
        config["ckpt_path"] = None
        return str(self._subcommand_parsers[self.command].dump(config, skip_unset=False, format="yaml"))


def _recipes_in(arguments: list[str]) -> list[str]:
    """Paths of the recipes on a command line, each checked to be readable YAML."""
    paths = [after for flag, after in itertools.pairwise(arguments) if flag in _CONFIG_FLAGS]
    for word in arguments:
        flag, equals, value = word.partition("=")
        if equals and flag in _CONFIG_FLAGS:
            paths.append(value)
    for path in paths:
        read_recipe_file(path)
    return paths


class FitCLI(RecipeCLI):
    """``kvtrain fit``."""

    command = "fit"

    def before_instantiate_classes(self) -> None:
        """Make sure that there is a place for the run folder."""
        run_folder.require_place(self.run)

    def _run_subcommand(self, subcommand: str) -> None:
        """Hold the run folder, for all ranks, from before its checkpoints are looked at until the run has ended."""
        if self.trainer.is_global_zero and not (self.run / run_lock.FILE_NAME).exists():
            run_folder.remove_unfinished(self.run)  # which may leave no room for the lock itself
        with run_lock.run_lock(self.run) if self.trainer.is_global_zero else contextlib.nullcontext():
            super()._run_subcommand(subcommand)

    def _find_checkpoint(self) -> None:
        """Find the checkpoint to go on from, or make sure that the folder is free."""
        settings = self.config_init[self.command]
        resumed, self.faults = find_checkpoint(self.run, settings["ckpt_path"])
        if resumed is None or resumed.parent.resolve() != (self.run / run_folder.CHECKPOINTS).resolve():
            run_folder.refuse_second_run(self.run)
        if resumed and run_folder.step_of(resumed) > self.trainer.max_steps > 0:
            raise UsageError(
                f"{resumed} lies beyond trainer.max_steps, {self.trainer.max_steps}; raise that, or give an earlier one"
            )
        settings["ckpt_path"] = str(resumed) if resumed else None
        if self.trainer.is_global_zero:
            run_folder.remove_unfinished(self.run)

    def before_fit(self) -> None:
        """Find the checkpoint, compare the recipe with the run's own, and have it written when training begins.

        Raises:
            ValueError: The module has no phases for so many steps, or there is no model to train.
        """
        self._find_checkpoint()
        if path := self.config_init[self.command]["ckpt_path"]:
            traits(self.trainer).require_checkpoint(Path(path))
        self.model.check_steps(self.trainer.max_steps)
        self.model.check_model()
        require_vocabulary(self.datamodule, self.model)
        recipe, resumes = self.resolved_recipe(), self.config_init[self.command]["ckpt_path"] is not None
        if resumes and self.trainer.is_global_zero:
            self._warn_of_changes(recipe)
        self.record = RunRecord(self.run, recipe, resumes=resumes, damaged=list(self.faults))
        self.trainer.callbacks.insert(0, self.record)  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        """Say where it ended."""
        logger.info("%s: %d steps of %d done", self.run, self.trainer.global_step, self.trainer.max_steps)

    def _warn_of_changes(self, recipe: str) -> None:
        old, new = run_folder.read_config(self.run), run_folder.parse_config(recipe)
        keys = [key for key in ("model", "data") if old]
        found = run_folder.first_difference({k: old.get(k) for k in keys}, {k: new.get(k) for k in keys})
        if found:
            logger.warning("the recipe differs from the one this run was begun with, first in '%s'", found)

    def fit(self, model: TrainingModule, **settings: Any) -> None:
        """Train.

        Raises:
            KeyboardInterrupt: With a hint how to go on.
            SystemExit: 143 after a signal that asks to stop.
        """
        try:
            with refusals(until=lambda: self.record.begun):
                self.trainer.fit(model, weights_only=True, **settings)
        except SIGTERMException as stop:
            raise SystemExit(STOPPED_EXIT_CODE) from stop
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes exit code 1 of it
                raise KeyboardInterrupt(self._interruption()) from None
            raise
        except Exception as error:
            if self.trainer.world_size > 1 and self.record.begun:
                report_end(self.trainer, error)
            raise

    def _interruption(self) -> str:
        last = run_folder.last_checkpoint(self.run)
        saved = f"the last checkpoint is {last.name}" if last else "nothing is saved yet"
        return (
            f"interrupted at step {self.trainer.global_step}, {saved}; "
            "continue with the same command and --ckpt_path last"
        )


def require_vocabulary(data: DataModule, module: TrainingModule) -> None:
    """Make sure, before anything is read, that a model knows all tokens of its data.

    Raises:
        UsageError: It does not.
    """
    highest, vocabulary = data.highest_id(), module.vocab_size()
    if highest is not None and vocabulary is not None and highest >= vocabulary:
        raise UsageError(
            f"the data has token ids up to {highest:,} and the model a vocabulary of {vocabulary:,}; "
            "set data.tokenizer, and a mask token, to what the model knows"
        )


class ValidateCLI(RecipeCLI):
    """``kvtrain validate``: writes nothing into the run folder."""

    command = "validate"

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint."""
        settings = self.config[self.command]
        if not settings["ckpt_path"]:
            return
        checkpoint = run_folder.resolve_checkpoint(self.run, settings["ckpt_path"])
        if checkpoint is None:
            raise UsageError(f"{self.run} holds no checkpoint")
        require_readable(checkpoint)
        settings["ckpt_path"] = str(checkpoint)

    def instantiate_trainer(self, **settings: Any) -> pl.Trainer:
        """Without loggers: the run's metrics are not ours to change.

        Raises:
            UsageError: No batch would be measured.
        """
        if self.config_init[self.command]["trainer"]["limit_val_batches"] == 0:
            raise UsageError("trainer.limit_val_batches is 0, which measures nothing; leave it out")
        return super().instantiate_trainer(**{**settings, "logger": False})

    def validate(self, model: TrainingModule, **settings: Any) -> None:
        """Measure, and print the figures in a line."""
        if path := settings.get("ckpt_path"):
            traits(self.trainer).require_checkpoint(Path(path), fits=False)
        with refusals():
            (figures,) = self.trainer.validate(model, weights_only=True, verbose=False, **settings)
        if self.trainer.is_global_zero:
            print("  ".join(f"{name} {value:.5g}" for name, value in figures.items()))


class ReadCLI(FitCLI):
    """Builds the modules of a recipe and runs nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing: no run folder is touched."""

    def instantiate_trainer(self, **settings: Any) -> None:  # type: ignore[override]
        """None: the recipe's hardware need not be here, but its numbers and its strategy must make sense."""
        asked = self.config_init[self.command]["trainer"]
        check_numbers(asked)
        check_strategy(asked["strategy"])

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


class ReadRecipe(NamedTuple):
    """A recipe's modules, built, and its trainer's settings."""

    module: TrainingModule
    data: DataModule
    trainer: dict[str, Any]


def read_recipe(arguments: list[str]) -> ReadRecipe:
    """Build the modules that a command line and its recipe describe; no weights, no data, no trainer.

    Args:
        arguments: Such as ``["--config", "recipes/tiny/dmc.yaml", "--data.batch_size", "4"]``.

    Raises:
        UsageError: The command line or the recipe is wrong.
    """
    configure_logging()
    cli = ReadCLI(arguments)
    return ReadRecipe(cli.model, cli.datamodule, cli.config["fit"]["trainer"].as_dict())


def main(command: str, arguments: list[str]) -> None:
    """Run ``fit`` or ``validate``.

    Args:
        command: Which.
        arguments: The rest of the command line.

    Raises:
        UsageError: The command line or the recipe is wrong.
    """
    configure_logging()
    chosen = {"fit": FitCLI, "validate": ValidateCLI}[command]
    chosen(["--help" if word == HELP_ALL else word for word in arguments])
