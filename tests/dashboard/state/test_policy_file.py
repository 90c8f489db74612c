"""The file that a tried policy is downloaded as: taken by `--policy`, and judging alike."""

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from dashboard.state.trial import toml
from diagnostics.core.policy import Policy, Rule, default_policy
from diagnostics.core.policy_file import load_policy
from tests.dashboard.invented import HOSTILE


def test_the_file_is_what_the_policy_option_takes_and_judges_alike(tmp_path):
    rules = {name: dict(metrics) for name, metrics in default_policy().rules.items()}
    rules["intruders"]["intruders_per_matrix"] = Rule(warn=0.5, per="k", message=HOSTILE, source="by hand")
    del rules["ood"]["gain_nats"]
    rules["gone"] = {"metric": Rule(fail=1.0, source="of a package that is not here")}
    written, left = toml(Policy(rules, origin="tried"), "au\ndit")
    file = tmp_path / "policy.toml"
    file.write_text(written)
    taken = load_policy(file)
    assert left == ["gone.metric"]
    assert taken.rules["intruders"]["intruders_per_matrix"] == rules["intruders"]["intruders_per_matrix"]
    # The default has a rule that the tried policy lacks: it is off in the file.
    assert taken.rules["ood"]["gain_nats"].off
    del rules["gone"]
    judging = {(n, m): r for n, metrics in taken.rules.items() for m, r in metrics.items() if not r.off}
    assert judging == {(n, m): r for n, metrics in rules.items() for m, r in metrics.items()}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False, allow_infinity=False))
def test_any_threshold_and_message_survive_the_file(message, threshold):
    rule = Rule(warn=threshold, message=message, source="s")
    text, omitted = toml(Policy({"ood": {"auroc": rule}}, origin="o"), message)
    assert omitted == []
    written = tomllib.loads(text)["ood"]["auroc"]
    assert (written["warn"], written.get("message", "")) == (threshold, message)
