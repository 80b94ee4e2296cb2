"""The text of the page on pruning."""

from __future__ import annotations

from collections.abc import Mapping

from pruning_rows import MATHS
from pruning_rows import TEXT as ANSWERS

PAGE = "pruning.md"
HEADER = """\
# Pruning and tuning: order, axis, mask and teacher

A quarter of a small trained model is removed in several ways and the rest is tuned, on rows of the kind it was trained
on and on other text: does tuning belong before or after pruning, what do a mask that is learnt while tuning (PAT, arXiv
2408.14721) and structures that are chosen while tuning (ATP) add, and does the unpruned model as a teacher help? The
models of the papers have 2 to 34 billion parameters and theirs are benchmarks; nothing here reproduces or refutes their
tables.

## Set-up

The model is `gsm-tiny`: Qwen3 with 6 layers, hidden size 192, 512 feed-forward channels and 3 KV groups of 2 query
heads, embedding and head one matrix; 2.8 M parameters, trained on GSM8K's training questions four times over.

| arm | what is done |
|---|---|
| LoRA, unpruned | LoRA of rank 12 on every linear layer; nothing is removed |
| tune -> prune | the same, then 144 of the 192 hidden channels are kept; no recovery |
| prune -> tune | 144 hidden channels are kept, then LoRA of rank 13 tunes them |
| prune -> tune, first channels | the same with channels 0 to 143 |
| PAT | LoRA of rank 10 with modules of rank 8 behind every attention and MLP; the mask narrows the stream to 144 channels over the first third of the steps. Mask learnt from zero, learnt from a small start by importance, or chosen by importance and put on gradually (frozen) |
| layer dropping -> tune | the 2 layers that turn the hidden state least are dropped, then LoRA of rank 18 |
| prune -> tune, FFN and KV groups | 384 of 512 feed-forward channels and 2 of 3 KV groups are kept in every layer, then LoRA of rank 14 |
| ATP | the same numbers, chosen while LoRA of rank 12 trains |
| ..., distilled | the same with `method: distill` at its defaults: half of the loss is the KL from the unpruned, untuned model |

Importance is that of `plan_by_importance` with the criterion `activation`, on 64 training rows; of the untuned model,
but for tune -> prune. Embedding and head stay one matrix (`keep_tied`), so that all arms with 144 channels have the
same size. The axes do not remove equally much: 25.0 % of the parameters (144 channels), 28.7 % (two layers) and 23.5 %
(feed-forward channels and KV groups), the nearest that stock sizes allow. PAT's defaults hold but for `pat_rank` and
`pat_keep_tied`, ATP's but for the shares and `atp_generator_lr: 0.02`, as its 1e-3 moves nothing in so few steps; its
generator, which is not exported, is not among the parameters counted.

Every run goes through alignkit's own trainer for `sft` or `distill`: AdamW, rate falling linearly to zero, float32,
LoRA alpha twice the rank, no dropout, loss on completions. Each arm takes the rate with the lowest validation loss with
a seed of its own, on which the two pruned arms that are taught are chosen too. Every figure is that of the exported,
plain model; the first seed's models are written by `export`, loaded by stock transformers in a fresh process, compared
and measured.
"""  # noqa: E501

TEXT = """\
## {name}

{origin}

{rows}

Rates: {rates}; the last is tried where the one before it is the best. {seeds} seeds draw rows, adapters and batches;
means with Student's 95 % intervals, differences paired by seed and not corrected for their number.

### Claims on {name}

Numbered as in the script, where they were written down before the runs; each difference is to be positive.

{claims}

### Losses on {name}

{figures}

### What is exported, {name}

Trained parameters; parameters and bytes (float32) of the plain model; largest difference of a logit between masked and
exported model, in memory over all seeds and for the first seed from the files (0 where nothing is removed after tuning:
what pruning before it did is in the lines of the untuned models); answers of the first seed with the right number.

{sizes}
"""

TEXTS: Mapping[str, str] = {
    MATHS: """\
Trained on {train} rows of GSM8K's training questions ({steps} steps of {batch_size} rows), measured on {test} of its
test questions with their reference solutions, rates chosen on {validation} others; rows of more than {max_length}
tokens are left out. *Right* is the share of calculations in these solutions (`<<48/2=24>>`) of which every digit of
the result is the likeliest token after the true text. *Solved* counts greedy answers that end in the right number.\
""",
    ANSWERS: """\
Trained on the best answers of {train} questions ({steps} steps of {batch_size} rows), measured on those of {test}
others, rates chosen on {validation} more; rows of more than {max_length} tokens are left out. The model has not seen
text of this kind, and an exact match with an answer is out of its reach: *right* is the share of tokens that are the
likeliest after the true text. The teacher knows as little of this text as the model before tuning.\
""",
}
