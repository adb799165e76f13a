"""The state on the device, and all that an engine does with it. One thread owns it: its buffers are donated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from specjax.decoding.prefill import Text
from specjax.serving import programs as device
from specjax.serving.programs import NUMBERS, Choices, Programs, Results
from specjax.state import DecodeState, Logprobs
from specjax.types import Automaton, Inputs, Params


class Rows(NamedTuple):
    """The results of a call on the host; each field leads with the rows.

    Attributes:
      numbers: by the names of `programs.NUMBERS`.
      accepted: `[B, D]` accepted draft tokens by position, since the row was inserted.
      tokens: `[B, W]` the new tokens, `length - begin` of them.
      from_draft: `[B, W]` whether each was a draft token.
      logprobs: `[B, W]`, or None where they were not fetched.
    """

    numbers: dict[str, np.ndarray]
    accepted: np.ndarray
    tokens: np.ndarray
    from_draft: np.ndarray
    logprobs: Logprobs | None


def _device_of(params: Params) -> Any:
    """Where the parameters lie."""
    arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    return next(iter(arrays[0].devices())) if arrays else jax.local_devices()[0]


class Device:
    """The rows of an engine: a batch of one of a few sizes."""

    def __init__(
        self,
        programs: Programs,
        params: Params,
        batch_sizes: Sequence[int],
        chunk_widths: Sequence[int],
        choices: Choices,
        grammar: Automaton,
        mesh: Mesh | None = None,
    ):
        """Nothing is allocated or compiled yet (`warm`).

        Args:
          programs: what to compile.
          params: the parameters of both sides.
          batch_sizes: B, in increasing order.
          chunk_widths: C, in increasing order.
          choices: of some request, for shapes.
          grammar: the empty table of grammars.
          mesh: that the parameters lie on, or None.
        """
        self.programs = programs
        if mesh is not None:
            self._whole, self._commit = NamedSharding(mesh, PartitionSpec()), lambda tree: tree
        else:
            # Programs are compiled anew for arrays that are bound to a device, as those of checkpoints are, where they
            # were compiled for arrays that are not. So all are, from the beginning.
            self._whole = SingleDeviceSharding(_device_of(params))
            self._commit = self._put
        self.params = self._commit(params)
        self.batch_sizes, self.chunk_widths = tuple(batch_sizes), tuple(chunk_widths)
        self.choices, self._grammar = choices, self._put(grammar)
        depth = programs.drafter.topology.depth
        self.step_costs = {size: np.ones(depth + 1, np.float32) for size in self.batch_sizes}
        self.step_seconds = dict.fromkeys(self.batch_sizes, 0.0)
        self.batch_size = self.batch_sizes[0]
        self.state: DecodeState | None = None

    def allocate(self, batch_size: int) -> None:
        """Begins with rows that are all done."""
        self.batch_size, self.state = batch_size, None
        self.state = self._commit(device.empty(*self.empty_arguments(batch_size)))

    def empty_arguments(self, batch_size: int) -> tuple[Any, ...]:
        """What `programs.empty` makes rows of that are all done."""
        return self.programs, batch_size, self.choices, self._put(self.step_costs[batch_size]), self._grammar

    def _held(self) -> DecodeState:
        assert self.state is not None, "allocate() comes first"
        return self.state

    def insert(self, slot: int, text: Text, choices: Choices) -> None:
        """Writes a row; the text may be inserted again."""
        self.state = device.insert(self.programs, self._held(), np.int32(slot), text, choices)

    def resize(self, source: Sequence[int]) -> None:
        """Changes the batch: row i is the old row `source[i]`, or none at -1; as many as one of the batch sizes."""
        state = device.resize(self.programs, self._held(), np.asarray(source, np.int32))
        self.batch_size = len(source)
        self.state = state._replace(
            shared=state.shared._replace(step_costs=self._put(self.step_costs[self.batch_size]))
        )

    def _put(self, tree: Any) -> Any:
        """Whole on every device, however often it is replaced."""
        return jax.device_put(tree, self._whole)

    def set_grammar(self, table: Automaton) -> None:
        """Replaces the table of grammars; the states of running rows keep their numbers."""
        self._grammar = self._put(table)
        state = self._held()
        self.state = state._replace(shared=state.shared._replace(grammar=self._grammar))

    def advance(self, stop: np.ndarray, num_steps: int, *, leave_early: bool) -> Results:
        """Starts a call; returns at once."""
        self.state, results = device.advance(
            self.programs, self.params, self._held(), stop, np.int32(num_steps), np.bool_(leave_early)
        )
        results.numbers.copy_to_host_async()
        return results

    def begin(self) -> Text:
        """An empty text."""
        return self._commit(device.begin(self.programs))

    def read(self, text: Text, inputs: Inputs) -> Text:
        """Reads a chunk; the text before is donated."""
        return device.read(self.programs, self.params, text, inputs)

    def read_scored(self, text: Text, inputs: Inputs, following: np.ndarray) -> tuple[Text, Logprobs]:
        """Reads a chunk and scores the tokens that follow; the text before is donated."""
        return device.read_scored(self.programs, self.params, text, inputs, following)

    def rewind(self, length: int) -> None:
        """All rows run, with as many tokens each."""
        self.state = device.rewind(self.programs, self._held(), np.int32(length))

    def set_costs(self, costs: np.ndarray) -> None:
        """Sets the step costs of the present batch alone, for measurements."""
        state = self._held()
        self.state = state._replace(shared=state.shared._replace(step_costs=self._put(costs)))


def to_host(programs: Programs, results: Results, *, with_logprobs: bool) -> Rows:
    """Waits for a call and takes its results apart.

    Args:
      programs: what it ran.
      results: of `Device.advance`.
      with_logprobs: whether they are needed; they are larger than all else.
    """
    depth, window = programs.drafter.topology.depth, programs.window
    packed = np.asarray(results.numbers)
    sizes = [len(NUMBERS), depth, window, window]
    numbers, accepted, tokens, drafted = np.split(packed, np.cumsum(sizes)[:-1], axis=1)
    logprobs = jax.tree.map(np.asarray, results.logprobs) if with_logprobs else None
    return Rows(dict(zip(NUMBERS, numbers.T, strict=True)), accepted, tokens, drafted.astype(bool), logprobs)


def state_bytes(programs: Programs, batch_size: int, choices: Choices, grammar: Automaton) -> int:
    """The memory of a state, from shapes alone."""
    costs = np.ones(programs.drafter.topology.depth + 1, np.float32)
    build: Callable[..., Any] = functools.partial(device.empty, programs, batch_size)
    shapes = jax.eval_shape(build, choices, costs, grammar)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
