"""Instructions per call of the cases in icount_cases.py, held against the budgets in icount.json.

    .venv/bin/python bench/icount.py                all cases; exit code 1 if one is more than 2 % above its budget
    .venv/bin/python bench/icount.py page_keys      the cases whose name contains this
    .venv/bin/python bench/icount.py --write        measure and write new budgets

Each case runs twice under callgrind, with 100 and with 1,100 calls; the difference / 1,000 is free of start-up and, with fixed
addresses and hash seed, the same on every run. Python's version and the compiler move the numbers, so with others than those
that the budgets were made with the table is printed but nothing is judged.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from icount_cases import CASES

FEW, MANY = 100, 1100
TOLERANCE = 0.02
TIMEOUT_S = 600
HERE = Path(__file__).parent
BUDGETS = HERE / "icount.json"
RUNNER = [sys.executable, str(HERE / "icount_cases.py")]
VALGRIND = ["setarch", "-R", "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]


class CountError(Exception):
    """A case cannot be counted; the text says why."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Instructions per call, held against the budgets in bench/icount.json.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only cases whose name contains one of these")
    parser.add_argument("--write", action="store_true", help="write the counts as new budgets")
    options = parser.parse_args()
    names = [name for name in CASES if not options.names or any(part in name for part in options.names)]
    try:
        if not names:
            raise CountError(f"no case is named like {' '.join(options.names)}: there are {', '.join(CASES)}")
        with ThreadPoolExecutor(max_workers=min(2, len(os.sched_getaffinity(0)))) as threads:
            counts = dict(zip(names, threads.map(instructions, names), strict=True))
    except CountError as error:
        print(f"icount: {error}", file=sys.stderr)
        return 2
    stored = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    budgets = stored.get("instructions_per_call", {})
    passed = report(counts, budgets)
    if options.write:
        kept = {name: budget for name, budget in budgets.items() if name in CASES}
        merged = dict(sorted((kept | counts).items()))
        BUDGETS.write_text(json.dumps({"made_with": made_with(), "instructions_per_call": merged}, indent=2) + "\n")
        print(f"icount: wrote {BUDGETS}")
        return 0
    if stored.get("made_with", made_with()) != made_with():
        print(f"icount: budgets were made with {stored['made_with']}, this is {made_with()}: shown, not judged")
        return 0
    return 0 if passed else 1


def report(counts: dict[str, int], budgets: dict[str, int]) -> bool:
    """Print the table. True if every count is within its budget."""
    passed = True
    print(f"{'instructions per call':45}{'counted':>12}{'budget':>12}")
    for name, count in counts.items():
        budget = budgets.get(name)
        if budget is None:
            verdict = "no budget: make icount ARGS=--write"
        elif count > budget * (1 + TOLERANCE):
            verdict = f"{count / budget - 1:+.1%}  TOO MANY"
        else:
            verdict = f"{count / budget - 1:+.1%}"
        passed &= budget is not None and count <= budget * (1 + TOLERANCE)
        print(f"{name:45}{count:12,}{budget or 0:12,}  {verdict}")
    return passed


def instructions(name: str) -> int:
    """Instructions of one call. Raises CountError."""
    environment = os.environ | {"PYTHONHASHSEED": "0", "SGLFAST_SHA": "portable", "PYTHONPATH": str(HERE.parent)}
    run([*RUNNER, name, "1"], environment)  # shows a broken case fast, and leaves all bytecode written
    few, many = (collected(run([*VALGRIND, *RUNNER, name, str(times)], environment)) for times in (FEW, MANY))
    return round((many - few) / (MANY - FEW))


def run(command: list[str], environment: dict[str, str]) -> str:
    """Standard error of a command. Raises CountError."""
    if shutil.which(command[0]) is None or (command[0] == VALGRIND[0] and shutil.which("valgrind") is None):
        raise CountError("setarch and valgrind are needed (apt-get install util-linux valgrind)")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise CountError(f"`{' '.join(command)}` ended with code {done.returncode}:\n{done.stderr}")
    return done.stderr


def collected(text: str) -> int:
    found = re.search(r"Collected : (\d+)", text)
    if found is None:
        raise CountError(f"callgrind printed no count:\n{text}")
    return int(found[1])


def made_with() -> dict[str, str]:
    """What moves the numbers besides our code."""
    compiler = (sysconfig.get_config_var("CC") or "gcc").split()[0]
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=False).stdout.strip()
    return {"python": platform.python_version(), "machine": platform.machine(), "compiler": f"{compiler} {version}"}


if __name__ == "__main__":
    sys.exit(main())
