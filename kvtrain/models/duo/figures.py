"""What reports show of DuoAttention: the gate of every head."""

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kvtrain.metrics import Rows
from kvtrain.models.duo.gates import HEAD_GATES
from kvtrain.models.figures import Fact, Figures, TableFigure
from kvtrain.plotting.canvas import VERMILLION
from kvtrain.plotting.heads import draw_map, head_map, last_validation, write_numbers


def gate_figure(gates: Rows) -> Figure:
    """Every head's gate at the last validation, those framed that would keep everything.

    Args:
        gates: Rows of ``head_gates.csv``, at least one.
    """
    step, last = last_validation(gates)
    values, full = head_map(last, "gate"), head_map(last, "full")
    title = f"Gate of every head, step {step:,} (framed: keeps everything)"
    figure, axes, image = draw_map(values, title, Normalize(0, 1))
    write_numbers(image, values, "{:.2f}".format)
    for layer, head in np.argwhere(full == 1):
        frame = Rectangle((head - 0.46, layer - 0.44), 0.92, 0.88, fill=False, edgecolor=VERMILLION, linewidth=2.5)
        axes.add_patch(frame)
    figure.colorbar(image, ax=axes, pad=0.04, aspect=6 * figure.get_figheight()).set_label("gate", fontsize=11)
    return figure


FIGURES = Figures(
    drawn=(TableFigure("head_gates", HEAD_GATES, gate_figure),),
    facts=(Fact("Mean gate at the end", "mean_gate", ".3f"),),
)
