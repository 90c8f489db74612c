"""The pages of the dashboard, one module each. A new page is a module with a `PAGE`, listed here."""

from dashboard.pages import analysis, audits, compare, detector, overview, policy, run, series
from dashboard.pages.page import Page

MODULES = (overview, series, audits, compare, policy, detector, analysis, run)
PAGES: dict[str, Page] = {module.PAGE.name: module.PAGE for module in MODULES}  # in the order of the links
