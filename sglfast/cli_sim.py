"""The command `sglfast sim` as users call it: the simulator, and for its weights a real ModelExpress client.

Runs in: the process of `sglfast sim`. Why here: the rooms sim and modelexpress never import each other, so that either runs without the
    other; this is the floor that may know both. sim says what it needs (sim/weights.py: WeightDirectory), cli_weights.py has it by gRPC.
"""

from sglfast.errors import ConfigError
from sglfast.sim import main as sim
from sglfast.sim.settings import SimSettings
from sglfast.sim.weights import WeightDirectory


def open_directory(settings: SimSettings) -> WeightDirectory:
    """The metadata service of --mx-server. Call it in a running loop; raises ConfigError without grpc or for a bad address."""
    try:
        from sglfast.cli_weights import ModelExpressDirectory  # late: only who plays weights needs grpc
    except ImportError as error:
        raise ConfigError(f"--mx-server needs grpc ({error}): pip install 'sglfast[modelexpress]'") from error
    return ModelExpressDirectory(settings)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    return sim.main(argv, open_directory)
