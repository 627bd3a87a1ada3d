"""What is public is what docs/stability.md says, it goes with a warning, and having it costs no more than it says."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nox
import pytest
import yaml
from benchmarks import install
from benchmarks.common import RESULTS
from packaging.requirements import Requirement
from packaging.version import Version

import mustdrop
from mustdrop import deprecation, errors, fitting, kernels, pruners

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]


def listed(start):
    """The names of the paragraph of the page that begins like this, after its first colon at a line's end."""
    paragraph = PAGE.partition(f"\n**{start}")[2].partition("\n\n")[0]
    return re.findall(r"`(\w+)`", paragraph.partition(":\n")[2])


def own_classes(module):
    return [name for name, kind in vars(module).items() if inspect.isclass(kind) and kind.__module__ == module.__name__]


def trace_names():
    fields = {name for name in mustdrop.Trace.__dataclass_fields__ if not name.startswith("_")}
    return fields | {name for name in vars(mustdrop.Trace) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("start", "names"),
    [
        ("The package", lambda: mustdrop.__all__),
        ("Pruners", lambda: pruners.__all__),
        ("Errors and warnings", lambda: own_classes(errors)),
        ("Kernels", lambda: kernels.__all__),
        ("Training a scorer", lambda: fitting.__all__),
        ("Fields and methods of `Trace`", trace_names),
    ],
    ids=["package", "pruners", "errors", "kernels", "fitting", "trace"],
)
def test_the_page_lists_the_public_names_and_no_others(start, names):
    assert listed(start) == sorted(names())


def test_an_old_name_works_for_one_minor_version_and_says_the_new_one(monkeypatch):
    monkeypatch.setitem(deprecation.RENAMED, "drop", ("patch", "0.2"))
    with pytest.warns(
        DeprecationWarning, match=r"mustdrop\.drop is .*since mustdrop 0\.2.*gone in 0\.3: use mustdrop\.patch"
    ) as said:
        assert mustdrop.drop is mustdrop.patch
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mustdrop.patch


def test_no_old_name_outlives_its_time():
    now = Version(mustdrop.__version__)
    for old, (new, since) in deprecation.RENAMED.items():
        assert new in mustdrop.__all__, old
        assert now < Version(deprecation.gone_in(since)), f"{old} should be gone"


def loaded(code):
    """The modules of a fresh process after some code."""
    ask = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{ask}"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_costs_what_the_page_says():
    bare = loaded("from __future__ import annotations\nimport importlib, typing, warnings")
    assert {name for name in set(loaded("import mustdrop")) - set(bare) if not name.startswith("mustdrop")} == set()
    patching = loaded("import mustdrop; mustdrop.patch")
    own = [name for name in patching if name.partition(".")[0] == "mustdrop"]
    models = [name for name in patching if re.match(r"transformers\.models\.\w+\.modeling_", name)]
    assert models == []
    assert len(own) <= 110
    assert len(patching) <= 2500
    assert "matplotlib" not in patching


def test_the_package_is_no_larger_than_the_page_says():
    files = [path for path in (ROOT / "src").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    folders = ("checkpoint", "page_checkpoint")
    models = [sum(path.stat().st_size for path in files if folder in path.parts) for folder in folders]
    code = sum(path.stat().st_size for path in files) - sum(models)
    assert all(0 < model < 4_500_000 for model in models)
    (said,) = re.findall(r"all but these models is below ([\d.]+) MB", PAGE)
    assert code < float(said) * 1e6


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"]
    assert Version(mustdrop.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "version" not in citation
    assert citation["license"] == PROJECT["license"]


def test_the_supported_versions_are_those_of_the_project():
    minors = [c.rpartition(" :: ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) to ", PAGE, re.MULTILINE))
    assert rows.pop("Python") == minors[0]
    assert f"3.10 to {minors[-1]}" in PAGE
    for line in map(Requirement, PROJECT["dependencies"]):
        if line.name in rows:
            (bound,) = (specifier.version for specifier in line.specifier if specifier.operator == ">=")
            assert rows.pop(line.name) == bound
    assert not rows


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def sessions():
    return set(
        re.findall(
            r"^@nox\.session(?:\(.*\))?\n(?:@.*\n)*def (\w+)", (ROOT / "noxfile.py").read_text("utf-8"), re.MULTILINE
        )
    )


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="an sdist has no workflows")
def test_the_workflows_run_sessions_that_there_are():
    jobs = workflow("ci.yml")["jobs"]
    pythons = jobs["tests"]["strategy"]["matrix"]["python"]
    minors = [c.rpartition(" :: ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert pythons == minors
    asked = [*jobs["checks"]["strategy"]["matrix"]["session"], "tests"]
    asked += [entry["session"] for entry in jobs["tests"]["strategy"]["matrix"]["include"]]
    assert {name.partition("(")[0] for name in asked} <= sessions()
    required = {"tests", "lint", "types", "docs", "dist", "matrix", "backends", "app", "tutorials"}
    assert required <= {name.partition("(")[0] for name in asked}
    for job in ("checks", "tests"):  # without a browser the tests that drive one would be skipped
        assert {"run": "chromedriver --version"} in jobs[job]["steps"], job
    publish = workflow("release.yml")["jobs"]["publish"]
    assert publish["permissions"]["id-token"] == "write"
    assert "password" not in json.dumps(publish)


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="an sdist has no issue forms")
def test_issue_forms_can_be_read_and_a_bug_asks_for_doctor():
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form), path
        fields = [field["id"] for field in form["body"]]
        assert len(fields) == len(set(fields))
        assert any(field.get("validations", {}).get("required") for field in form["body"])
    bug = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    (doctor,) = [field for field in bug["body"] if field["id"] == "doctor"]
    assert doctor["validations"]["required"]


def test_what_it_costs_is_within_its_bounds():
    record = json.loads((RESULTS / "install.json").read_text(encoding="utf-8"))
    assert record["bounds"] == install.BOUNDS  # measured against today's
    assert install.above(record) == []
    assert install.above({"figures": {"a": 3, "b": 1}, "bounds": {"a": 2, "b": 2}}) == ["a: 3 is above 2"]


def test_imports_of_today_load_no_more_modules_than_their_bounds():
    for name, base in (("import", "bare"), ("patch", "base")):
        counts = []
        for one in (name, base):
            done = subprocess.run(
                [sys.executable, "-c", install.CODE[one] + install.COUNT], capture_output=True, text=True, check=True
            )
            counts.append(int(done.stderr.split()[-2]))
        assert counts[0] - counts[1] <= install.BOUNDS[f"modules_of_{name}"]


def test_sizes_are_those_of_files_that_fit_this_machine():
    tags = list(install.platform_tags())
    wheels = [
        {"url": "https://a/b-1-cp311-cp311-musllinux_1_2_x86_64.whl", "size": 1},
        {"url": "https://a/b-1-cp311-cp311-manylinux_2_28_x86_64.whl", "size": 2},
        {"url": "https://a/b-1-cp311-cp311-win_amd64.whl", "size": 4},
    ]
    assert install._size({"wheels": wheels}, tags) == 2
    assert install._size({"wheels": [{"path": "b-1+cpu-py3-none-any.whl"}]}, tags) == 0
    assert install._size({"sdist": {"size": 7}}, tags) == 7
