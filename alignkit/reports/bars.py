"""Whether a progress bar is drawn: a program may hide one, the environment (``TQDM_DISABLE``) decides over the rest."""

from __future__ import annotations


def hidden_unless(shown: bool) -> dict[str, bool]:
    """What to give ``tqdm``; an explicit ``disable=False`` would overrule the environment.

    Args:
        shown: Whether there is to be a bar here at all.
    """
    return {} if shown else {"disable": True}
