"""What reports show of cross-layer sharing: the map, and how far serving is from what trains."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from kvtrain.metrics import Rows
from kvtrain.models.figures import Fact, Figures, TableFigure
from kvtrain.models.lckv.kv_map import KV_MAP
from kvtrain.plotting.canvas import BLUE, GREY, VERMILLION, arc, canvas_of_rows

_DIRECTIONS = ((VERMILLION, "from above: trained by iteration"), (GREY, "from below"))


def map_figure(kv_map: Rows) -> Figure | None:
    """Whose keys and values each layer reads; None where every layer reads its own.

    Args:
        kv_map: Rows of ``kv_map.csv``, one a layer.
    """
    sources = [(int(row["layer"]), int(row["key_layer"]), int(row["value_layer"])) for row in kv_map]
    if all(layer == key == value for layer, key, value in sources):
        return None
    figure, axes = canvas_of_rows("Whose keys and values each layer reads", len(sources))
    for layer, key, value in sources:
        for source, style in {(key, "-"), (value, "-" if value == key else ":")}:
            if source != layer:
                arc(axes, layer, source, style, _DIRECTIONS[0 if source > layer else 1][0])
    owners = sorted({source for _, *both in sources for source in both})
    axes.plot([0] * len(sources), range(len(sources)), "o", color="white", markeredgecolor=GREY, markersize=8)
    axes.plot([0] * len(owners), owners, "s", color=BLUE, markersize=9)
    for row in kv_map:
        axes.text(0.08, row["layer"], _role(row, owners), va="center", fontsize=9)
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(-0.8, len(sources) - 0.2)
    axes.set_ylabel("layer", fontsize=11)
    axes.set_yticks(range(len(sources)))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    above, below = (axes.plot([], [], color=color, label=label)[0] for color, label in _DIRECTIONS)
    figure.legend(handles=[above, below], frameon=False, loc="outside lower center", ncols=2)
    return figure


def _role(row: dict[str, float], owners: Sequence[int]) -> str:
    """What a layer does, in words."""
    if row["key_layer"] != row["value_layer"]:
        role = f"reads keys of layer {row['key_layer']:.0f}, values of layer {row['value_layer']:.0f}"
    else:
        role = "owns keys and values" if row["layer"] in owners else f"reads layer {row['key_layer']:.0f}"
    return role + (", in a window" if row["sliding"] else "")


FIGURES = Figures(
    drawn=(TableFigure("kv_map", KV_MAP, map_figure),),
    facts=(Fact("Held-out loss, serving minus training form", "val_serving_gap", "+.5f"),),
)
