"""`pytest tests/methods/test_every_family.py --product FILE` writes down which method passed what on which family."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mustdrop.provenance import provenance

FILE = "test_every_family.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--product", type=Path, help="write the outcomes of family x method x backend to this file")
    parser.addoption(
        "--product-more",
        action="store_true",
        help="add to that file: it is of this commit, and of other backends (`-k sdpa`), for a run in parts",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--product", default=None)
    if path is not None and not hasattr(config, "workerinput"):  # with xdist only the controller sees all reports
        product = Product(path, config.getoption("--breadth"))
        if config.getoption("--product-more"):
            product.take_up(json.loads(path.read_text(encoding="utf-8")))
        config.pluginmanager.register(product)


class Product:
    """Per family, kind of media and method: how many tests passed, and which did not, with the reason."""

    def __init__(self, path: Path, breadth: str) -> None:
        self.path, self.breadth = path, breadth
        self.passed: Counter[tuple[str, str]] = Counter()
        self.per_test: Counter[tuple[str, str]] = Counter()
        self.rest: dict[tuple[str, str], dict[str, list[str]]] = {}

    def take_up(self, earlier: dict[str, Any]) -> None:
        """Go on from what an earlier part of the run wrote down."""
        known = provenance(0)
        for key in ("commit", "dirty", "versions"):
            if earlier[key] != known[key]:
                raise pytest.UsageError(
                    f"--product-more adds to a file of the same {key}; {self.path} has {earlier[key]}, this is "
                    f"{known[key]}. Run it anew without --product-more."
                )
        for test, outcomes in earlier["tests"].items():
            self.per_test.update({(test, outcome): number for outcome, number in outcomes.items()})
        for family, methods in earlier["pairs"].items():
            for method, entry in methods.items():
                self.passed[family, method] = entry if isinstance(entry, int) else entry["passed"]
                if not isinstance(entry, int):
                    self.rest[family, method] = entry["rest"]

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
