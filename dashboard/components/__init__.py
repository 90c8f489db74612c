"""What is drawn: parts of a page, controls, grids, figures."""
