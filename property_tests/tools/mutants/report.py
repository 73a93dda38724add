"""The report of mutation testing: killed and survived by file, and reasons why survivors are equivalent programs."""

import json
import platform
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import date
from difflib import SequenceMatcher
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.mutants.areas import AREAS
from tools.mutants.made import mutants_of, source_hash
from tools.mutants.same import OPEN, SAME, reason_of

Line = Mapping[str, Any]


def report(found: Path, sampled: Path) -> str:
    """Returns Markdown of all mutants of the stages and of the samples of the areas.

    The last run of a mutant counts; mutants of sources that have changed since are left out.
    """
    last = {line["id"]: line for line in map(json.loads, found.read_text().replace("`", "").splitlines())}
    of_file: dict[str, list[Line]] = defaultdict(list)
    for line in last.values():
        of_file[line["file"]].append(line)
    kept = {file: _of_now(file, lines) for file, lines in sorted(of_file.items())}
    lines = [line for lines in kept.values() for line in lines]
    alive = [line for line in lines if line["verdict"] == "survived"]
    unknown = [line for line in alive if reason_of(line["file"], line["change"]) is None]
    rows = [_row(file, lines) for file, lines in kept.items()]
    rows.append(_row("**all**", lines))
    killers = Counter(line["by"].split("::")[-1].split("[")[0] for line in lines if line["by"])
    return "\n".join(
        (
            *_heading(),
            "| file | mutants | killed | survived | of these the same program | killed, % |",
            "|---|---:|---:|---:|---:|---:|",
            *rows,
            "",
            "Tests with most kills: " + ", ".join(f"{name} {count}" for name, count in killers.most_common(8)) + ".",
            "",
            "## Survivors that are the same program",
            "",
            *(text for name in SAME for text in _of_reason(name, alive)),
            "## Survivors without such a reason",
            "",
            OPEN.strip(),
            "",
            *(f"- {_where(line)}" for line in unknown),
            "",
            report_of_areas(sampled),
        )
    )


def _made_of() -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = f"mutmut {version('mutmut')}, torch {version('torch')}, Python {platform.python_version()}"
    return f"{date.today()}, sources of commit {commit or 'unknown'}, {versions}."


def _heading() -> tuple[str, ...]:
    return (
        "# Mutation testing",
        "",
        f"{_made_of()} `make mutants` makes this page again.",
        "",
        "A mutant is the code with one small change: another operator or number, an argument less or None, a condition "
        "negated. It",
        "is killed if a test fails. First the file's doctests and two or three laws of the whole layer run, with 25 "
        "examples each; for",
        "survivors, the tests of the stages and of the file (`property_tests/tools/mutants/judges.py`). Not "
        "mutated: annotations,",
        "docstrings, texts of errors, and functions with decorators, which mutmut does not change. A crash, a failing "
        "import and a run",
        "of minutes count as killed.",
        "",
    )


def report_of_areas(sampled: Path) -> str:
    """Returns Markdown of the samples: a row for each area, and the survivors."""
    last = {line["id"]: line for line in map(json.loads, sampled.read_text().replace("`", "").splitlines())}
    lines = [line for line in last.values() if line["of"] == source_hash(line["file"])]
    of_area = {name: [line for line in lines if line["area"] == name] for name in AREAS}
    alive = [line for line in lines if line["verdict"] == "survived"]
    text = [
        "## Samples of the areas around the stages",
        "",
        _made_of(),
        "",
        "A fixed sample of mutants of every file, with the area's tests (`property_tests/tools/mutants/areas.py`): "
        "those inside functions in",
        "forks of one process that has collected the tests (`python -m tools.mutants quick`); "
        "those of tables and defaults in a process each.",
        "Survivors are checked by mypy, as in `make test`, and by tests that were written since. Triton kernels are "
        "changed token by",
        "token (`tools/mutants/triton.py`); for C++ see `make mutants-cpp`.",
        "",
        "| area | mutants | killed | survived | of these the same program | killed, % |",
        "|---|---:|---:|---:|---:|---:|",
        *(_row(name, area) for name, area in of_area.items() if area),
        _row("**all**", lines),
        "",
        *(f"- {_where(line)}: {reason_of(line['file'], line['change']) or 'no test fails'}" for line in alive),
    ]
    return "\n".join(text)


def _of_now(file: str, lines: list[Line]) -> list[Line]:
    now = {mutant.id for mutant in mutants_of(file)}
    return [line for line in lines if line["id"] in now]


def _row(name: str, lines: list[Line]) -> str:
    alive = [line for line in lines if line["verdict"] == "survived"]
    same, killed = sum(reason_of(line["file"], line["change"]) is not None for line in alive), len(lines) - len(alive)
    return f"| {name} | {len(lines)} | {killed} | {len(alive)} | {same} | {100 * killed / max(len(lines), 1):.1f} |"


def _of_reason(name: str, alive: list[Line]) -> list[str]:
    mine = [line for line in alive if reason_of(line["file"], line["change"]) == name]
    return [f"**{name}**", "", *(f"- {_where(line)}" for line in mine), ""] if mine else []


def _where(line: Line) -> str:
    return f"{line['file'].removeprefix('moe_fn/')}:{line['line']} `{_short(line['change'])}`"


def _short(change: str) -> str:
    """Shortens a change to the tokens around the difference."""
    old, new = (
        (re.findall(r"\w+|\s+|[^\w\s]", text) for text in change.split(" -> ", 1))
        if " -> " in change
        else ([change], [""])
    )
    codes = [code for code in SequenceMatcher(None, old, new, False).get_opcodes() if code[0] != "equal"]
    first, last = codes[0], codes[-1]
    pieces = ((old, first[1], last[2]), (new, first[3], last[4]))
    return " -> ".join("".join(words[max(start - 8, 0) : stop + 5]).strip() for words, start, stop in pieces)
