"""The picture of the gates shows the last ones, and which heads they would keep whole."""

from kvtrain.models.duo.figures import gate_figure


def test_gates_are_drawn_as_they_were_last():
    """Numbers in the cells, and a frame round the head that keeps everything."""
    names = ("step", "layer", "head", "gate", "full")
    rows = [(1, 0, 0, 0.5, 1), (1, 0, 1, 0.25, 0), (3, 0, 0, 0.125, 0), (3, 0, 1, 0.75, 1)]
    (axes, _bar) = gate_figure([dict(zip(names, row, strict=True)) for row in rows]).axes
    assert [text.get_text() for text in axes.texts] == ["0.12", "0.75"]
    assert [round(frame.get_x() + 0.46) for frame in axes.patches] == [1]
    assert "step 3" in axes.get_title(loc="left")
