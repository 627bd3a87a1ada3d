"""What `nox -s dist` finds wrong with an sdist or a wheel: too much, too little, too large, not ready."""

from __future__ import annotations

import io
import tarfile
import zipfile

import pytest

import distribution

METADATA = "Metadata-Version: 2.4\nName: mustdrop\nVersion: 1.2.0\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of a few files, all of which git would know."""
    root = tmp_path / "project"
    for name in ("src/mustdrop/__init__.py", "src/mustdrop/extras.py", "README.md", "tests/golden/a.npz", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".git").mkdir()
    known = {str(p.relative_to(root).as_posix()) for p in root.rglob("*") if p.is_file()}
    monkeypatch.setattr(distribution, "tracked", lambda root: known)
    monkeypatch.setattr(distribution, "MUST_BE_IN_WHEEL", ("mustdrop/__init__.py",))
    return root


def sdist(folder, *names):
    path = folder / "mustdrop-1.2.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"mustdrop-1.2.0/{name}"), io.BytesIO())
    return path


def wheel(folder, *names, metadata=METADATA):
    path = folder / "mustdrop-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        archive.writestr("mustdrop-1.2.0.dist-info/METADATA", metadata)
        archive.writestr("mustdrop-1.2.0.dist-info/licenses/LICENSE", "")
    return path


GOOD = ("PKG-INFO", "README.md", "src/mustdrop/__init__.py", "src/mustdrop/extras.py")


def test_an_sdist_holds_the_project_and_nothing_else(project, tmp_path):
    assert list(distribution.sdist_problems(sdist(tmp_path, *GOOD), project)) == []
    (lacks,) = distribution.sdist_problems(sdist(tmp_path, *GOOD[:-1]), project)
    assert "lacks src/mustdrop/extras.py" in lacks
    for extra in ("notes.txt", "tests/golden/a.npz", "docs/of_somebody.md"):
        (more,) = distribution.sdist_problems(sdist(tmp_path, *GOOD, extra), project)
        assert f"holds {extra}" in more
    found = list(distribution.sdist_problems(sdist(tmp_path, *GOOD, "src/__pycache__/x.pyc"), project))
    assert "should not hold" in found[0]


def test_a_wheel_holds_the_package_alone(project, tmp_path):
    good = ("mustdrop/__init__.py", "mustdrop/extras.py")
    assert list(distribution.wheel_problems(wheel(tmp_path, *good), project)) == []
    (more,) = distribution.wheel_problems(wheel(tmp_path, *good, "tests/x.py"), project)
    assert more.endswith("should not hold tests/x.py")
    (lacks,) = distribution.wheel_problems(wheel(tmp_path, good[0]), project)
    assert lacks.endswith("lacks mustdrop/extras.py")


def test_sizes_have_limits(project, tmp_path, monkeypatch):
    monkeypatch.setattr(distribution, "LARGEST_SDIST", 10)
    (large,) = distribution.sdist_problems(sdist(tmp_path, *GOOD), project)
    assert "the limit is" in large


def test_nothing_is_published_under_another_tag_or_before_it_has_an_address(project, tmp_path):
    (project / "CHANGELOG.md").write_text("## [Unreleased]\n")
    built = wheel(tmp_path, "mustdrop/__init__.py")
    found = "\n".join(distribution.release_problems(built, "v1.3.0", project))
    assert "the tag is v1.3.0" in found
    assert "Repository" in found
    assert "no section [1.2.0]" in found
    assert "PUBLISHED" in found
    (project / "CHANGELOG.md").write_text("## [1.2.0]\n")
    (project / "src/mustdrop/extras.py").write_text("PUBLISHED = True\n")
    ready = wheel(
        tmp_path, "mustdrop/__init__.py", metadata=METADATA + "Project-URL: Repository, https://example.org\n"
    )
    assert list(distribution.release_problems(ready, "v1.2.0", project)) == []
