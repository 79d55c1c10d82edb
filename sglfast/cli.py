"""The command `sglfast`: picks a subcommand and hands its flags on. Loads nothing but the part that was asked for."""

import importlib
import sys

from sglfast import __version__
from sglfast.errors import SglfastError

# name -> (module with `main(argv) -> exit code`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("sglfast.control.main", "start the router in front of a pool of workers"),
    "check-config": ("sglfast.control.check_config", "say what `serve` with the same flags would run"),
    "demo": ("sglfast.load.demo", "start simulated workers and the router, and show what to try"),
    "sim": ("sglfast.cli_sim", "simulate SGLang workers: HTTP, KV cache, KV events, faults"),
    "explain": ("sglfast.load.explain", "ask a router which worker it would choose for a request, and why"),
    "replay": ("sglfast.load.replay", "replay a request trace against a router, or compare policies"),
    "modelexpress": ("sglfast.modelexpress.main", "serve the metadata by which new workers load weights from running ones"),
}


def usage() -> str:
    """The text of `sglfast --help`."""
    rows = "\n".join(f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"sglfast {__version__}: the front door of a pool of SGLang workers\n\n"
        f"usage: sglfast COMMAND [FLAGS]\n\ncommands:\n{rows}\n\n"
        "`sglfast COMMAND --help` explains a command. Start with: sglfast demo"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the subcommand named by the first argument; returns the process's exit code."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(f"sglfast {__version__}")
        return 0
    if args[0] not in COMMANDS:
        if args[0].startswith("-"):
            print(f"sglfast: {args[0]}: flags follow a command, such as `sglfast serve {args[0]}`", file=sys.stderr)
        else:
            print(f"sglfast: there is no command {args[0]!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[args[0]][0])
    try:
        code: int = module.main(args[1:])
    except SglfastError as error:
        print(f"sglfast {args[0]}: {error}", file=sys.stderr)
        return 2
    return code
