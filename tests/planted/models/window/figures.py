"""What reports show of the window: how many tokens every layer sees, and the loss of its own."""

from kvtrain.models.figures import Fact, Figures, TableFigure
from kvtrain.models.window.config import SEEN
from kvtrain.plotting.canvas import BLUE, canvas


def seen_figure(seen):
    figure, axes = canvas("Tokens that every layer sees", "tokens", "layer")
    axes.bar([row["layer"] for row in seen], [row["tokens"] for row in seen], color=BLUE)
    return figure


FIGURES = Figures(
    drawn=(TableFigure("window_seen", SEEN, seen_figure),),
    facts=(Fact("Pull on the last norm at the end", "norm_pull", ".3f"),),
)
