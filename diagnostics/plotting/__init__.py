"""The theme, and the chart helpers that every figure is drawn with."""
