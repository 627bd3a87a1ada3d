"""`pytest tests/methods/test_every_family.py --product FILE` writes down which method passed what on which family."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mustdrop.provenance import provenance

FILE = "test_every_family.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--product", type=Path, help="write the outcomes of family x method x backend to this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--product", default=None)
    if path is not None and not hasattr(config, "workerinput"):  # with xdist only the controller sees all reports
        config.pluginmanager.register(Product(path, config.getoption("--breadth")))


class Product:
    """Per family, kind of media and method: how many tests passed, and which did not, with the reason."""

    def __init__(self, path: Path, breadth: str) -> None:
        self.path, self.breadth = path, breadth
        self.passed: Counter[tuple[str, str]] = Counter()
        self.per_test: Counter[tuple[str, str]] = Counter()
        self.rest: dict[tuple[str, str], dict[str, list[str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if f"/{FILE}::" not in report.nodeid or (report.when != "call" and report.outcome == "passed"):
            return
        test, case = report.nodeid.rsplit("::", 1)[1].rstrip("]").split("[", 1)
        name, kind, method, attention = case.split("-")
        pair = (f"{name}-{kind}", method)
        self.per_test[test, report.outcome] += 1
        reason = next((text for name, text in report.user_properties if name == "refused"), str(report.outcome))
        if reason == "passed":
            self.passed[pair] += 1
            return
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ").splitlines()[0][:160]
        self.rest.setdefault(pair, {}).setdefault(reason, []).append(f"{test} {attention}")

    def pytest_sessionfinish(self) -> None:
        pairs: dict[str, dict[str, object]] = {}
        for family, method in sorted({*self.passed, *self.rest}):
            rest = {reason: sorted(where) for reason, where in self.rest.get((family, method), {}).items()}
            passed = self.passed[family, method]
            pairs.setdefault(family, {})[method] = {"passed": passed, "rest": rest} if rest else passed
        tests: dict[str, dict[str, int]] = {}
        for (test, outcome), number in sorted(self.per_test.items()):
            tests.setdefault(test, {})[outcome] = number
        result = {
            "what": f"how many tests of {FILE} each method passed on each family, on its tiny configuration",
            "breadth": self.breadth,
            **provenance(0),
            "tests": tests,
            "pairs": pairs,
        }
        self.path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
