"""The functions that models and drafters are made of: their arguments, results and shapes.

`types` puts them together; axis names are explained there.
"""

from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from specjax.types import Batch, Block, Context, Feedback, Inputs, Model, ModelOutput, Params, Proposal


class InitCache(Protocol):
    """Makes an empty cache, for rows of at most `max_len` tokens and sources of `max_source` (0: no encoder)."""

    def __call__(self, batch_size: int, max_len: int, max_source: int = 0) -> Any:
        """An empty cache."""
        ...


class Prefill(Protocol):
    """Reads a prompt, or any chunk of one, behind the cache and commits it."""

    def __call__(self, params: Any, inputs: "Inputs", cache: Any) -> tuple["ModelOutput", Any]:
        """The output, with the logits of each row's last token only (`[B, 1, V]`), and the cache."""
        ...


class Apply(Protocol):
    """Reads a block behind the cache without committing it."""

    def __call__(self, params: Any, block: "Block", cache: Any) -> tuple["ModelOutput", Any]:
        """The output, and the cache with the block's entries behind its length, which stays."""
        ...


class Commit(Protocol):
    """Keeps entries of the last block."""

    def __call__(self, cache: Any, path: Int[Array, "B P"] | None, count: Int[Array, " B"]) -> Any:
        """The cache, longer by `count` entries: those at `path[:count]` of the last block, in this order."""
        ...


class Score(Protocol):
    """The logits of packed sequences to train on."""

    def __call__(self, params: Any, batch: "Batch") -> Float[Array, "B T V"]:
        """`[B, T, V]`, without a cache."""
        ...


class WithTaps(Protocol):
    """The same model with tapped layers."""

    def __call__(self, taps: tuple[int, ...]) -> "Model":
        """The model whose `features` are the hidden states number `taps`."""
        ...


class InitDrafter(Protocol):
    """Makes the state of a drafter that has seen nothing, as long as `Model.init_cache` would."""

    def __call__(self, batch_size: int, max_len: int, max_source: int = 0) -> Any:
        """The state; all of its arrays lead with the batch axis."""
        ...


class Propose(Protocol):
    """Proposes draft tokens for all rows."""

    def __call__(self, params: "Params", state: Any, cache: Any, context: "Context") -> tuple["Proposal", Any, Any]:
        """The proposal, the state, and the target's cache."""
        ...


class Update(Protocol):
    """Learns what was committed."""

    def __call__(self, params: "Params", state: Any, feedback: "Feedback") -> Any:
        """The state."""
        ...
