"""The page that the app is put into: the theme's colours as variables, before anything is drawn."""

from diagnostics import theme


def variables(page: theme.Page) -> str:
    """The colours of a light or a dark page as CSS variables."""
    colors = {
        "paper": page.paper,
        "panel": page.panel,
        "ink": page.ink,
        "muted": page.muted,
        "line": page.grid,
        **page.verdicts,
    }
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


INDEX = f"""<!doctype html>
<html lang="en">
<head>
{{%metas%}}
<title>{{%title%}}</title>
{{%favicon%}}
<style>
:root {{ --base: {theme.BASE}; --tuned: {theme.TUNED}; --new: {theme.NEW}; --font: {theme.FONT}; }}
:root {{ {variables(theme.LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(theme.DARK)} }} }}
:root[data-mantine-color-scheme="light"] {{ {variables(theme.LIGHT)} }}
:root[data-mantine-color-scheme="dark"] {{ {variables(theme.DARK)} }}
</style>
{{%css%}}
</head>
<body>
{{%app_entry%}}
<footer>
{{%config%}}
{{%scripts%}}
{{%renderer%}}
</footer>
</body>
</html>
"""
