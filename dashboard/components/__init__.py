"""What pages are built from: controls, tables, figures."""
