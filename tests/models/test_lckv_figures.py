"""The picture of a map shows who reads whom."""

from matplotlib.figure import Figure

from kvtrain.models.lckv.figures import map_figure
from kvtrain.plotting.canvas import BLUE, GREY, VERMILLION


def map_rows(keys, values=None, sliding=()):
    """Rows of ``kv_map.csv``."""
    return [
        {"layer": layer, "key_layer": key, "value_layer": value, "sliding": int(layer in sliding)}
        for layer, (key, value) in enumerate(zip(keys, values or keys, strict=True))
    ]


def marked(figure: Figure, marker: str) -> tuple[list[float], str]:
    """Layers with this marker, all above each other, and its colour."""
    (found,) = [drawn for drawn in figure.axes[0].lines if drawn.get_marker() == marker]
    assert set(found.get_xdata()) == {0}
    return list(found.get_ydata()), found.get_color()


def arcs(figure: Figure) -> list[tuple[int, int, str, str]]:
    """Lower layer, upper layer, colour and style of every curve, all on the left."""
    curves = [drawn for drawn in figure.axes[0].lines if len(drawn.get_xdata()) > 2 and drawn.get_marker() == "None"]
    left, _right = figure.axes[0].get_xlim()
    assert all(left < min(curve.get_xdata()) and max(curve.get_xdata()) < 1e-9 for curve in curves)
    ends = [sorted(round(float(curve.get_ydata()[end]), 6) for end in (0, -1)) for curve in curves]
    return sorted((*pair, curve.get_color(), curve.get_linestyle()) for pair, curve in zip(ends, curves, strict=True))


def roles(figure: Figure) -> list[str]:
    """What stands beside each layer, from below."""
    texts = {text.get_position()[1]: text.get_text() for text in figure.axes[0].texts}
    return [texts[layer] for layer in range(len(texts))]


def test_a_map_marks_owners_and_draws_an_arc_for_every_reader():
    figure = map_figure(map_rows([0, 3, 3, 3, 3, 5]))
    assert figure is not None
    assert marked(figure, "s") == ([0, 3, 5], BLUE)
    assert marked(figure, "o")[0] == list(range(6))
    assert arcs(figure) == [(1, 3, VERMILLION, "-"), (2, 3, VERMILLION, "-"), (3, 4, GREY, "-")]
    owns, reads = "owns keys and values", "reads layer 3"
    assert roles(figure) == [owns, reads, reads, owns, reads, owns]
    (legend,) = figure.legends
    shown = zip(legend.get_texts(), legend.get_lines(), strict=True)
    directions = {"from above: trained by iteration": VERMILLION, "from below": GREY}
    assert {text.get_text(): handle.get_color() for text, handle in shown} == directions
    assert list(figure.axes[0].get_yticks()) == list(range(6))


def test_a_map_whose_values_go_their_own_way_has_dotted_arcs_for_them():
    figure = map_figure(map_rows([0, 1, 1, 1], values=[0, 1, 0, 1], sliding=(1, 3)))
    assert figure is not None
    assert marked(figure, "s") == ([0, 1], BLUE)
    assert arcs(figure) == [(0, 2, GREY, ":"), (1, 2, GREY, "-"), (1, 3, GREY, "-")]
    assert roles(figure) == [
        "owns keys and values",
        "owns keys and values, in a window",
        "reads keys of layer 1, values of layer 0",
        "reads layer 1, in a window",
    ]


def test_a_map_in_which_nothing_is_shared_is_not_drawn():
    assert map_figure(map_rows([0, 1, 2])) is None
