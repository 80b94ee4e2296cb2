"""Prompts to the token ids that ``trl.GRPOTrainer`` 1.16 gives to the model (its ``_tokenize_prompts``).

Text is tokenised with all that the tokenizer adds to any text; messages become what the chat template writes, the
opening of the assistant's turn at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from alignkit.data.problems import Problem
from alignkit.data.rendering import RenderingError, render, renderable
from alignkit.data.tokenization import rendered_ids, whole_ids


class EncodedPrompt(NamedTuple):
    """A prompt as the trainer takes it, and what the model sees of it.

    Attributes:
        prompt: Text, or messages that the chat template writes as they are meant.
        ids: Token ids.
    """

    prompt: Any
    ids: list[int]


def encode_prompts(
    prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]
) -> list[EncodedPrompt | Problem]:
    """Token ids of valid prompts, all texts or all messages, or why the chat template cannot render one.

    Content in parts that the template would not write as text is joined to one text.

    Args:
        template: Further arguments of the chat template.
    """
    if prompts and isinstance(prompts[0], str):
        return [EncodedPrompt(*pair) for pair in zip(prompts, whole_ids(prompts, tokenizer), strict=True)]
    how = {**template, "add_generation_prompt": True}
    found: list[tuple[Any, str] | Problem] = []
    for messages in prompts:
        joined = renderable(messages, tokenizer, how)
        try:
            text = render(joined, tokenizer, template, part="prompt", add_generation_prompt=True)
        except RenderingError as error:
            found.append(error.problem)
        else:
            found.append((joined, text))
    texts = [one[1] for one in found if not isinstance(one, Problem)]
    ids = iter(rendered_ids(texts, tokenizer) if texts else [])
    return [one if isinstance(one, Problem) else EncodedPrompt(one[0], next(ids)) for one in found]
