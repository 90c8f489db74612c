"""The dashboard in a browser: opened, drilled into, filtered, sent on; quiet all the while."""

import json
import subprocess
import sys

import pytest

from tests.dashboard.browsing import until
from tests.dashboard.invented import HOSTILE, draw, tables

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(made_up, audit_of, served, tmp_path_factory):
    """Two audits of `angles`, one of `widths` too, one that is damaged, one of names that mean harm."""
    from dashboard import create_app
    from diagnostics.store.audit_store import Outcome

    angles = made_up("angles", tables(), draw, {"widest": 0.25, "narrowest": 0.125})
    widths = made_up("widths", {"matrices": tables()["matrices"]}, lambda result: {}, {"width": 2.0})
    harm = made_up("harm", tables(suffix=HOSTILE), draw, {"harmful": 1.0})
    broken = tmp_path_factory.mktemp("broken")
    (broken / "audit.json").write_text('{"schema": 1, "base": ')
    rules = {"angles": {"widest": {"fail": 0.1, "message": "too wide to ship", "source": "a rule of ours"}}}
    skipped = {"ood": Outcome(status="skipped", reason="needs --task F", question="Is it foreign?")}
    bad = {"harm": {"harmful": {"fail": 0.5, "message": HOSTILE, "source": HOSTILE}}}
    unmatched = ({"tensor": HOSTILE, "reason": HOSTILE, "base_shape": [8], "tuned_shape": None},)
    hostile = audit_of(
        harm, rules=bad, unmatched=unmatched, tuned={"ref": HOSTILE, "kind": "full"}, notes=(HOSTILE,),
        data={"task": [{"name": HOSTILE, "ref": HOSTILE, "rows": 3}]},
        outcomes={"ood": Outcome(status="skipped", reason=HOSTILE, question=HOSTILE)},
    )  # fmt: skip
    app = create_app(
        {
            "one": audit_of(angles, widths, rules=rules, outcomes=skipped),
            "two": audit_of(angles),
            "broken": broken,
            "hostile": hostile,
        },
        prefix="/here/",
    )
    return served(app) + "/here/"


def test_the_first_page_lists_the_audits_and_one_of_them_says_whether_it_may_ship(visit, address):
    tab = visit(address)
    page = tab.page
    assert page.locator(".library .card strong").all_text_contents() == ["one", "two", "broken", "hostile"]
    page.get_by_text("one", exact=True).click()
    page.wait_for_selector(".verdict")
    assert page.locator("h1").inner_text().lower() == "fail"
    assert "does not allow" in page.inner_text(".verdict")
    assert "too wide to ship" in page.inner_text("#findings").lower()
    assert "needs --task F" in page.inner_text("#not-run")
    page.locator("#findings a").click()
    page.wait_for_selector("#numbers")
    assert page.locator(".linked").inner_text() == "widest"
    page.go_back()
    page.wait_for_selector(".verdict")
    tab.settle()


def test_a_damaged_audit_says_so_and_the_others_work(visit, address):
    tab = visit(address + "?audit=broken")
    assert "damaged" in tab.page.inner_text("#page [role=alert]")
    assert "not JSON" in tab.page.inner_text("#page [role=alert]")
    assert tab.go(address + "?audit=two").locator(".verdict").count() == 1


def test_filters_reach_every_figure_and_table_and_the_address_brings_them_back(visit, address):
    tab = visit(address + "?audit=one&analysis=angles")
    page = tab.page
    titles = page.locator("figcaption")
    assert titles.all_text_contents() == ["Angles of 12 matrices", "120 vectors"]
    page.get_by_role("textbox", name="Components").click()
    page.get_by_role("option", name="o_proj").click()
    until(page, "document.querySelector('figcaption').textContent.includes('of 4 ')")
    tab.settle()
    # one of three components: a third of 12 matrices and of 120 vectors
    assert titles.all_text_contents() == ["Angles of 4 matrices", "40 vectors"]
    assert "component=o_proj" in page.url
    page.get_by_role("status").get_by_text("4 of 12 rows").wait_for()
    assert set(page.locator("[col-id='2'].ag-cell").all_text_contents()) == {"o_proj"}

    again = visit(page.url).page
    assert again.locator("figcaption").all_text_contents() == ["Angles of 4 matrices", "40 vectors"]
    assert again.locator(".mantine-Pill-label").all_text_contents() == ["o_proj"]
    again.goto(page.url + "&layer=1-2")
    until(again, "document.querySelector('figcaption')?.textContent.includes('of 2 ')")

    page.go_back()
    until(page, "document.querySelector('figcaption').textContent.includes('of 12 ')")
    tab.settle()
    assert page.locator(".mantine-Pill-label").count() == 0


def test_a_cell_of_the_map_opens_what_every_analysis_knows_of_that_matrix(visit, address):
    tab = visit(address + "?audit=one&analysis=angles")
    page = tab.page
    plot = page.locator(".plot").first.locator(".nsewdrag")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    # four layers across: the middle of the last is layer 3; three components: the middle one is o_proj
    page.mouse.click(box["x"] + box["width"] * 0.875, box["y"] + box["height"] * 0.5)
    drawer = page.locator(".mantine-Drawer-content")
    drawer.wait_for()
    tab.settle()
    assert "cell=3%2Fo_proj" in page.url
    text = drawer.inner_text()
    assert "layers.3.o_proj.weight" in text
    assert "10 rows" in text
    assert drawer.locator("h2", has_text="widths").count() == 1
    again = visit(page.url)
    assert "layers.3.o_proj.weight" in again.page.locator(".mantine-Drawer-content").inner_text()
    page.keyboard.press("Escape")
    drawer.wait_for(state="hidden")
    until(page, "!location.search.includes('cell')")


def test_names_that_mean_harm_are_shown_as_text(visit, address):
    tab = visit(address + "?audit=hostile")
    page = tab.page
    assert HOSTILE in page.inner_text("#findings .message")
    assert HOSTILE in page.text_content("#unmatched")
    assert page.locator("main b, main img, main script").count() == 0
    tab.go(address + "?audit=hostile&analysis=harm")
    assert page.locator("main b, main img, main script").count() == 0
    assert HOSTILE in page.locator("[col-id='0'].ag-cell").first.inner_text()
    page.get_by_role("textbox", name="Groups").click()
    assert HOSTILE in page.get_by_role("option").first.inner_text()
    page.get_by_role("option").first.click()
    tab.settle()
    page.keyboard.press("Escape")
    page.get_by_role("textbox", name="Open one matrix").fill("layers.2.q_proj")
    page.get_by_role("option").first.click()
    page.locator(".mantine-Drawer-content").wait_for()
    tab.settle()
    assert HOSTILE in page.locator(".mantine-Drawer-content").inner_text()
    assert page.locator(".mantine-Drawer-content img, .mantine-Drawer-content b").count() == 0
    assert page.title() != "owned"


def test_a_table_is_saved_whole_and_as_filtered(visit, address):
    tab = visit(address + "?audit=one&analysis=angles&layer=2-3")
    with tab.page.expect_download() as download:
        tab.page.get_by_role("button", name="Save table matrices as CSV").click()
    lines = download.value.path().read_text().splitlines()
    assert download.value.suggested_filename == "angles.matrices.csv"
    assert lines[0] == "matrix,layer,component,angle"
    # layers 2 and 3 of three components each
    assert len(lines) == 1 + 6


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(
    "search",
    [
        "",
        "?audit=one",
        "?audit=one&analysis=angles",
        "?audit=one&analysis=angles&cell=3/o_proj",
        "?audit=broken",
    ],
)
def test_everyone_can_use_it(visit, address, search, dark):
    tab = visit(address + search, dark=dark, width=800 if dark else 1440)
    assert tab.barriers() == []
    # nothing is wider than the window
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= (800 if dark else 1440)


def test_light_turns_dark_with_every_figure(visit, address):
    tab = visit(address + "?audit=one&analysis=angles")
    page = tab.page
    grounds = (
        "[...document.querySelectorAll('.plot .js-plotly-plot')].map((p) => p._fullLayout.paper_bgcolor)"
    )
    assert page.evaluate(grounds) == ["#ffffff", "#ffffff"]
    page.get_by_role("button", name="Switch between light and dark").click()
    until(page, f"{grounds}.every((color) => color === '#14181d')")
    page.get_by_role("textbox", name="Components").click()
    page.get_by_role("option", name="o_proj").click()
    until(page, "document.querySelector('figcaption').textContent.includes('of 4 ')")
    tab.settle()
    assert page.evaluate(grounds) == ["#14181d", "#14181d"]


def test_the_way_is_found_by_keyboard_alone(visit, address):
    page = visit(address + "?audit=one").page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the page"
    page.get_by_role("navigation", name="Pages").get_by_role("link", name="angles").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#numbers")
    until(page, "document.activeElement.id === 'heading'")
    slider = page.get_by_role("slider", name="Layers from")
    slider.focus()
    page.keyboard.press("ArrowRight")
    until(page, "location.search.includes('layer=1-3')")
    until(page, "document.querySelector('figcaption').textContent.includes('of 9 ')")


def test_at_800_pixels_the_pages_are_behind_a_button(visit, address):
    page = visit(address + "?audit=one", width=800).page
    link = page.get_by_role("navigation", name="Pages").get_by_role("link", name="angles")
    assert not link.is_visible()
    page.get_by_role("button", name="Show the pages").click()
    link.click()
    page.wait_for_selector("#numbers")
    link.wait_for(state="hidden")


def test_a_series_chooses_one_step_for_all_figures(visit, audit_of, made_up, served, tmp_path):
    from dashboard import create_app
    from diagnostics.store.audit_store import Store

    rules = {"angles": {"widest": {"warn": 0.5}}}
    checkpoints = []
    for number, widest in ((100, 0.25), (200, 0.75)):
        result = made_up("angles", tables(layers=number // 100), draw, {"widest": widest})
        audit = audit_of(result, rules=rules)
        name = f"{number}-against-first"
        with Store(tmp_path / "run" / name) as store:
            store.write_result("angles", result)
            store.write(audit)
        held = {"audit": name, "verdict": audit.verdict, "metrics": {"angles": {"widest": widest}}}
        checkpoints.append(
            {"ref": HOSTILE, "label": str(number), "against_first": held, "against_previous": held}
        )
    record = {"schema": 1, "base": "b", "checkpoints": checkpoints, "run": None}
    (tmp_path / "run" / "series.json").write_text(json.dumps(record))
    tab = visit(served(create_app([tmp_path / "run"])) + "/")
    page = tab.page
    assert page.locator(".strip li").all_text_contents() == ["100, pass", "200, warn"]
    # two layers of three components at step 200, one layer at step 100
    assert "Angles of 6 matrices" in page.locator("figcaption").all_text_contents()
    page.get_by_role("link", name="100").click()
    until(page, "document.querySelector('#step').textContent.includes('Angles of 3 matrices')")
    tab.settle()
    assert "step=100" in page.url
    lines = (
        "document.querySelector('.plot .js-plotly-plot, .js-plotly-plot')._fullLayout.shapes.map((s) => s.x0)"
    )
    assert 100 in page.evaluate(lines)
    assert page.locator("#step img, #step b").count() == 0
    assert HOSTILE in page.inner_text("#step")
    assert tab.barriers() == []


def test_a_host_that_others_reach_asks_for_the_token(chromium, tmp_path, audit_of, made_up):
    from diagnostics.store.audit_store import Store

    result = made_up("angles", tables(), draw, {"widest": 0.25})
    with Store(tmp_path / "one") as store:
        store.write_result("angles", result)
        store.write(audit_of(result))
    command = [
        sys.executable,
        "-c",
        "from diagnostics.cli.main import main; main()",
        "dashboard",
        str(tmp_path / "one"),
    ]
    process = subprocess.Popen(
        [*command, "--host", "0.0.0.0", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().strip().replace("0.0.0.0", "127.0.0.1")
        page = chromium.new_context().new_page()
        assert "?token=" in address
        refused = page.goto(address.partition("?")[0])
        assert refused.status == 401
        page.goto(address)
        page.wait_for_selector(".verdict")
        assert "token" not in page.url
        page.goto(address.partition("?")[0])
        page.wait_for_selector(".verdict")
    finally:
        process.terminate()
        _, errors = process.communicate()
    assert "visitors need the token" in errors
