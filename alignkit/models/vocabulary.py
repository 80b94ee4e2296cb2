"""Whether a model has an embedding for every token it is to be given; without one, training ends in an IndexError."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ModelError

TOKEN_COLUMNS = ("input_ids", "prompt_ids", "completion_ids", "better_prompt_ids", "worse_prompt_ids")
BATCH_ROWS = 1000

Tokens = Dataset | IterableDataset | Sequence[Sequence[int]] | None
"""Converted rows, or lists of token ids; None where there are none."""


def check_token_ids(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    used: Mapping[str, Tokens],
    *,
    name: str,
    pads: bool = True,
) -> None:
    """Refuse a model that lacks the embedding of a token it is to be given.

    A tokenizer may know more tokens than its model as long as nothing uses them; of streamed rows that cannot be known.

    Args:
        tokenizer: The tokenizer of the rows.
        used: What the model is to be given, by name.
        name: What the model is called in the message.
        pads: Whether what is given is padded to one length.

    Raises:
        ModelError: Names the first such token, and who uses it.
    """
    size = num_embeddings(model)
    known = max(tokenizer.get_vocab().values())
    if known < size:
        return
    beyond = f"the tokenizer goes beyond {name}, whose {size} embeddings are those of the ids 0 to {size - 1}"
    advice = (
        "Give the model an embedding for it (model.resize_token_embeddings(len(tokenizer)), then save the model, and "
        "train the new row: it is random), or take the token out of"
    )
    padding: dict[str, Tokens] = {"padding": [[tokenizer.pad_token_id or 0]]} if pads else {}
    for user, rows in (padding | {**used}).items():
        if isinstance(rows, IterableDataset):
            raise ModelError(f"{beyond}, and which tokens streamed rows use is not known. Write streaming: false")
        largest = max(_largest_ids(rows), default=0)
        if largest >= size:
            token = f"{tokenizer.convert_ids_to_tokens(largest)!r} (id {largest})"
            place = "the tokenizer (tokenizer.pad_token = tokenizer.eos_token)" if user == "padding" else "the rows"
            raise ModelError(f"{beyond}, and {user} uses {token}. {advice} {place}")


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, name: str) -> None:
    """Make tokens of texts.

    Args:
        tokenizer: Changed.
        texts: Each becomes one token, wherever it stands.
        name: What the tokenizer is called in the message.

    Raises:
        ModelError: One of them is a token already, or stands there twice.
    """
    known = tokenizer.get_vocab()
    if there := [text for i, text in enumerate(texts) if text in known or text in texts[:i]]:
        raise ModelError(f"`new_tokens`: {there[0]!r} is a token of {name} already, or stands there twice. Remove it")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])


@torch.no_grad()
def embed_tokens(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Give new tokens embeddings and, where it has its own, rows of the head: each the mean of those before them.

    So a new token is about as likely as an average one at first (Hewitt 2021, Initializing New Word Embeddings for
    Pretrained Language Models), and two models that are loaded alike begin alike.

    Args:
        model: Changed; its vocabulary grows where it has no rows to spare.
        ids: Those of the new tokens, behind all others.
    """
    if max(ids) >= num_embeddings(model):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for weight in {id(end.weight): end.weight for end in ends if end is not None}.values():
        weight[list(ids)] = weight[: min(ids)].float().mean(0).to(weight.dtype)


def embedding_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that hold a row for every token: the embeddings and the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name.rpartition(".")[2] for name, module in model.named_modules() if module in ends]


def num_embeddings(model: PreTrainedModel | PeftModel) -> int:
    """Tokens that a model has an embedding for."""
    # The shape of the weight does not say: DeepSpeed shards it. Inside an adapter's wrapper it is the base that counts.
    parts = model.get_input_embeddings().modules()
    return next(part.num_embeddings for part in parts if isinstance(part, nn.Embedding))


def unused_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], rows: Dataset) -> list[str]:
    """Those of some tokens that occur in no row, or none where the rows hold no token ids.

    Args:
        tokenizer: It knows them.
        texts: The tokens.
        rows: Converted rows.
    """
    if not texts or not set(TOKEN_COLUMNS) & set(rows.column_names):
        return []
    ids = np.asarray(tokenizer.convert_tokens_to_ids(list(texts)))
    is_used = np.zeros(len(ids), dtype=bool)
    for values in _token_ids(rows):
        is_used |= np.isin(ids, values)
    return [text for text, used in zip(texts, is_used, strict=True) if not used]


def _largest_ids(rows: Dataset | Sequence[Sequence[int]] | None) -> Iterable[int]:
    """The largest token id of every batch of rows."""
    if not isinstance(rows, Dataset):
        yield max(chain.from_iterable(rows or []), default=0)
        return
    for values in _token_ids(rows):
        yield int(np.max(values, initial=0))


def _token_ids(rows: Dataset) -> Iterator[NDArray[np.int64]]:
    """All token ids of converted rows, a column of a batch at a time."""
    columns = [column for column in TOKEN_COLUMNS if column in rows.column_names]
    for table in rows.select_columns(columns).with_format("arrow").iter(BATCH_ROWS):
        for column in columns:
            values = table[column].combine_chunks()
            while values.type.num_fields:  # lists, and lists of lists
                values = values.flatten()
            yield values.to_numpy()
