"""`python -m fuzz TARGET --seconds N`: atheris generates bytes, guided by the coverage of moe_fn."""

import argparse
import os
import sys
import tempfile


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("target", choices=("config", "family", "checkpoint", "adapter"))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--corpus", default=None, help="a folder where inputs that reach something new are kept from run to run"
    )
    parser.add_argument("--found", default="out/fuzz", help="where the input that broke something is written")
    wanted = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["moe_fn.checkpoint", "moe_fn.config", "moe_fn.families"]):
        from fuzz.targets import TARGETS
    corpus = wanted.corpus or tempfile.mkdtemp()
    os.makedirs(corpus, exist_ok=True)
    os.makedirs(wanted.found, exist_ok=True)
    limits = [
        "-timeout=10",
        "-rss_limit_mb=3000",
        "-malloc_limit_mb=500",
        "-max_len=64",
        "-len_control=0",
        "-print_final_stats=1",
    ]
    run = [f"-max_total_time={wanted.seconds}", f"-seed={wanted.seed}", f"-artifact_prefix={wanted.found}/", corpus]
    target = TARGETS[wanted.target]

    def once(data: bytes) -> None:
        target(data)

    atheris.Setup([sys.argv[0], *limits, *run], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
