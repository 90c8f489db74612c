"""Other thresholds tried: what they say, what is refused, and the file that `--policy` takes."""

import tomllib

import pytest

from dashboard.state.query import Query, parse
from dashboard.state.trial import altered, changes, trial
from diagnostics.core.policy import Rule
from tests.dashboard.browsing import until
from tests.dashboard.invented import HOSTILE, draw, tables

RULES = {
    "angles": {
        "widest": {"warn": 0.5, "fail": 2.0, "message": "too wide", "source": "a rule of ours"},
        "narrowest": {"fail": 0.2, "below": True, "per": "k"},
    }
}


@pytest.fixture(scope="module")
def audit(made_up, audit_of):
    """Its widest angle warns; its narrowest, 1, is below 0.2 × k = 2, and fails."""
    angles = made_up("angles", tables(), draw, {"widest": 1.0, "narrowest": 1.0, "spread": 3.0})
    return audit_of(angles, rules=RULES)


def severities(tried):
    return {f.metric: f.severity for f in tried.audit.findings}


def test_without_thresholds_an_audit_is_judged_as_it_was(audit):
    tried = trial(audit, Query(), "one")
    assert severities(tried) == {"narrowest": "fail", "widest": "warn"}
    assert tried.changed == {}
    assert tried.audit.policy.origin == audit.policy.origin


def test_a_threshold_in_the_address_changes_verdict_and_source(audit):
    tried = trial(audit, parse("?warn.angles.widest=1.5&fail.angles.narrowest=0.05"), "one")
    # widest 1.0 is not above 1.5; narrowest 1.0 is not below 0.05 × 10 = 0.5
    assert severities(tried) == {}
    assert tried.audit.verdict == "pass"
    assert audit.verdict == "fail"
    assert tried.audit.policy.rules["angles"]["widest"].source == "set by hand, tried on one"
    assert tried.changed["angles", "widest"].source == "a rule of ours"


def test_a_threshold_is_taken_away_and_one_is_made_for_a_number_without(audit):
    tried = trial(
        audit, parse("?fail.angles.narrowest=off&fail.angles.spread=4&side.angles.spread=below"), "x"
    )
    assert severities(tried) == {"widest": "warn", "spread": "fail"}
    assert tried.audit.findings[0].threshold == 4.0


def test_a_rule_as_it_was_is_not_a_change(audit):
    assert trial(audit, parse("?warn.angles.widest=0.5&side.angles.widest=above"), "x").changed == {}


def test_numbers_and_analyses_that_are_not_there_are_passed_over(audit):
    tried = trial(audit, parse("?fail.angles.nothing=1&fail.other.widest=0&fail=3"), "x")
    assert tried.changed == tried.errors == {}


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("fail.angles.widest=0.1", "would be met before warn"),
        ("warn.angles.widest=much", "not a finite number"),
        ("warn.angles.widest=nan", "not a finite number"),
        ("warn.angles.widest=1e999", "not a finite number"),
    ],
)
def test_a_rule_that_makes_no_sense_is_told_and_stays_as_it_was(audit, asked, why):
    tried = trial(audit, parse(f"?{asked}"), "x")
    assert why in tried.errors["angles", "widest"]
    assert severities(tried)["widest"] == "warn"


def test_what_changed_is_shown_as_toml(audit):
    tried = trial(audit, parse("?warn.angles.widest=0.25&fail.angles.widest=off"), "x")
    assert tomllib.loads(changes(tried)) == {"angles": {"widest": {"warn": 0.25}}}


def test_an_altered_rule_keeps_what_was_not_touched():
    old = Rule(warn=1.0, fail=2.0, per="k", when="verified", message="m", source="s")
    assert altered(old, {"warn": "1.5"}, "a.m") == Rule(
        warn=1.5, fail=2.0, per="k", when="verified", message="m", source="s"
    )


@pytest.mark.browser
def test_a_policy_is_tried_and_downloaded_in_a_browser(visit, served, audit, audit_of, made_up, tmp_path):
    from dashboard import create_app

    harm = audit_of(
        audit.results["angles"],
        rules={"angles": {"widest": {"warn": 0.5, "message": HOSTILE, "source": HOSTILE}}},
    )
    address = served(create_app({"one": audit, "harm": harm}))
    tab = visit(address + "/?page=policy&audit=one")
    page = tab.page
    page.wait_for_selector("#findings li")
    assert page.locator("#findings li").count() == 2
    assert tab.barriers() == []
    page.get_by_role("textbox", name="fail threshold of narrowest").fill("0.05")
    until(page, "document.querySelectorAll('#findings li').length === 1")
    assert "becomes warn" in page.inner_text("#trial")
    assert "gone: angles.narrowest" in page.inner_text("#trial")
    page.get_by_role("textbox", name="warn threshold of widest").fill("")
    until(page, "document.querySelector('#trial').textContent.includes('becomes pass')")
    tab.settle()
    assert "warn.angles.widest=off" in page.url
    page.get_by_role("textbox", name="fail threshold of widest").fill("0.75")
    until(page, "document.querySelector('#trial').textContent.includes('stays fail')")
    page.get_by_role("textbox", name="warn threshold of widest").fill("1.5")
    page.wait_for_selector(".trouble-text[role=alert]")
    assert "would be met before warn" in page.inner_text(".trouble-text[role=alert]")
    page.get_by_role("textbox", name="warn threshold of widest").fill("0.25")
    page.wait_for_selector(".trouble-text[role=alert]", state="detached")
    tab.settle()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download policy.toml").click()
    assert download.value.suggested_filename == "policy.toml"
    given_rules = tomllib.loads(download.value.path().read_text())["angles"]
    assert (given_rules["widest"]["warn"], given_rules["widest"]["fail"]) == (0.25, 0.75)
    assert given_rules["narrowest"] == {
        "fail": 0.05, "below": True, "per": "k", "source": "set by hand, tried on one",
    }  # fmt: skip

    again = visit(page.url).page
    assert again.get_by_role("textbox", name="fail threshold of widest").input_value() == "0.75"
    page.get_by_role("link", name="Reset to the audit's policy").click()
    until(page, "document.querySelectorAll('#findings li').length === 2")
    until(page, "document.querySelector('input[aria-label=\"fail threshold of widest\"]').value === '2'")
    tab.settle()

    tab.go(address + "/?page=policy&audit=harm&fail.angles.widest=%3Cb%3E")
    page.wait_for_selector("#findings li")
    assert HOSTILE in page.inner_text("#findings .message")
    assert page.locator("main b, main img, main script").count() == 0
