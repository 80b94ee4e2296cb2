"""What ``attn_implementation`` may name: kernels of transformers and torch, and such as are fetched from the Hub."""

from __future__ import annotations

import difflib
import re

from alignkit.config.settings import Settings

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_HUB_KERNEL = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:\w+)?", re.ASCII)


def is_hub_kernel(name: str | None) -> bool:
    """Whether an attention kernel is one of a repository, such as kernels-community/flash-attn2."""
    return name is not None and _HUB_KERNEL.fullmatch(name) is not None


def needs_accelerator(name: str | None) -> bool:
    """Whether a kernel does not train on a CPU."""
    return name is not None and name not in ("eager", "sdpa")


def computes_in_half(name: str | None) -> bool:
    """Whether a kernel is one of flash attention, which knows 16-bit numbers alone."""
    return name is not None and "flash" in name


def attention_packages(name: str | None) -> tuple[tuple[str, ...], str] | None:
    """The packages of which a kernel needs one, and how to install it; None where it needs none."""
    if name == "flash_attention_2":
        return ("flash_attn", "kernels"), "pip install flash-attn"
    if name == "flash_attention_3":
        return ("flash_attn_interface", "kernels"), "pip install kernels, which fetches it built"
    return (("kernels",), "pip install kernels") if is_hub_kernel(name) else None


def check_attention(settings: Settings) -> None:
    """Report a kernel that there is not."""
    name = settings.values.get("attn_implementation")
    if name is None or name in ATTENTION or is_hub_kernel(name):
        return
    near = difflib.get_close_matches(name.lower(), ATTENTION, n=1, cutoff=0.5)
    listed = f"is not one of {', '.join(ATTENTION)}, nor a kernel on the Hub (owner/name)"
    settings.report("attn_implementation", listed, f"Did you mean {near[0]}?" if near else "Choose one of these")
