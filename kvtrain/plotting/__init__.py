"""What figures are drawn with: panels, curves, maps of heads. Nothing that trains imports it, nor matplotlib."""
