"""Training with shared keys and values: as for any model, and a look at how far serving is from what trains."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtrain.data.packing import Batch
from kvtrain.kernels.cross_entropy import IGNORE_INDEX
from kvtrain.models.lckv import LCKV
from kvtrain.models.lckv.kv_map import KV_MAP
from kvtrain.training.csv_logger import write_rows
from kvtrain.training.method_module import MethodModule
from kvtrain.training.pretrain import PretrainModule
from kvtrain.training.retrofit import RetrofitModule
from kvtrain.training.strategies.base import traits


class _SharingModule(MethodModule):
    """What training with a map adds: the map in the run folder, for reports, and a look at the serving form.

    Logs ``val_serving_gap``: by how much the held-out loss in the serving form is above that in the training form.

    With a finite number of passes the two differ: training iterates over whole rows, serving block by block with
    exact keys and values behind it. The first validation batch is read both ways, each row as one document.
    """

    method: LCKV

    def setup(self, stage: str) -> None:
        """Complain about the passes before the model is built."""
        super().setup(stage)
        self._check_passes()

    def write_record(self, run: Path) -> None:
        """Write ``kv_map.csv``: whose keys and values each layer reads."""
        keys, values = self.method.maps(self.host_config().num_hidden_layers)
        columns = zip(keys.sources, values.sources, keys.sliding, strict=True)
        rows: list[dict[str, float]] = [
            {"layer": layer, "key_layer": key, "value_layer": value, "sliding": int(sliding)}
            for layer, (key, value, sliding) in enumerate(columns)
        ]
        write_rows(run / KV_MAP.name, rows)

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        super().on_validation_epoch_start()
        self._gap: Tensor | None = None

    def _check_passes(self) -> None:
        """Refuse passes in which some weights would never learn.

        Raises:
            ValueError: With the remedy.
        """
        method, iterates = self.method, not self.method.runs_layers_once(self.host_config())
        if iterates and method.backward_passes == 1 and (method.stale_target or method.passes == 1):
            raise ValueError("with backward_passes=1 some projections get no gradient here; set backward_passes to 2")

    def _compares_forms(self) -> bool:
        """Whether serving differs from training, and ranks that share weights would run the same layers.

        Where ranks share rows nothing is served.
        """
        if traits(self._trainer).context_parallel > 1:
            return False
        same_layers = self.method.prefill_tolerance is None or self.trainer.world_size == 1
        return same_layers and not self.method.runs_layers_once(self.host_config())

    def observe_validation(self, batch: Batch, arguments: dict[str, Any], output: Any) -> None:
        """Read the first batch in both forms."""
        super().observe_validation(batch, arguments, output)
        if self._gap is None and self._compares_forms():
            valid = batch["document_ids"] > 0
            gap, targets = serving_gap(self.model, batch["input_ids"], valid), valid[:, 1:].sum()
            self._gap = torch.stack([gap * targets, targets.float()])

    def on_validation_epoch_end(self) -> None:
        """Log the gap over all ranks with the perplexity."""
        super().on_validation_epoch_end()
        if self._gap is not None:
            total, targets = self.trainer.strategy.reduce(self._gap, reduce_op="sum")
            self.log("val_serving_gap", total / targets)


def serving_gap(model: Any, input_ids: Tensor, valid: Tensor) -> Tensor:
    """Loss in the serving form minus loss in the training form, in nats a token.

    Args:
        model: A retrofitted model in evaluation mode.
        input_ids: ``(B, T)``, every row one document.
        valid: ``(B, T)`` real tokens, behind which padding may stand; where there are none, the gap is 0.
    """
    labels = input_ids.masked_fill(~valid, IGNORE_INDEX)
    # Padding is read with the rest, which it cannot change: ranks that share parameters must run the same blocks.
    kwargs = {"labels": labels, "num_items_in_batch": valid[:, 1:].sum().clamp(min=1), "skip_logits": True}
    with torch.no_grad():
        served, trained = (model(input_ids, use_cache=use_cache, **kwargs).loss.float() for use_cache in (True, False))
    gap: Tensor = served - trained
    return gap


class LCKVModule(_SharingModule, RetrofitModule):
    """Puts a map into a pretrained host and trains on.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: The map.
        **training: See ``RetrofitModule`` and ``TrainingModule``.
    """

    def __init__(self, base: str, method: LCKV | None = None, **training: Any) -> None:
        super().__init__(base=base, method=method or LCKV(), **training)


class LCKVPretrainModule(_SharingModule, PretrainModule):
    """Trains a host with a map from nothing, as the paper does.

    Args:
        model_config: HF configuration file of the host.
        method: The map.
        **training: See ``PretrainModule`` and ``TrainingModule``.
    """

    def __init__(self, model_config: str, method: LCKV | None = None, **training: Any) -> None:
        super().__init__(model_config=model_config, method=method or LCKV(), **training)
