"""Ray's router by prefix, for the replicas of `ray_app`: a prompt goes where its beginning has been read before.

The router and its tree of prompts are Ray's own (`PrefixCacheAffinityRouter`). Ray exports it at
`ray.serve.llm.request_router`, which needs the packages of its own server of language models (vLLM or SGLang, and
pyarrow); hence the import from where it is.
"""

import contextlib
import logging
from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import (  # pyright: ignore[reportMissingImports]
    PrefixCacheAffinityRouter,
)
from ray.serve._private.request_router.pow_2_router import (  # pyright: ignore[reportMissingImports]
    PowerOfTwoChoicesRequestRouter,
)

log = logging.getLogger("ray.serve")


class PrefixRouter(PrefixCacheAffinityRouter):
    """Chooses the replica that has read the longest part of a prompt, while no replica is much busier than another.

    Where the tree of prompts fails, or names a replica that has died in between, Ray's default chooses: an error within
    a router would leave the request waiting for ever.
    """

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[Any]:
        """The candidates for one request, best first."""
        try:
            return await super().choose_replicas(candidate_replicas, pending_request)
        except Exception as error:
            log.warning("routing by prefix failed (%s: %s)", type(error).__name__, error)
            default: Any = PowerOfTwoChoicesRequestRouter.choose_replicas
            return await default(self, candidate_replicas, pending_request)

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Remembers the prompt."""
        with contextlib.suppress(Exception):
            super().on_request_routed(pending_request, replica_id, result)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Forgets a replica."""
        with contextlib.suppress(Exception):
            super().on_replica_actor_died(replica_id)
