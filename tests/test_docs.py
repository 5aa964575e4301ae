"""The method of one's own does what its page says (``make docs-check`` executes all pages); what that check refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """docs/check.py."""
    about = importlib.util.spec_from_file_location("docs_check", DOCS / "check.py")
    assert about is not None and about.loader is not None
    module = importlib.util.module_from_spec(about)
    sys.modules["docs_check"] = module
    about.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_examples_of_a_page_do_what_it_says(check: ModuleType) -> None:
    assert check.check(DOCS / "own-methods.md") >= 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```sh\nexit 3\n```", "page.md:1: exit code 3, not 0"),
        ("<!-- docs-check: fails 3 -->\n```sh\nexit 2\n```", "exit code 2, not 3"),
        ("```sh\nfalse\ntrue\n```", "exit code 1"),
        ('```python\nraise SystemExit("no")\n```', "exit code 1"),
        ("<!-- docs-check: prints a c -->\n```sh\necho a b\n```", "does not print: a c"),
        ("<!-- docs-check: skips: x -->\n```sh\ntrue\n```", "no such mark"),
        ("<!-- docs-check: skip: x -->\n\n```sh\ntrue\n```", "stands directly before"),
        ("<!-- docs-check: without b: x -->\n```sh\necho a\n```", "no line holds 'b'"),
    ],
)
def test_what_an_example_does_not_do_is_found(check: ModuleType, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(check.Wrong) as found:
        check.check(tmp_path / "page.md")
    assert said in str(found.value)


def test_blocks_share_a_folder_and_marks_are_heeded(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "<!-- docs-check: file a.txt -->\n```json\n{}\n```\n```sh\nmv a.txt b.txt\n```\n<!-- docs-check: prints {} b.txt -->\n"
        "```python\nimport os\nprint(open('b.txt').read(), sorted(os.listdir())[0])\n```\n```yaml\nnot: read\n```\n"
        "<!-- docs-check: skip: it needs a Hub -->\n```sh\nexit 1\n```\n"
        "<!-- docs-check: without exit: no -->\n```sh\nexit 1\n```\n"
    )
    assert check.check(tmp_path / "page.md") == 4
