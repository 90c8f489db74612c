"""The HTML page around the app, with the theme's colours as CSS variables."""

from diagnostics.plotting import theme


def variables(page: theme.PageColours) -> str:
    """The CSS variables of a light or a dark page."""
    colors = {
        "paper": page.paper,
        "panel": page.panel,
        "ink": page.ink,
        "muted": page.muted,
        "line": page.grid,
    }
    return " ".join(f"--{name}: {color};" for name, color in (colors | page.verdicts).items())


# Inside the page: browsers request an external icon again at every change of the address.
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    f"%3Crect width='16' height='16' rx='3' fill='%23{theme.BASE[1:]}'/%3E"
    f"%3Cpath d='M16 0v13a3 3 0 0 1-3 3H0z' fill='%23{theme.TUNED[1:]}'/%3E%3C/svg%3E"
)

INDEX = f"""<!doctype html>
<html lang="en">
<head>
{{%metas%}}
<title>{{%title%}}</title>
<link rel="icon" href="{ICON}">
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
