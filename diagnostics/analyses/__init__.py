"""One folder, or one file, for each analysis."""
