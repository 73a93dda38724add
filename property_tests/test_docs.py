"""The code of the README and of the pages in docs/ runs and prints what the pages show; their links, files and names
exist.

A block of Python runs after the blocks above it on its page, in the same namespace. The text after "python" on its
first line changes that. "requires PACKAGES": if one of them is not installed, the rest of the page is skipped. "shown":
the block does not run. A block of "output" below it holds its expected output.
"""

import contextlib
import importlib.util
import io
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tools import options_page

from moe_fn.config.quant import SCHEMES

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
SOURCES = [
    path.as_posix()
    for folder in ("moe_fn", "property_tests", "compile_tests", "shared_tests", "examples")
    for path in (ROOT / folder).rglob("*.*")
]
_BLOCK = re.compile(
    r"^```python(?P<words>[^\n]*)\n(?P<code>.*?)^```\n(?:\n*```output\n(?P<output>.*?)^```$)?", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"\]\((?!https?://)(?P<file>[^)#\s]*)(?:#(?P<heading>[^)\s]*))?\)")

pytestmark = pytest.mark.skipif(not PAGES, reason="installed without the repository")


@dataclass(frozen=True)
class Block:
    """A block of Python: the text after "python" on its first line, its code, its line on the page, and its expected
    output (None: any).
    """

    words: tuple[str, ...]
    code: str
    line: int
    output: str | None


def blocks_of(page: str) -> list[Block]:
    found = [
        Block(tuple(match["words"].split()), match["code"], page.count("\n", 0, match.start("code")), match["output"])
        for match in _BLOCK.finditer(page)
    ]
    assert len(found) == len(re.findall(r"^```python", page, re.MULTILINE)), "a block of Python has no end"
    return found


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs a test in an empty folder, with no compiled graphs, and with torch's seed 0."""
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path) -> None:
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks_of(page.read_text()):
        match block.words:
            case ("shown",):
                continue
            case ("requires", *packages) if packages:
                if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
                    pytest.skip(f"line {block.line} of {page.name} and what follows: needs {', '.join(missing)}")
            case words:
                assert words == (), (
                    f"{page.name}:{block.line}: python {' '.join(words)}; expected nothing, 'requires PACKAGES' or "
                    "'shown'"
                )
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        if block.output is not None:
            assert printed.getvalue() == block.output, f"{page.name}:{block.line}"


def headings_of(page: Path) -> set[str]:
    """Returns headings as fragments of links: lower case, without punctuation, hyphens for spaces."""
    lines = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).splitlines()
    return {
        re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
        for line in lines
        if line.startswith("#")
    }


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.stem)
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    for link in _LINK.finditer(page.read_text()):
        file = page.parent / link["file"] if link["file"] else page
        assert not link["file"].startswith("/") and file.exists(), (
            f"{page.name}: {link['file']} is no relative path of a file"
        )
        assert link["heading"] is None or link["heading"] in headings_of(file), (
            f"{page.name}: {file.name} has no heading {link['heading']}"
        )


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.stem)
def test_files_and_names_on_a_page_are_there(page: Path) -> None:
    text = page.read_text()
    for name in set(re.findall(r"(?<![\w/.])[\w/]+\.(?:py|cpp|h)\b", text)):
        assert any(path.endswith(f"/{name}") for path in SOURCES), f"{page.name}: {name} is no file of the repository"
    for name in set(re.findall(r"`(moe_fn(?:\.\w+)+)", text)):
        try:
            pkgutil.resolve_name(name)
        except ModuleNotFoundError as error:
            assert not (error.name or "").startswith("moe_fn"), (
                f"{page.name}: {name} is no name of the package"
            )  # otherwise a package of an extra
        except AttributeError:
            raise AssertionError(f"{page.name}: {name} is no name of the package") from None


def test_a_broken_page_is_noticed() -> None:
    (block,) = blocks_of("# A\n\n```python requires torch\nprint(1)\n```\n\n```output\n2\n```\n")
    assert block == Block(("requires", "torch"), "print(1)\n", 3, "2\n")
    with pytest.raises(AssertionError, match="no end"):
        blocks_of("```python\nx = 1\n")


def test_names_of_options_are_on_their_pages() -> None:
    page = options_page.PAGE.read_text()
    assert options_page.written(page) == page, "make pages writes it"
    quantization = (ROOT / "docs" / "quantization.md").read_text()
    assert not [name for name in SCHEMES if f"`{name}`" not in quantization]
