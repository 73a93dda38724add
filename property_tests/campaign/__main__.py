"""python -m campaign, with property_tests on the path: random problems, each compared with its own error bound.

run      checks problems, and continues where the last run stopped;  show     checks one problem again
measure  measures errors at the widths of models, and over ranks;    report   writes tables of a folder as Markdown
"""

import argparse
import json
import sys
from pathlib import Path

from campaign.checking import check
from campaign.drawing import problem_of
from campaign.measuring import Measured, measure_wide
from campaign.numerics import numerics
from campaign.ranks import measure_ranks
from campaign.report import as_json, report
from campaign.running import about, lines_of, run
from moe_fn.kernels.native import library as native

_MEASURED = "measured.json"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns 1 if a problem failed."""
    options = _parser().parse_args(arguments)
    if options.command == "run":
        lines = run(options.out, options.problems, options.seed, options.workers, options.seconds, options.level)
        bad = [line for line in lines if line.failures]
        print(f"{len(lines)} problems of {options.problems}, {len(bad)} failed")
        for line in bad:
            print(f"--seed {line.seed} --index {line.index}: {'; '.join(line.failures)}")
        return int(bool(bad))
    if options.command == "measure":
        options.out.mkdir(parents=True, exist_ok=True)
        rows = [row.to_dict() for row in (*measure_wide(), *measure_ranks())]
        (options.out / _MEASURED).write_text(json.dumps(rows, indent=0) + "\n")
        return int(any(row["share"] > 1 for row in rows))
    if options.command == "report":
        return _report(options.out, options.to)
    line = check(options.seed, options.index)
    print(problem_of(options.seed, options.index))
    print("\n".join(f"{name}: {value}" for name, value in line.to_dict().items()))
    return int(bool(line.failures))


def _report(out: Path, to: Path) -> int:
    """Writes the pages. Returns 1 if a problem failed."""
    lines, facts = lines_of(out), about(out)
    path = out / _MEASURED
    measured = [Measured(**row) for row in json.loads(path.read_text())] if path.exists() else []
    to.mkdir(parents=True, exist_ok=True)
    (to / "campaign.md").write_text(report(lines, facts))
    (to / "campaign.json").write_text(json.dumps(as_json(lines, facts), separators=(",", ":")) + "\n")
    (to / "numerics.md").write_text(numerics(lines, facts, measured))
    return int(any(line.failures for line in lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="PYTHONPATH=property_tests python -m campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="check problems, and go on where the last run stopped")
    running.add_argument(
        "--problems", type=int, default=20_000, help="how many, indices 0 .. problems - 1; default 20000"
    )
    running.add_argument("--seed", type=int, default=0)
    running.add_argument(
        "--out", type=Path, default=Path("out/campaign"), help="folder of the lines; default out/campaign"
    )
    running.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    running.add_argument("--seconds", type=float, default=None, help="stop after so long; the next run goes on")
    levels = (*native.LEVELS, native.EMULATED_AMX)
    running.add_argument("--level", choices=levels, default=None, help="of the C++ kernels; default this CPU's best")
    reporting = commands.add_parser(
        "report", help="write campaign.md, campaign.json and numerics.md of a folder's lines"
    )
    reporting.add_argument(
        "--out", type=Path, default=Path("out/campaign"), help="folder of the lines; default out/campaign"
    )
    reporting.add_argument(
        "--to", type=Path, default=Path("out/campaign"), help="where the pages go; default out/campaign"
    )
    measuring = commands.add_parser("measure", help="errors at the widths of models and over ranks, for numerics.md")
    measuring.add_argument(
        "--out", type=Path, default=Path("out/campaign"), help="folder of the lines; default out/campaign"
    )
    showing = commands.add_parser("show", help="check one problem again, and print it")
    showing.add_argument("--seed", type=int, default=0)
    showing.add_argument("--index", type=int, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
