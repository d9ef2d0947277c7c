"""What stands in a figure."""

from matplotlib.figure import Figure


def line(figure: Figure, label: str) -> tuple[list[float], list[float]]:
    """Coordinates of the line with this label."""
    (found,) = [drawn for drawn in figure.axes[0].lines if drawn.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def labels(figure: Figure) -> list[str]:
    """What its legend says."""
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
