"""Where matrices stand in a picture of layers and components: both in the order in which a model computes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Others follow by name.
FLOW = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer_name(layer: Any) -> str:
    """A layer as an axis names it; `none` outside the blocks."""
    import pandas as pd

    return "none" if pd.isna(layer) else f"{layer:.0f}"


def axes(matrices: "pd.DataFrame") -> tuple[list[str], list[str]]:
    """The layers and the components of a table of matrices, in order."""
    layers = {layer_name(layer) for layer in matrices["layer"]}
    components = set(matrices["component"])
    return (
        sorted(layers, key=lambda layer: (layer == "none", layer.zfill(9))),
        sorted(components, key=lambda name: (*(name != each for each in FLOW), name)),
    )
