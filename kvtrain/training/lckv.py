"""Training with shared keys and values: as for any model, and a look at how far serving is from what trains."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtrain.data.packing import Batch
from kvtrain.kernels.cross_entropy import IGNORE_INDEX
from kvtrain.metrics import MAP_FILE_NAME
from kvtrain.models.lckv import LCKV
from kvtrain.training.base import TrainingModule
from kvtrain.training.metrics import write_rows
from kvtrain.training.pretrain import PretrainModule
from kvtrain.training.retrofit import RetrofitModule


class _SharingModule(TrainingModule):
    """What training with a map adds: the map in the run folder, for reports, and a look at the serving form.

    Logs ``val_serving_gap``: by how much the held-out loss in the serving form is above that in the training form.

    With a finite number of passes the two differ: training iterates over whole rows, serving block by block with
    exact keys and values behind it. The first validation batch is read both ways, each row as one document.
    """

    method: LCKV

    def setup(self, stage: str) -> None:
        """Write ``kv_map.csv``: whose keys and values each layer reads."""
        super().setup(stage)
        if stage == "fit" and self.trainer.is_global_zero:
            keys, values = self.method.maps(self.host_config().num_hidden_layers)
            columns = zip(keys.sources, values.sources, keys.sliding, strict=True)
            rows: list[dict[str, float]] = [
                {"layer": layer, "key_layer": key, "value_layer": value, "sliding": int(sliding)}
                for layer, (key, value, sliding) in enumerate(columns)
            ]
            write_rows(Path(self.trainer.default_root_dir) / MAP_FILE_NAME, rows)

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        super().on_validation_epoch_start()
        self._gap: Tensor | None = None

    def observe_validation(self, batch: Batch, arguments: dict[str, Any]) -> None:
        """Read the first batch in both forms."""
        super().observe_validation(batch, arguments)
        if self._gap is None and not self.method.runs_layers_once(self.host_config()):
            self._gap = serving_gap(self.model, batch["input_ids"], batch["document_ids"] > 0)

    def on_validation_epoch_end(self) -> None:
        """Log the gap with the perplexity."""
        super().on_validation_epoch_end()
        if self._gap is not None:
            self.log("val_serving_gap", self._gap, sync_dist=True)


def serving_gap(model: Any, input_ids: Tensor, valid: Tensor) -> Tensor:
    """Loss in the serving form minus loss in the training form, in nats a token.

    Args:
        model: A retrofitted model in evaluation mode.
        input_ids: ``(B, T)``, every row one document.
        valid: ``(B, T)`` real tokens.
    """
    labels = input_ids.masked_fill(~valid, IGNORE_INDEX)
    told = {"labels": labels, "attention_mask": valid.long(), "skip_logits": True}
    with torch.no_grad():
        served, trained = (model(input_ids, use_cache=use_cache, **told).loss.float() for use_cache in (True, False))
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
