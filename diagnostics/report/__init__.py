"""The report: HTML, Markdown, JSON."""
