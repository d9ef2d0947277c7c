"""Training with the window."""

from typing import Any

from kvtrain.models.window import Window
from kvtrain.models.window.config import SEEN
from kvtrain.training.csv_logger import write_rows
from kvtrain.training.retrofit import RetrofitModule


class WindowModule(RetrofitModule):
    """Narrows the view of a pretrained host and trains on.

    Args:
        base: Folder, Hub id or ``kvtrain:tiny``.
        method: The window.
        norm_weight: Of a loss on the final norm's weights, which stands for a loss of the method's own.
        **training: See ``RetrofitModule``.
    """

    def __init__(self, base: str, method: Window | None = None, norm_weight: float = 0.1, **training: Any) -> None:
        super().__init__(base, method or Window(), **training)
        self.norm_weight = norm_weight

    def write_record(self, run):
        tokens, layers = self.method.sink + self.method.recent, self.host_config().num_hidden_layers
        write_rows(run / SEEN.name, [{"layer": layer, "tokens": tokens} for layer in range(layers)])

    def extra_loss(self, batch, arguments):
        pull = self.model.model.norm.weight.square().mean()
        self.log("norm_pull", pull.detach())
        return self.norm_weight * pull
