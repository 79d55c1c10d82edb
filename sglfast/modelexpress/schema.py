"""The messages of the API, or a sentence that says what to install or to build.

Runs in: every process that speaks ModelExpress. Contract: `p2p` and `health` are the modules built from p2p.proto and health.proto;
    import them from here. A missing extra raises ImportError at the first import with the command that installs it.
Paths of the methods: `P2P_SERVICE`/PublishMetadata and so on, all unary, as spec/modelexpress.md 1 lists them.
"""

import sglfast.modelexpress.pool  # noqa: F401  (first: its error names the extra)

try:
    from sglfast.modelexpress import health_pb2 as health
    from sglfast.modelexpress import p2p_pb2 as p2p
except ImportError as error:
    raise ImportError(
        f"the modules of the ModelExpress schema are not built ({error}); build them: make build, or pip install ."
    ) from error

P2P_SERVICE = "model_express.p2p.P2pService"
HEALTH_SERVICE = "model_express.health.HealthService"
DEFAULT_PORT = 8001

__all__ = ["DEFAULT_PORT", "HEALTH_SERVICE", "P2P_SERVICE", "health", "p2p"]
