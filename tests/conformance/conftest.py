"""`pytest tests/conformance/test_family*.py --support FILE` writes down which family passed what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mustdrop.provenance import provenance

FILES = ("test_families.py", "test_family_weights.py", "test_family_compiles.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", type=Path, help="write the outcomes of the family tests to this file")
    more = "keep what the file knows of families and tests that do not run"
    parser.addoption("--support-more", action="store_true", help=more)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--support", default=None)
    if path is not None and not hasattr(config, "workerinput"):  # with xdist only the controller sees all reports
        config.pluginmanager.register(Support(path, config.getoption("--support-more")))


class Support:
    """Outcome per family, kind of media and test: "passed", "failed", or the reason why it is refused."""

    def __init__(self, path: Path, more: bool = False) -> None:
        self.path = path
        self.known = json.loads(path.read_text(encoding="utf-8")) if more else None
        self.outcomes: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not any(f"/{file}::" in report.nodeid for file in FILES) or "[" not in report.nodeid:
            return
        if report.when != "call" and report.outcome == "passed":
            return
        test, case = report.nodeid.rsplit("::", 1)[1].rstrip("]").split("[", 1)
        reasons = [reason for name, reason in report.user_properties if name == "refused"]
        outcome = reasons[0] if report.outcome == "passed" and reasons else report.outcome
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            outcome = str(report.longrepr[2]).removeprefix("Skipped: ").splitlines()[0][:160]
        self.outcomes.setdefault(case, {})[test] = str(outcome)

    def pytest_sessionfinish(self) -> None:
        now = provenance(0)
        if self.known is None:
            what = "which family passed which conformance test, on its tiny configuration"
            result = {"what": what, **now, "outcomes": dict(sorted(self.outcomes.items()))}
        else:  # the head tells of the first run; `later` of each family, and of each test, that ran since
            origin = {"commit": now["commit"], "date": now["date"]}
            known, later = self.known["outcomes"], dict(self.known.get("later", {}))
            tests = dict(self.known.get("later_tests", {}))
            for case, own in self.outcomes.items():
                if known.get(case, {}).keys() <= own.keys():
                    later[case] = origin
                else:
                    tests |= dict.fromkeys(own, origin)
            outcomes = {case: known.get(case, {}) | self.outcomes.get(case, {}) for case in {**known, **self.outcomes}}
            result = self.known | {"later": later, "later_tests": tests, "outcomes": dict(sorted(outcomes.items()))}
        self.path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
