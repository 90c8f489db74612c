"""Colours that everyone can tell apart, on a light page and on a dark one."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from diagnostics.plotting import theme

# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB.
SEEN = {
    "all colours": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
PAGES = {"light": theme.LIGHT, "dark": theme.DARK}


def linear(color):
    """Linear RGB of a hex colour."""
    c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def luminance(color):
    """Relative luminance, 0 to 1."""
    return float(linear(color) @ [0.2126, 0.7152, 0.0722])


def contrast(first, second):
    """The contrast ratio of WCAG, 1 to 21."""
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def lab(color, eye):
    """CIE L*a*b* of a colour as an eye sees it."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(np.array(SEEN[eye]) @ linear(color), 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", SEEN)
def test_the_colours_of_roles_stay_apart_for_every_eye(eye):
    roles = (theme.BASE, theme.TUNED, theme.NEW, theme.NEUTRAL)
    # A difference of 2.3 is just noticeable side by side; ten times that is told apart at a distance.
    assert all(np.linalg.norm(lab(a, eye) - lab(b, eye)) > 23 for a, b in combinations(roles, 2))


@pytest.mark.parametrize("eye", SEEN)
def test_the_colours_of_lines_stay_apart_for_every_eye(eye):
    pairs = combinations(theme.COLORWAY, 2)
    assert all(np.linalg.norm(lab(a, eye) - lab(b, eye)) > 15 for a, b in pairs)


@pytest.mark.parametrize("eye", SEEN)
@pytest.mark.parametrize("page", PAGES)
def test_pass_warn_and_fail_stay_apart_for_every_eye(page, eye):
    colors = [PAGES[page].verdicts[verdict] for verdict in ("pass", "warn", "fail")]
    assert all(np.linalg.norm(lab(a, eye) - lab(b, eye)) > 15 for a, b in combinations(colors, 2))


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_text_and_verdicts_can_be_read_on_both_grounds_of_a_page(page):
    for color in (page.ink, page.muted, *page.verdicts.values()):
        assert min(contrast(color, page.paper), contrast(color, page.panel)) >= 4.5  # WCAG AA, text


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_lines_stand_out_from_the_page(page):
    for color in {*theme.COLORWAY, theme.NEUTRAL}:
        assert contrast(color, page.paper) >= 3  # WCAG AA, graphics


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_sequential_scale_departs_from_the_page_in_one_direction(page):
    light = [luminance(color) for color in page.sequential]
    steps = np.diff(light)
    assert (steps > 0).all() or (steps < 0).all()
    assert contrast(page.sequential[0], page.paper) < 1.3 < 3 < contrast(page.sequential[-1], page.paper)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_a_diverging_scale_is_nearest_to_the_page_in_its_middle(page):
    far = [contrast(color, page.paper) for color in page.diverging]
    assert all(a > b for a, b in pairwise(far[:4]))
    assert all(a < b for a, b in pairwise(far[3:]))


def test_text_from_a_file_keeps_its_markup_as_characters():
    assert theme.verbatim('<b>"q&k"</b>') == '&lt;b&gt;"q&amp;k"&lt;/b&gt;'


def test_a_figure_says_what_is_seen_and_in_which_units():
    figure = theme.figure(title="Loss falls", x="step", y="loss (nats per token)")
    assert figure.layout.title.text == "Loss falls"
    assert figure.layout.xaxis.title.text == "step"
    assert figure.layout.yaxis.title.text == "loss (nats per token)"


def test_a_threshold_is_a_labelled_line_across_the_figure():
    figure = theme.figure(title="", x="", y="")
    theme.threshold(figure, "epsilon 0.5", y=0.5)
    theme.threshold(figure, "step 10", x=10)
    assert [(line.y0, line.y1, line.xref) for line in figure.layout.shapes[:1]] == [(0.5, 0.5, "x domain")]
    assert (figure.layout.shapes[1].x0, figure.layout.shapes[1].yref) == (10, "y domain")
    assert [note.text for note in figure.layout.annotations] == ["epsilon 0.5", "step 10"]
