import math
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.core import registry as registry_module
from diagnostics.core.analysis import Result
from diagnostics.core.policy import Policy, Rule, default_policy, judge, not_measured, parse, verdict
from diagnostics.core.policy_file import check_names, load_policy
from diagnostics.core.registry import find, find_source, modules

ORDER = [None, "warn", "fail"]


def result(**metrics):
    return Result(metrics=metrics, tables={}, analysis="made", parameters={"k": 10})


def policy(**rules):
    return parse({"made": rules}, origin="this test")


def severity(rule, value):
    crossed = rule.beyond(value)
    return crossed and crossed[0]


@pytest.mark.parametrize(
    ("value", "expected"), [(0.1, None), (0.2, None), (0.3, "warn"), (1.0, "warn"), (1.1, "fail")]
)
def test_a_value_is_a_finding_above_its_threshold_and_not_at_it(value, expected):
    assert severity(Rule(warn=0.2, fail=1.0), value) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.9, None), (0.8, None), (0.7, "warn"), (0.4, "fail")])
def test_a_rule_may_look_for_small_values(value, expected):
    assert severity(Rule(warn=0.8, fail=0.5, below=True), value) == expected


finite = st.floats(-1e6, 1e6)


@given(st.tuples(finite, finite), st.tuples(finite, finite), st.booleans())
def test_a_worse_value_is_never_judged_more_mildly(thresholds, values, below):
    warn, fail = sorted(thresholds, reverse=below)
    better, worse = sorted(values, reverse=below)
    rule = Rule(warn=warn, fail=fail, below=below)
    assert ORDER.index(severity(rule, better)) <= ORDER.index(severity(rule, worse))


def test_a_finding_carries_what_was_measured_the_threshold_and_the_source():
    rules = policy(m={"warn": 0.5, "fail": 2.0, "source": "Doe 2024", "message": "too many"})
    (finding,) = judge(result(m=3.0), rules)
    assert (finding.severity, finding.value, finding.threshold) == ("fail", 3.0, 2.0)
    assert (finding.analysis, finding.metric, finding.message, finding.source) == (
        "made",
        "m",
        "too many",
        "Doe 2024",
    )


def test_a_finding_without_a_message_says_the_comparison_and_without_a_source_names_the_policy():
    (finding,) = judge(result(m=0.25), policy(m={"warn": 0.5, "below": True}))
    assert finding.message == "m is 0.25, below 0.5"
    assert finding.source == "this test"


def test_failures_come_before_warnings():
    findings = judge(result(a=1, b=1), policy(a={"warn": 0}, b={"fail": 0}))
    assert [finding.metric for finding in findings] == ["b", "a"]
    assert verdict(findings) == "fail"
    assert verdict(findings[1:]) == "warn"
    assert verdict([]) == "pass"


def test_thresholds_per_parameter_are_multiplied_by_it():
    rules = policy(m={"warn": 0.02, "fail": 0.1, "per": "k"})  # at k = 10: 0.2 and 1.0
    assert judge(result(m=0.2), rules) == []
    (finding,) = judge(result(m=0.21), rules)
    assert finding.threshold == pytest.approx(0.2)


@pytest.mark.parametrize(("facts", "applies"), [({}, False), ({"checked": 0}, False), ({"checked": 2}, True)])
def test_a_rule_with_a_condition_applies_only_where_it_holds(facts, applies):
    rules = policy(m={"fail": 0, "when": "checked"})
    assert len(judge(result(m=1, **facts), rules)) == applies
    # Where the condition fails, the rule is neither passed nor missed: there is nothing to say.
    assert list(not_measured(result(**facts), rules)) == (["m"] if applies else [])


def test_a_condition_may_be_a_parameter():
    assert judge(result(m=1), policy(m={"fail": 0, "when": "k"}))
    assert not judge(result(m=1), policy(m={"fail": 0, "when": "absent"}))


def test_a_parameter_that_is_no_number_leaves_the_rule_unjudged():
    rules = policy(m={"fail": 0.1, "per": "layers"})
    assert judge(result(m=5.0), rules) == []
    assert not_measured(result(m=5.0), rules) == {"m": "its thresholds are per layers, which is None here"}


@pytest.mark.parametrize(
    ("metrics", "reason"), [({}, "left it out"), ({"m": math.nan}, "not a number")], ids=["absent", "nan"]
)
@pytest.mark.parametrize("below", [True, False])
def test_what_was_not_measured_never_passes_silently(metrics, reason, below):
    rules = policy(m={"warn": 1, "fail": 1, "below": below})
    assert judge(result(**metrics), rules) == []
    assert reason in not_measured(result(**metrics), rules)["m"]


def test_infinity_is_beyond_every_threshold():
    (finding,) = judge(result(m=math.inf), policy(m={"fail": 1e300}))
    assert finding.severity == "fail"


def test_an_empty_rule_switches_a_metric_off():
    assert judge(result(m=math.inf), policy(m={})) == []
    assert not_measured(result(), policy(m={})) == {}


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"m": {"wran": 1}}, LookupError, r"made.m: unknown key 'wran'; known: warn, fail, below, per"),
        ({"m": {"warn": "1"}}, ValueError, r"made.m: warn = '1' is not a finite number"),
        ({"m": {"warn": True}}, ValueError, r"warn = True is not a finite number"),
        ({"m": {"fail": math.nan}}, ValueError, r"fail = nan is not a finite number"),
        ({"m": {"below": 1}}, ValueError, r"below = 1 is not true or false"),
        ({"m": {"source": 1}}, ValueError, r"source = 1 is not a text"),
        ({"m": 2.0}, ValueError, r"made.m = 2.0 is not a rule; write \{warn = …, fail = …\}"),
        (
            {"m": {"warn": 2, "fail": 1}},
            ValueError,
            r"fail = 1 would be met before warn = 2; .* values above",
        ),
        ({"m": {"warn": 1, "fail": 2, "below": True}}, ValueError, r"fail = 2 would be met before warn = 1"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(table, error, message):
    with pytest.raises(error, match=message):
        parse({"made": table}, origin="this test")


def test_a_rule_outside_a_table_is_refused():
    with pytest.raises(
        ValueError, match=r"this test: m = 1 stands outside a table; write \[ANALYSIS\] above it"
    ):
        parse({"m": 1}, origin="this test")


def write(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def test_a_policy_file_replaces_rules_metric_by_metric(register, tmp_path, monkeypatch):
    register("made", lambda: None, metrics={"a": "", "b": ""})
    default = parse({"made": {"a": {"warn": 1, "source": "x"}, "b": {"warn": 1, "source": "y"}}}, "default")
    monkeypatch.setattr("diagnostics.core.policy_file.default_policy", lambda: default)
    path = write(tmp_path, "[made]\nb = {fail = 5}\n")
    rules = load_policy(path).rules["made"]
    assert rules["a"] == Rule(warn=1.0, source="x")
    # The default's warning goes with its source: a mixture of two policies would be nobody's.
    assert rules["b"] == Rule(fail=5.0, source=f"policy {path}")


def test_a_policy_survives_being_written_as_plain_values():
    rules = policy(a={"warn": 0, "below": True, "per": "k", "message": "m", "source": "s"}, b={})
    assert parse(rules.plain(), origin=rules.origin) == rules


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[mode]\na = {warn = 1}", r"unknown analysis 'mode'; known: made, other"),
        ("[made]\nb = {warn = 1}", r"made has no metric 'b'; it has: a"),
        ("[made]\na = {warn = 1, per = 'q'}", r"made has no parameter 'q'; it has: k"),
        ("[made]\na = {warn = 1, when = 'q'}", r"made has no 'q'; it has: k, a"),
    ],
)
def test_names_in_a_policy_file_must_exist(register, tmp_path, text, message):
    register("made", lambda *, k=1: None, metrics={"a": ""})
    register("other", lambda: None)
    path = write(tmp_path, text)
    with pytest.raises(LookupError, match=re.escape(str(path)) + ".*" + message):
        load_policy(path)


def test_a_policy_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"policy .*nowhere.toml: cannot be read: No such file"):
        load_policy(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match=r"policy .*policy.toml: not a TOML file: .*line 1"):
        load_policy(write(tmp_path, "not toml"))


def test_the_rules_of_an_analysis_are_in_its_folder(tmp_path, monkeypatch, registry):
    for name in ("first", "second"):
        (tmp_path / f"{name}_plugin" / "inner").mkdir(parents=True)
        (tmp_path / f"{name}_plugin" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
        (tmp_path / f"{name}_plugin" / "inner" / "__init__.py").touch()
    rules = "[first.heat]\nwarn = 1\nsource = 'a guess'\n[other.heat]\nwarn = 2\n"
    (tmp_path / "first_plugin" / "inner" / "policy.toml").write_text(rules)
    entries = [EntryPoint(n, f"{n}_plugin.inner:f", "tunescope.analyses") for n in ("first", "second")]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry_module, "entry_points", lambda group: entries)
    assert default_policy().plain() == {"first": {"heat": {"warn": 1.0, "source": "a guess"}}}


def test_rules_of_a_package_that_are_no_toml_are_named(tmp_path, monkeypatch, registry):
    (tmp_path / "harmed_plugin.py").touch()
    (tmp_path / "policy.toml").write_text("[harmed")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("harmed", "harmed_plugin:f", "tunescope.analyses")
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [entry])
    with pytest.raises(ValueError, match=r"policy.toml: not a TOML file: .*; mend or uninstall harmed"):
        default_policy()


def test_each_analysis_brings_rules_of_its_own_alone():
    files = {
        name: Path(find_source(module).origin).with_name("policy.toml") for name, module in modules().items()
    }
    brought = {name: tomllib.loads(file.read_text()) for name, file in files.items() if file.exists()}
    assert set(brought) == set(default_policy().rules) >= {"intruders", "trajectory"}
    assert all(list(tables) == [name] for name, tables in brought.items())


def test_every_default_names_its_source_or_says_that_none_is_published():
    rules = [rule for metrics in default_policy().rules.values() for rule in metrics.values()]
    assert rules
    for rule in rules:
        assert re.search(r"arXiv|no published threshold", rule.source), rule


def test_every_default_is_about_something_that_is_measured():
    policy = default_policy()
    check_names(policy)
    assert policy.rules
    for name, rules in policy.rules.items():
        record = find(name)
        assert set(rules) <= set(record.metrics), name
        assert {rule.per for rule in rules.values()} <= {"", *record.parameters}, name
        assert {rule.when for rule in rules.values()} <= {"", *record.parameters, *record.metrics}, name
        for metric, rule in rules.items():
            misspelt = Policy({name: {f"{metric}s": rule}}, origin="a typo")
            with pytest.raises(LookupError, match=f"a typo: {name} has no metric '{metric}s'"):
                check_names(misspelt)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("x = " + "[" * 50_000, "is nested too deeply"),
        (".".join("a" * 5000) + " = 1", "a line has more than 300 dots"),
        ("x = " + "7" * 5000, "not a TOML file: Exceeds the limit"),
        ("[drift]\nx = {warn = 0x" + "f" * 5000 + "}", "holds a number of more digits than can be read"),
        ("[drift]\nx = {warn = 1" + "0" * 400 + "}", "warn = 1.* is not a finite number"),
        ('[drift]\n"a\\nb" = 3', r"drift.a\\nb = 3 is not a rule"),
    ],
)
def test_a_policy_made_to_do_harm_is_one_clear_error(tmp_path, text, match):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ValueError, match=match) as caught:
        load_policy(tmp_path / "p.toml")
    assert str(caught.value).isprintable()
