"""The drafters that flags name: what each needs, and how it is made."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from specjax import drafters
from specjax.api import drafts
from specjax.api.pretrained import Pretrained
from specjax.drafters import model_dynamic, model_tree
from specjax.experiments import own
from specjax.models.weights import eagle_files
from specjax.parallel import sharding
from specjax.types import AnyDrafter, Skips

OfK = Callable[[int], AnyDrafter]
"""Makes a drafter of K draft tokens."""

Load = Callable[[], Pretrained]
"""Loads the draft model."""

LONGEST_MATCH = 8
"""The longest match that lookups compare, in tokens, unless the shortest one is longer."""


class Entry(NamedTuple):
    """One drafter.

    Attributes:
      make: `(settings, target, load) -> (K -> drafter)`, from the keys of a config (`choices.Models`).
      draft: what `config.draft` names; empty: it has no draft.
      needs_draft: whether it has to be given.
      is_model: whether the draft is a model of its own, which `config.draft_quantise` can round.
      made_by: the config that makes the draft, where that is a directory.
      runs_model: whether it rolls a model out, which `config.min_confidence` can end.
      trees: the key that makes it draft trees, `topology` or `depth`, if any.
      dynamic: whether it drafts trees whose shape follows its probabilities (`config.dynamic`).
      least: the least K.
      lengths: whether its chains may have programs of shorter lengths (`Topology.lengths`).
    """

    make: Callable[[Any, Pretrained, Load], OfK]
    draft: str = ""
    needs_draft: bool = True
    is_model: bool = False
    made_by: str = ""
    runs_model: bool = False
    trees: str = ""
    dynamic: bool = False
    least: int = 0
    lengths: bool = False

    def check(self, chosen: Any) -> None:
        """Refuses keys that do not fit the drafter, before anything is loaded.

        Args:
          chosen: a `choices.Models`.

        Raises:
          ValueError: naming the key, its value and the remedy.
          FileNotFoundError: where the draft does not exist.
        """
        name, draft = chosen.drafter, chosen.draft
        if chosen.draft_quantise and not (self.is_model and draft):
            raise ValueError(
                f"config.draft_quantise={chosen.draft_quantise!r}: only a draft that is a model has it, but "
                f"config.drafter={name!r}. Give --config.drafter=model and a --config.draft, or leave it out."
            )
        if chosen.min_confidence and not self.runs_model:
            raise ValueError(
                f"config.min_confidence={chosen.min_confidence}: only a draft that is a model has it, but "
                f"config.drafter={name!r}. Give --config.drafter=model, or leave it out."
            )
        if self.draft and self.needs_draft and not draft:
            raise ValueError(
                f"config.drafter={name!r} needs a draft: give --config.draft={self.draft}, or choose drafter=ngram."
            )
        if draft and not self.draft:
            raise ValueError(f"config.draft={draft!r} is not used by drafter={name}: leave it out.")
        if draft and self.made_by and not pathlib.Path(draft).expanduser().exists():
            raise FileNotFoundError(f"config.draft={draft!r} does not exist: {self.made_by} makes such a draft.")
        self._check_shape(chosen)

    def _check_shape(self, chosen: Any) -> None:
        """Refuses a shape of the drafts that the drafter does not have."""
        for key in ("topology", "depth"):
            value = getattr(chosen, key, None)
            if value and self.trees != key:
                having = ", ".join(name for name, entry in DRAFTERS.items() if entry.trees == key)
                raise ValueError(
                    f"config.{key}={value} is not used by drafter={chosen.drafter}: leave it out, or choose one of "
                    f"{having}."
                )
        if getattr(chosen, "topology", None):
            if chosen.min_confidence:
                raise ValueError(f"config.min_confidence={chosen.min_confidence} is for chains: leave out topology.")
            model_tree.parse(chosen.topology)
        self._check_dynamic(chosen)
        lengths = getattr(chosen, "lengths", ())
        if lengths and not self.lengths:
            having = ", ".join(name for name, entry in DRAFTERS.items() if entry.lengths)
            raise ValueError(
                f"config.lengths={lengths} is not used by drafter={chosen.drafter}: leave it out, or choose one of "
                f"{having}."
            )
        if lengths and (getattr(chosen, "topology", None) or getattr(chosen, "depth", 0)):
            raise ValueError(f"config.lengths={lengths} is for chains: leave it out, or topology and depth.")
        k = getattr(chosen, "num_draft_tokens", None)
        if isinstance(k, int) and k < self.least:
            raise ValueError(f"config.num_draft_tokens={k}: drafter={chosen.drafter} needs at least {self.least}.")

    def _check_dynamic(self, chosen: Any) -> None:
        """Refuses a dynamic tree that cannot be, or that the drafter does not have."""
        dynamic = getattr(chosen, "dynamic", ())
        if not dynamic:
            return
        if not self.dynamic:
            having = ", ".join(name for name, entry in DRAFTERS.items() if entry.dynamic)
            raise ValueError(
                f"config.dynamic={dynamic} is not used by drafter={chosen.drafter}: leave it out, or choose one of "
                f"{having}."
            )
        if len(dynamic) != 3:
            raise ValueError(f"config.dynamic={dynamic}: give (width, depth, num_nodes), such as (10, 7, 59).")
        if chosen.min_confidence or chosen.topology or chosen.lengths:
            raise ValueError(f"config.dynamic={dynamic}: leave out config.topology, config.lengths and min_confidence.")
        model_dynamic.check(drafters.Dynamic(*dynamic))


def _matches(chosen: Any) -> dict[str, int]:
    return {"min_match": chosen.min_match, "max_match": max(chosen.min_match, LONGEST_MATCH)}


def _depth(chosen: Any, k: int) -> int | None:
    """The depth of a tree of K nodes, or None for a chain."""
    return min(getattr(chosen, "depth", 0), max(k - 1, 1)) or None


def _lengths(chosen: Any, k: int) -> dict[str, Any]:
    """The lengths below K that are chosen, for drafters that have them."""
    lengths = tuple(sorted(n for n in getattr(chosen, "lengths", ()) if n < k))
    return {"lengths": lengths} if lengths else {}


def _shaped(chosen: Any, make: Callable[..., AnyDrafter]) -> OfK:
    """A drafter of the topology that is chosen, or else a chain of K tokens."""
    if topology := getattr(chosen, "topology", None):
        return lambda k: make(topology=topology)
    if dynamic := getattr(chosen, "dynamic", None):
        return lambda k: make(dynamic=drafters.Dynamic(*dynamic))
    return lambda k: make(num_draft_tokens=k, **_lengths(chosen, k))


def _model(chosen: Any, target: Pretrained, load: Load) -> OfK:
    draft = load()
    return _shaped(chosen, lambda **shape: drafters.model(draft, min_confidence=chosen.min_confidence, **shape))


def _ngram(chosen: Any, target: Pretrained, load: Load) -> OfK:
    return lambda k: drafters.ngram(
        num_draft_tokens=k, depth=_depth(chosen, k), **_lengths(chosen, k), **_matches(chosen)
    )


def _suffix(chosen: Any, target: Pretrained, load: Load) -> OfK:
    return lambda k: drafters.suffix(
        num_draft_tokens=k, depth=_depth(chosen, k), min_match=chosen.min_match, **_lengths(chosen, k)
    )


def _merged(chosen: Any, target: Pretrained, load: Load) -> OfK:
    """Lookup and suffix lookup in one tree, or lookup and a draft model where there is one, of K tokens each."""

    def lookup(k: int) -> AnyDrafter:
        return drafters.ngram(num_draft_tokens=k, **_matches(chosen))

    if not chosen.draft:
        return lambda k: drafters.merged([lookup(k), drafters.suffix(num_draft_tokens=k, min_match=chosen.min_match)])
    draft = load()
    return lambda k: drafters.merged([drafters.model(draft, num_draft_tokens=k), lookup(k)])


def _first_of(chosen: Any, target: Pretrained, load: Load) -> OfK:
    """Lookup of K tokens, and a trained head or a draft model where it finds nothing."""
    if drafters.is_feature_head(chosen.draft):
        other = _feature_head(chosen, target, load)
    elif eagle_files.is_eagle(drafts.directory_of(chosen.draft)):
        other = _eagle(chosen, target, load)
    else:
        other = _model(chosen, target, load)

    def make(k: int) -> AnyDrafter:
        lookup = drafters.ngram(num_draft_tokens=k, **_lengths(chosen, k), **_matches(chosen))
        return drafters.first_of([lookup, other(min(k, chosen.num_fallback_tokens))])

    return make


def _feature_head(chosen: Any, target: Pretrained, load: Load) -> OfK:
    head = drafters.load_feature_head(chosen.draft)
    make = functools.partial(drafters.feature_head, head, target, min_confidence=chosen.min_confidence)
    return _shaped(chosen, make)


def _medusa(chosen: Any, target: Pretrained, load: Load) -> OfK:
    heads = drafters.load_medusa(chosen.draft, dtype=target.config.dtype)
    make = functools.partial(drafters.medusa, heads, target, min_confidence=chosen.min_confidence)
    return _shaped(chosen, make)


def _blockwise(chosen: Any, target: Pretrained, load: Load) -> OfK:
    heads = drafters.load_blockwise(chosen.draft, dtype=target.config.dtype)
    make = functools.partial(drafters.blockwise, heads, target, min_confidence=chosen.min_confidence)
    return _shaped(chosen, make)


def _eagle(chosen: Any, target: Pretrained, load: Load) -> OfK:
    rules = sharding.REPLICATED if chosen.draft_sharding == "replicated" else sharding.with_whole(chosen.mesh_whole)
    head = drafters.load_eagle(drafts.directory_of(chosen.draft), target, rules=rules)
    make = functools.partial(drafters.eagle, head, target, min_confidence=chosen.min_confidence, rules=rules)
    return _shaped(chosen, make)


def _table(chosen: Any, target: Pretrained, load: Load) -> OfK:
    table = drafters.load_table(chosen.draft)
    return _shaped(chosen, lambda **shape: drafters.table(table, **shape))


def _retrieval(chosen: Any, target: Pretrained, load: Load) -> OfK:
    datastore = drafters.load_datastore(chosen.draft)
    shortest = chosen.min_match
    longest = max(min(max(shortest, LONGEST_MATCH), datastore.depth), shortest)
    sizes = {"min_match": shortest, "max_match": longest}
    return lambda k: drafters.retrieval(datastore, num_draft_tokens=k, depth=_depth(chosen, k), **sizes)


def _lookahead(chosen: Any, target: Pretrained, load: Load) -> OfK:
    return lambda k: drafters.lookahead(ngram=k + 1, window=chosen.window, guesses=chosen.guesses)


def _read_by_masks(chosen: Any, target: Pretrained, number: int) -> dict[str, Any]:
    """What `number` masks read: trained embeddings where there are some, else a token."""
    if not chosen.draft:
        return {"mask_token": chosen.mask_token}
    return {"embeddings": drafters.load_masks(chosen.draft, target=target, number=number)}


def _mask_tokens(chosen: Any, target: Pretrained, load: Load) -> OfK:
    return lambda k: drafters.mask_tokens(num_draft_tokens=k, **_read_by_masks(chosen, target, k))


def _parallel_masks(chosen: Any, target: Pretrained, load: Load) -> OfK:
    if topology := getattr(chosen, "topology", None):
        depth = len(model_tree.parse(topology))
        read = _read_by_masks(chosen, target, depth - 1)
        return lambda k: drafters.parallel_masks(target, topology=topology, **read)
    return lambda k: drafters.parallel_masks(target, num_draft_tokens=k, **_read_by_masks(chosen, target, k - 1))


def _pard(chosen: Any, target: Pretrained, load: Load) -> OfK:
    return _in_one_call(drafters.pard, chosen, load)


def _nonautoregressive(chosen: Any, target: Pretrained, load: Load) -> OfK:
    return _in_one_call(drafters.nonautoregressive, chosen, load)


def _in_one_call(make: Callable[..., AnyDrafter], chosen: Any, load: Load) -> OfK:
    draft = load()
    return _shaped(chosen, functools.partial(make, draft, min_confidence=chosen.min_confidence))


def _skip(chosen: Any, target: Pretrained, load: Load) -> OfK:
    from specjax.experiments import skip_search  # It runs the drafters of this module.

    skips = skip_search.load(chosen.draft) if chosen.draft else Skips(chosen.skip_attention, chosen.skip_mlp)
    return _shaped(
        chosen,
        lambda **shape: drafters.skip(target, **skips._asdict(), min_confidence=chosen.min_confidence, **shape),
    )


def _early_exit(chosen: Any, target: Pretrained, load: Load) -> OfK:
    from specjax.experiments import exit_norm  # As above.

    layer, norm = exit_norm.load(chosen.draft) if chosen.draft else (chosen.exit_layer, None)
    return _shaped(
        chosen,
        lambda **shape: drafters.early_exit(target, layer, norm=norm, min_confidence=chosen.min_confidence, **shape),
    )


def _counted(make: Callable[[Any, Pretrained, Load], OfK], trees: str) -> Entry:
    """A drafter whose draft is counted in a corpus."""
    return Entry(make, draft="PATH (of configs/count.py)", made_by="configs/count.py", trees=trees)


def _of_masks(make: Callable[[Any, Pretrained, Load], OfK], trees: str = "") -> Entry:
    """A drafter whose masks read a token, or embeddings that were trained."""
    where = "configs/masks.py"
    return Entry(make, draft=f"PATH (of {where})", needs_draft=False, made_by=where, trees=trees, least=1)


_ONE_CALL: dict[str, Any] = {
    "draft": "SOURCE",
    "is_model": True,
    "runs_model": True,
    "trees": "topology",
    "lengths": True,
    "least": 1,
}
"""What drafters have in common whose model predicts all tokens in one call."""

DRAFTERS = {
    "model": Entry(
        _model, draft="SOURCE", is_model=True, runs_model=True, trees="topology", dynamic=True, lengths=True
    ),
    "ngram": Entry(_ngram, trees="depth", lengths=True),
    "suffix": Entry(_suffix, trees="depth", lengths=True),
    "aggressive": Entry(lambda chosen, target, load: lambda k: drafters.aggressive(num_draft_tokens=k)),
    "merged": Entry(_merged, draft="SOURCE", needs_draft=False, is_model=True),
    "first_of": Entry(_first_of, draft="NAME, PATH or SOURCE", runs_model=True, lengths=True, least=1),
    "table": _counted(_table, "topology"),
    "retrieval": _counted(_retrieval, "depth"),
    "none": Entry(lambda chosen, target, load: lambda k: drafters.none()),
    "jacobi": Entry(lambda chosen, target, load: lambda k: drafters.jacobi(num_draft_tokens=k), least=1),
    "lookahead": Entry(_lookahead, least=2),
    "mask_tokens": _of_masks(_mask_tokens),
    "parallel_masks": _of_masks(_parallel_masks, "topology"),
    "pard": Entry(_pard, **_ONE_CALL),
    "nonautoregressive": Entry(_nonautoregressive, **_ONE_CALL),
    "skip": Entry(
        _skip,
        draft="PATH (of configs/skip_search.py)",
        needs_draft=False,
        made_by="configs/skip_search.py",
        runs_model=True,
        trees="topology",
        lengths=True,
    ),
    "feature_head": Entry(
        _feature_head, draft="NAME or PATH", runs_model=True, trees="topology", lengths=True, least=1
    ),
    "medusa": Entry(_medusa, draft="PATH or HUB_ID", runs_model=True, trees="topology", lengths=True, least=1),
    "blockwise": Entry(
        _blockwise,
        draft="PATH (of configs/heads.py)",
        made_by="configs/heads.py",
        runs_model=True,
        trees="topology",
        lengths=True,
        least=1,
    ),
    "eagle": Entry(_eagle, draft="SOURCE", runs_model=True, trees="topology", dynamic=True, lengths=True, least=1),
    "early_exit": Entry(
        _early_exit,
        draft="PATH (of configs/exit_norm.py)",
        needs_draft=False,
        made_by="configs/exit_norm.py",
        runs_model=True,
        trees="topology",
        lengths=True,
    ),
}
"""By the name that flags give them."""


def drafter_of(chosen: Any, target: Pretrained, load: Load) -> OfK:
    """The drafter that is chosen, as a function of K.

    Args:
      chosen: a `choices.Models`.
      target: what it drafts for.
      load: loads the draft model, for those that have one.

    Raises:
      ValueError: where what is loaded does not fit.
      OSError: for files that cannot be read.
    """
    if own.is_own(chosen.drafter):
        return own.drafter(chosen.drafter, chosen.draft, target)
    return DRAFTERS[chosen.drafter].make(chosen, target, load)
