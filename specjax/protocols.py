"""The functions that models and drafters are made of: their arguments, results and shapes.

`types` combines them, and explains the axis names.
"""

from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from specjax.types import (
        Batch,
        Block,
        Context,
        Dropout,
        Feedback,
        Inputs,
        Model,
        ModelOutput,
        Params,
        Proposal,
        Skips,
    )


class InitCache(Protocol):
    """Makes an empty cache, for rows of at most `max_len` tokens and sources of `max_source` (0: no encoder)."""

    def __call__(self, batch_size: int, max_len: int, max_source: int = 0) -> Any:
        """An empty cache."""
        ...


class Prefill(Protocol):
    """Reads a prompt, or any chunk of one, into the cache and commits it."""

    def __call__(self, params: Any, inputs: "Inputs", cache: Any) -> tuple["ModelOutput", Any]:
        """The output, with the logits of each row's last token only (`[B, 1, V]`), and the cache."""
        ...


class Apply(Protocol):
    """Reads a block after the committed entries of the cache, without committing it."""

    def __call__(self, params: Any, block: "Block", cache: Any) -> tuple["ModelOutput", Any]:
        """The output, and the cache with the block's entries after its length, which does not change."""
        ...


class Commit(Protocol):
    """Keeps entries of the last block."""

    def __call__(self, cache: Any, path: Int[Array, "B P"] | None, count: Int[Array, " B"]) -> Any:
        """The cache, longer by `count` entries: those at `path[:count]` of the last block, in this order."""
        ...


class Score(Protocol):
    """The logits of packed sequences to train on."""

    def __call__(
        self,
        params: Any,
        batch: "Batch",
        *,
        remat: bool = False,
        dropout: "Dropout | None" = None,
        embeddings: Float[Array, "X E"] | None = None,
    ) -> Float[Array, "B T V"]:
        """The logits `[B, T, V]`, computed without a cache; with `remat`, gradients compute each layer again.

        The `embeddings` are read by ids from the vocabulary's size on, as in `Block`.
        """
        ...


class Features(Protocol):
    """The hidden states of packed sequences to train on."""

    def __call__(self, params: Any, batch: "Batch") -> Float[Array, "B T F E"]:
        """The hidden states of the tapped layers at every token, computed without a cache."""
        ...


class WithTaps(Protocol):
    """The same model with tapped layers."""

    def __call__(self, taps: tuple[int, ...]) -> "Model":
        """The model whose `features` are the hidden states of the indices `taps`."""
        ...


class WithSkips(Protocol):
    """The same model without some of its sublayers."""

    def __call__(self, skips: "Skips") -> "Model":
        """The model that leaves out these sublayers, over the same parameters and cache."""
        ...


class InitDrafter(Protocol):
    """Makes the initial state of a drafter, for the sizes that `Model.init_cache` takes."""

    def __call__(self, batch_size: int, max_len: int, max_source: int = 0) -> Any:
        """The state; the batch axis is the first axis of all its arrays."""
        ...


class Propose(Protocol):
    """Proposes draft tokens for all rows."""

    def __call__(self, params: "Params", state: Any, cache: Any, context: "Context") -> tuple["Proposal", Any, Any]:
        """The proposal, the state, and the target's cache."""
        ...


class Update(Protocol):
    """Tells a drafter what was committed."""

    def __call__(self, params: "Params", state: Any, feedback: "Feedback") -> Any:
        """The new state."""
        ...
