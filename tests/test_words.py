"""One word per idea: words that the glossary gives up are in no name of the code, and in no text of code or pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import check_links
import mustdrop

ROOT = Path(__file__).parents[1]
PACKAGE = Path(mustdrop.__file__).parent
GLOSSARY = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
HEADING = "## Words that are not used"


def given_up() -> set[str]:
    """The words of the first column of the glossary's table, without what stands in brackets."""
    table = GLOSSARY.partition(HEADING)[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")][2:]
    return {word.strip() for cell in cells for word in re.sub(r"\(.*?\)", "", cell).split(",")}


# "chosen" is given up as the name of a class: of picks by a kernel it is plain English
IN_NAMES = {word for word in given_up() if " " not in word}
IN_TEXTS = given_up() - {"chosen", "somebody"}
# what pages say in the words of the field: after the encoder, as many, the name of what is given
OWN_WORDS = r"(?:its|their) kin|so many|told (?:by|of|to)|behind (?:the|it|them|features|encoders?)"


def words(identifier: str) -> set[str]:
    """`WordsOf_an_identifier` -> words, of, an, identifier."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


def names(tree: ast.Module) -> set[str]:
    """Everything that a module names: classes, functions, arguments, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        for field in ("name", "arg", "id", "attr"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                found.add(name)
    return found


def test_no_name_has_a_word_that_was_given_up():
    wrong = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        found = names(ast.parse(path.read_text(encoding="utf-8"))) | set(inside.with_suffix("").parts)
        wrong |= {f"{inside}: {name}" for name in found if words(name) & (IN_NAMES - {"chosen"})}
        wrong |= {f"{inside}: {name}" for name in found if name[:1].isupper() and "chosen" in words(name)}
    assert wrong == set()


def test_no_text_has_a_word_that_was_given_up():
    in_code = r"\b(" + "|".join(IN_TEXTS) + r")\b(?! memory)"  # memory can be pinned, and so can versions
    in_pages = in_code.replace(r"\b(", rf"\b(somebody|{OWN_WORDS}|", 1)
    wrong = []
    pages = [(Path(page), in_pages) for page in check_links.documents(ROOT)]
    pages = [page for page in pages if page[0].name != "CHANGELOG.md"]  # it names old names
    for path, pattern in [*pages, *((path, in_code) for path in sorted(PACKAGE.rglob("*.py")))]:
        text = path.read_text(encoding="utf-8")
        if path.name == "glossary.md":
            text = text.replace(GLOSSARY.partition(HEADING)[2].partition("\n## ")[0], "")
        lines = [line for line in text.splitlines() if re.search(pattern, line, re.I)]
        wrong += [f"{path.relative_to(ROOT)}: {line}" for line in lines if "versions are pinned" not in line]
    assert wrong == []


def test_the_table_is_read():
    assert {"pinned", "tap", "oracle", "in one go"} <= given_up()
