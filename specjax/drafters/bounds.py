"""How much a drafter may propose."""

MAX_DRAFT_TOKENS = 1024
"""Buffers, counters and draft distributions grow with K; no published method drafts more tokens in a step."""


def check_num_draft_tokens(num_draft_tokens: int) -> None:
    """Raises a ValueError for a K outside [0, `MAX_DRAFT_TOKENS`], before anything of that size is allocated."""
    if num_draft_tokens < 0:
        raise ValueError(f"num_draft_tokens={num_draft_tokens} is negative; 0 is plain decoding.")
    if num_draft_tokens > MAX_DRAFT_TOKENS:
        raise ValueError(f"num_draft_tokens={num_draft_tokens} is more than {MAX_DRAFT_TOKENS}: lower it.")
