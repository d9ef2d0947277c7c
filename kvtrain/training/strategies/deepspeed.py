"""DeepSpeed's ZeRO under Lightning, with what has to be mended for it.

ZeRO keeps a float32 master copy beside the working one, whole or in parts, and overwrites the working copy from it at
every step: who writes a parameter has to change both, or the next step undoes what was done.
"""

import importlib.util
import json
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from kvtrain.durable import naming, writing
from kvtrain.errors import UsageError
from kvtrain.models.zero import CHECKPOINT_TAG, ZeROCheckpoint, is_zero, read_shard
from kvtrain.recipes import find_config
from kvtrain.training.strategies.base import (
    SAME_STRATEGY,
    BuildsModel,
    BuildsTeacher,
    StrategyTraits,
)
from kvtrain.training.strategies.partitions import half_precision, partition, reads_partitions
from kvtrain.training.strategies.zero_parameters import gathered

DEEPSPEED_INSTALLED = importlib.util.find_spec("deepspeed") is not None
_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# What the trainer, the module or the recipe decides; two places to say it would be one too many.
_OFFLOADED = ("offload_optimizer", "offload_param")
_NOT_OURS = ("optimizer", "scheduler", "gradient_accumulation_steps", "gradient_clipping")
_SHARDED = ("state_dict", "optimizer_states")  # of a checkpoint; DeepSpeed writes its own


class DeepSpeedZeRO(StrategyTraits, DeepSpeedStrategy):
    """ZeRO stage 2 or 3 from a DeepSpeed configuration file, on CUDA devices or, for tests, on the CPU.

    Differs from Lightning's strategy in that accumulated gradients are divided by their number once and not
    twice (AdamW hides that, clipping does not), that loaders without a batch size work, and that the CPU works.
    Without DeepSpeed a recipe that names it can still be read, listed and estimated.

    Args:
        config: DeepSpeed's configuration, a file or its content. The optimizer, accumulation and clipping
            come from the recipe.
        timeout_minutes: How long a rank waits for the others before it gives up; ``trainer.timeout_minutes`` wins
            where both are given.

    Raises:
        UsageError: The file cannot be read, or says what the strategy cannot honour.
    """

    drops_steps = True
    scaled_precisions = ("16-mixed", "16-true")

    def __init__(self, config: str | dict[str, Any], timeout_minutes: int = 30) -> None:
        settings = read_config(config)
        if DEEPSPEED_INSTALLED:
            super().__init__(config=settings, timeout=timedelta(minutes=timeout_minutes))
        else:  # enough for a recipe to be read; a trainer that takes it refuses
            super(DeepSpeedStrategy, self).__init__()

    def _configure_launcher(self) -> None:
        """The first thing that a trainer asks of its strategy.

        Raises:
            UsageError: DeepSpeed is not installed.
        """
        if not DEEPSPEED_INSTALLED:
            raise UsageError(
                "this recipe trains with DeepSpeed, which is not installed: pip install kvtrain[deepspeed]"
            )
        super()._configure_launcher()

    @property
    def root_device(self) -> torch.device:
        """This process's device, with the index that DeepSpeed wants even of a CPU."""
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """As Lightning's, which would refuse the CPU."""
        if isinstance(self.accelerator, CPUAccelerator):
            self.accelerator.setup_device(self.root_device)
            self.setup_distributed()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """As Lightning's, which compares device indices with ranks: CPU processes share one device."""
        if self.root_device.type != "cpu":
            super().setup_distributed()
            return
        import deepspeed

        # An operation that shares memory between CPU processes, compiled on first use; ZeRO does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """None: DeepSpeed's own would partition parameters before transformers has loaded values into them."""
        self._init_config_if_needed()
        yield

    def build_model(self, module: BuildsModel) -> Any:
        """See ``StrategyTraits``; under ZeRO-3 on the meta device, then partitioned and filled in one go.

        What has no files to be read from is built whole by each rank, for DeepSpeed to partition.
        """
        weights = module.pretrained_weights() if self._reads_partitions else None
        if weights is None:
            return super().build_model(module)
        model = module.build_meta_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(module.is_trainable(name))
        partition(model, weights, self._settings)
        return model

    def build_teacher(self, module: BuildsTeacher) -> Any:
        """See ``StrategyTraits``; partitioned as the model is, in an engine of its own, in the type of its weights."""
        if not self._reads_partitions:
            return super().build_teacher(module)
        import deepspeed

        teacher: Any = module.build_meta_teacher().requires_grad_(False).eval()
        config = {key: self._settings[key] for key in ("train_micro_batch_size_per_gpu", "zero_optimization")}
        partition(teacher, module.teacher_weights(), config)
        args = Namespace(device_rank=self.root_device.index)
        deepspeed.initialize(args, model=teacher, config=config, model_parameters=[], dist_init_required=False)
        self._announce_weight(teacher.get_output_embeddings().weight)
        return teacher

    @property
    def _settings(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        return self.config

    @property
    def _reads_partitions(self) -> bool:
        return reads_partitions(self._settings["zero_optimization"])

    def setup(self, trainer: pl.Trainer) -> None:
        """Hand the model to DeepSpeed, which gives types to parameters, but to none beside partitioned ones."""
        half, module = half_precision(self._settings), self.lightning_module
        for parameter in module.parameters() if half and self.zero_stage_3 else ():  # type: ignore[union-attr]
            parameter.data = parameter.data.to(half)
        super().setup(trainer)
        if self.zero_stage_3:
            model: Any = self.lightning_module.model  # type: ignore[union-attr]
            self._announce_weight(model.get_output_embeddings().weight)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """As Lightning's, which would take all hooks from the model, those that it needs to run among them."""
        before = [(module, name, dict(getattr(module, name))) for module in model.modules() for name in _FORWARD_HOOKS]
        super()._initialize_deepspeed_inference(model)
        for module, name, hooks in before:
            ours = {key: hook for key, hook in hooks.items() if not _is_deepspeeds(hook)}
            setattr(module, name, OrderedDict({**ours, **getattr(module, name)}))

    def _announce_weight(self, weight: nn.Parameter) -> None:
        """Have ZeRO-3 gather an output embedding for the model itself: the loss reads its weight directly."""
        import deepspeed

        deepspeed.zero.register_external_parameter(self.lightning_module.model, weight)  # type: ignore[union-attr]

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the accumulated batches already; DeepSpeed would do so again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def parameter_sizes(self, model: nn.Module) -> list[tuple[int, bool]]:
        """See ``StrategyTraits``; under ZeRO-3 a parameter is empty while nobody uses it."""
        parameters = list(model.parameters())
        return [(getattr(each, "ds_numel", each.numel()), each.requires_grad) for each in parameters]

    def watch_overflow(self) -> None:
        """Turn ZeRO-2's check on, which otherwise is that of the norm, if it is computed; ZeRO-3 always checks."""
        self._engine.optimizer.check_grad_overflow = True

    def step_applied(self) -> bool:
        """See ``StrategyTraits``."""
        return bool(self._engine.was_step_applied())

    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> None:
        """None: DeepSpeed keeps gradients to itself."""

    def last_gradient_norm(self) -> Tensor | None:
        """See ``StrategyTraits``."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    @property
    def _engine(self) -> Any:
        return self.model

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As Lightning's; files are opened here, or the system's errors would be lost.

        Raises:
            OSError: This rank could not write; the error names the file, or the folder.
        """
        path, faults = Path(self.broadcast(filepath)), list[OSError]()
        self._write_through(faults)
        with naming(path):
            self._engine.save_checkpoint(
                path,
                client_state={name: value for name, value in checkpoint.items() if name not in _SHARDED},
                tag=CHECKPOINT_TAG,
                save_latest=False,
                exclude_frozen_parameters=self.exclude_frozen_parameters,
            )
            if faults:
                raise faults[0]
            if self.is_global_zero:
                (path / "latest").write_text(CHECKPOINT_TAG, encoding="utf-8")

    def _write_through(self, faults: list[OSError]) -> None:
        """Have errors of the system kept: DeepSpeed's ranks wait for each other several times before they are through.

        Args:
            faults: Takes them.
        """
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        engine = self._engine
        writer = engine.checkpoint_engine

        def save(state_dict: Any, path: str) -> None:
            with _kept(faults), writing(Path(path)) as file:
                TorchCheckpointEngine.save(writer, state_dict, file)

        def makedirs(path: str, exist_ok: bool = False) -> None:
            with _kept(faults):
                Path(path).mkdir(parents=True, exist_ok=exist_ok)

        def copy_scripts(folder: str) -> None:
            with _kept(faults), naming(Path(folder)):
                type(engine)._copy_recovery_script(engine, folder)

        if type(writer) is TorchCheckpointEngine:  # DeepSpeed's other writers want names
            writer.save, writer.makedirs, engine._copy_recovery_script = save, makedirs, copy_scripts

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, but no shard may hold more than plain values, and none of their code is run.

        Raises:
            UsageError: It was written under another strategy or by another number of ranks, or cannot be read.
        """
        path, module = Path(checkpoint_path), self.lightning_module
        assert module is not None
        fits = module.trainer.state.fn == TrainerFn.FITTING
        self.require_checkpoint(path, fits)
        if not fits:
            return self._load_weights(ZeROCheckpoint(path), module)
        self._engine.checkpoint_engine.load = read_shard
        state: dict[str, Any] = super().load_checkpoint(path)
        return state

    @torch.no_grad()
    def _load_weights(self, checkpoint: ZeROCheckpoint, module: pl.LightningModule) -> dict[str, Any]:
        """Weights alone, one at a time; DeepSpeed itself cannot read a checkpoint without an optimizer."""
        stored = {*checkpoint.names()}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name in stored:
                with gathered(tensor):
                    tensor.data.copy_(checkpoint.read(name))
        return {key: value for key, value in checkpoint.model_states[0].items() if key != "module"}

    def require_checkpoint(self, path: Path, fits: bool = True) -> None:
        """See ``StrategyTraits``; of as many ranks, too, where training goes on.

        Raises:
            UsageError: It is another strategy's, or of another number of ranks.
        """
        if not is_zero(path):
            raise UsageError(f"{path}: not written by DeepSpeed; {SAME_STRATEGY}")
        checkpoint = ZeROCheckpoint(path)
        stage = 3 if self.zero_stage_3 else 2
        if fits and checkpoint.stage != stage:
            raise UsageError(f"{path}: written under ZeRO-{checkpoint.stage}, not {stage}; {SAME_STRATEGY}")
        if fits and checkpoint.ranks != self.world_size:
            raise UsageError(
                f"{path}: written by {checkpoint.ranks} ranks, and here are {self.world_size}; ZeRO goes on with as "
                "many as before: set trainer.devices and trainer.num_nodes so (fsdp2 goes on with any number)"
            )


@contextmanager
def _kept(faults: list[OSError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        faults.append(error)


def _is_deepspeeds(hook: Any) -> bool:
    return getattr(hook, "__module__", "").partition(".")[0] == "deepspeed"


def read_config(config: str | dict[str, Any]) -> dict[str, Any]:
    """Read and check a DeepSpeed configuration.

    Args:
        config: A JSON file, as a recipe names it, or its content.

    Raises:
        UsageError: It cannot be read, or says what ``DeepSpeedZeRO`` cannot honour.
    """
    name = find_config(config) if isinstance(config, str) else "DeepSpeed configuration"
    settings = _read_json(name) if isinstance(config, str) else dict(config)
    taken = [key for key in _NOT_OURS if key in settings]
    if taken:
        raise UsageError(f"{name}: leave out {', '.join(taken)}; the recipe's trainer and model say it")
    zero = settings.get("zero_optimization", {})
    for key, part in {"zero_optimization": zero, **(zero if isinstance(zero, dict) else {})}.items():
        if key in ("zero_optimization", *_OFFLOADED) and not isinstance(part, dict):
            raise UsageError(f"{name}: {key} must be an object, not {part!r}")
    if zero.get("stage") not in (2, 3):
        raise UsageError(f"{name}: zero_optimization.stage must be 2 or 3, not {zero.get('stage')}")
    for part in _OFFLOADED:
        if zero.get(part, {}).get("device", "none") not in ("none", "cpu"):
            raise UsageError(f"{name}: zero_optimization.{part}.device must be cpu or none")
    # Of DeepSpeed's own speed figures alone; Lightning would look for it in the loader, which has none.
    settings.setdefault("train_micro_batch_size_per_gpu", 1)
    return settings


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"no DeepSpeed configuration at '{path}'") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a DeepSpeed configuration is a JSON object")
    return content
