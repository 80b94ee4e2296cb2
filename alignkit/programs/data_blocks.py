"""What ``alignkit data`` says of rows, as blocks of a report and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignkit.data import languages, similar
from alignkit.data.plain_rows import plain_row
from alignkit.data.report import QUANTILES, TEXT_SHOWN
from alignkit.data.schema import describe_problems
from alignkit.data.survey import BIASED, LIKENESS, SAMPLED, LengthBias, Survey, cuts, histogram, row_lengths, spread
from alignkit.programs.data_steps import Examination, Split
from alignkit.reports.blocks import Block

OF_TEXT = ("no row is there twice", "no two rows contradict each other", "held-out rows are not trained on",
           "the candidates of a row differ")  # fmt: skip
"""The checks of a run that need no tokenizer."""
SHOWN_NUMBERS = 12
"""Numbers of rows that are said of one cause."""


def blocks_of(
    found: Examination,
    tokenizer: PreTrainedTokenizerBase,
    *,
    has_model: bool,
    num_examples: int,
    cleaned: tuple[str, int] | None,
) -> list[Block]:
    """The report.

    Args:
        found: What is known of the rows.
        tokenizer: What they were converted with.
        has_model: Whether it is that of a model.
        num_examples: Rows to show.
        cleaned: The file that was written and its rows, or None.
    """
    training = found.splits["train"]
    blocks = [_opening(found), _counts(found)] if not has_model or found.report is None else [_opening(found)]
    if found.report is not None and has_model:
        blocks.append(Block("data report of a run", text=found.report.render()))
    for split in found.splits.values():
        blocks += _of_split(split, has_model=has_model)
    if found.report is not None and not has_model:
        blocks.append(_checks(found))
    blocks += _examples(training, tokenizer, num_examples, has_model=has_model)
    return [*blocks, _verdict(found, cleaned, has_model=has_model)]


def as_json(found: Examination, *, has_model: bool) -> dict[str, Any]:
    """The report as plain data.

    Args:
        has_model: Whether the rows were converted with the tokenizer of a model.
    """
    splits = {}
    for name, split in found.splits.items():
        splits[name] = {
            "num_rows_in": split.num_rows_in,
            "num_malformed": _num_malformed(split),
            "malformed": describe_problems(split.malformed),
            "dropped": {cause: len(numbers) for cause, numbers in split.dropped.items()},
            "dropped_rows": dict(split.dropped),
            "num_rows": len(split.rows),
            "survey": None if split.survey is None else split.survey.to_dict(),
        }
        if has_model and len(split.counts):
            splits[name]["max_length"] = [vars(cut) for cut in cuts(split.counts, _limit(split))]
    report = found.report.to_dict() if found.report is not None and has_model else None
    return {
        "program": found.program, "method": found.method, "form": found.kind, "splits": splits,
        "run_report": report, "refused": list(found.problems),
    }  # fmt: skip


def _opening(found: Examination) -> Block:
    read = f"{found.kind}: read for trainers/{found.program}.py, method: {found.method}"
    lines = [f"{read} (--program and --method read them for another one)"]
    for name, split in found.splits.items():
        if split.malformed:
            lines.append(f"{name}: malformed rows are shown, and left out of all the rest: {_num_malformed(split)}")
    return Block("form", lines)


def _num_malformed(split: Split) -> int:
    return len({row for row, _ in split.malformed})


def _counts(found: Examination) -> Block:
    """Rows read, malformed, dropped and kept."""
    splits = list(found.splits.values())
    causes = dict.fromkeys(cause for split in splits for cause in split.dropped)
    rows = [
        ["read", *(f"{split.num_rows_in}" for split in splits)],
        ["malformed", *(f"{_num_malformed(split)}" for split in splits)],
        *([f"dropped: {cause}", *(f"{len(split.dropped.get(cause, ()))}" for split in splits)] for cause in causes),
        ["kept" + _answers(splits[0]), *(f"{len(split.rows)}" for split in splits)],
    ]
    rows += [
        [f"  of {source.name}", *(f"{source.num_rows}" if other is split else "" for other in splits)]
        for split in splits
        if split.report is not None
        for source in split.report.sources
    ]
    reports = [split.report for split in splits if split.report is not None]
    notes = [f"{report.name}: read as {said}" for report in reports for said in report.formats]
    notes += [f"{report.name}: {note}" for report in reports for note in report.notes()]
    return Block("rows", notes, ["rows", *found.splits], rows)


def _answers(split: Split) -> str:
    """What to add to a number of rows that are answers of pairs."""
    return "" if split.num_answers_in is None else ", two answers a pair"


def _of_split(split: Split, *, has_model: bool) -> Iterator[Block]:
    if split.malformed:
        yield Block(f"malformed rows of {split.name} (the first row is row 0)", describe_problems(split.malformed))
    if split.dropped:
        yield Block(f"rows of {split.name} that are dropped", [_some(*each) for each in split.dropped.items()])
    if has_model and len(split.counts):
        yield from _token_lengths(split)
    if split.survey is not None:
        yield _text_lengths(split.name, split.survey)
        yield from _labels(split.name, split.survey)
        yield _alike(split)
        yield _languages(split.name, split.survey)


def _some(cause: str, numbers: Sequence[int]) -> str:
    """The first numbers of rows, and why they are dropped."""
    more = f" and {len(numbers) - SHOWN_NUMBERS} more" if len(numbers) > SHOWN_NUMBERS else ""
    return f"{cause}: row {', '.join(map(str, numbers[:SHOWN_NUMBERS]))}{more}"


def _token_lengths(split: Split) -> Iterator[Block]:
    bars = histogram(row_lengths(split.counts))
    yield Block(f"lengths of {split.name} rows, tokens", bars=bars)
    limit = _limit(split)
    rows = [
        [
            f"{cut.max_length}" + (" (in force)" if cut.max_length == limit else ""),
            f"{cut.num_cut}",
            f"{cut.num_dropped}",
        ]
        for cut in cuts(split.counts, limit)
    ]
    key = "max_length" if split.report is None else split.report.length_key
    yield Block(f"what {key} would do to {split.name}", header=[key, "rows cut", "rows dropped"], rows=rows)


def _limit(split: Split) -> int:
    """The limit that the rows were converted with; of rows none of which is left, the longest."""
    known = None if split.report is None else split.report.max_length
    return int(row_lengths(split.counts).max()) if known is None else known


def _text_lengths(name: str, survey: Survey) -> Block:
    rows = [[what, *(f"{value}" for value in quantiles.values())] for what, quantiles in survey.lengths.items()]
    return Block(f"lengths of {name}, characters", header=["characters", *QUANTILES], rows=rows)


def _labels(name: str, survey: Survey) -> Iterator[Block]:
    lines = []
    if survey.scores:
        lines.append("scores: " + ", ".join(f"{quantile} {value:.3g}" for quantile, value in survey.scores.items()))
    if survey.bias is not None:
        lines.append(_bias(survey.bias))
    if survey.labels:
        yield Block(f"labels of {name}", lines, bars=list(survey.labels.items()))


def _bias(bias: LengthBias) -> str:
    share = bias.num_longer / bias.num_compared
    found = f"the best answer is longer than the worst in {bias.num_longer} of {bias.num_compared} rows "
    found += f"where their lengths differ ({share:.0%}, "
    found += f"95 % interval {bias.low:.0%} to {bias.high:.0%})"
    if bias.low <= BIASED and bias.high >= 1 - BIASED:
        return found
    kind = "longer" if share > 0.5 else "shorter"
    return (
        f"{found}: a model can learn that {kind} is better; see whether that is meant, or take a method that counts "
        "tokens evenly (simpo)"
    )


def _alike(split: Split) -> Block:
    title = f"near-duplicates in {split.name}"
    survey = split.survey
    if survey is None or survey.num_alike is None:
        return Block(title, [similar.MISSING])
    share = survey.num_alike / max(survey.num_rows, 1)
    found = (
        f"{survey.num_alike} {'row is' if survey.num_alike == 1 else 'rows are'} like an earlier one ({share:.1%}) "
        f"without repeating it: {LIKENESS:.0%} or more "
    )
    found += f"of their runs of {similar.RUN} words are the same"
    numbers = split.numbers
    parts = [
        (f"row {numbers[row]}", [(text, False)])
        for pair in survey.alike
        for row, text in ((pair.earlier, pair.shown_earlier), (pair.row, pair.shown))
    ]
    return Block(title, [found], parts=parts)


def _languages(name: str, survey: Survey) -> Block:
    looked_at = "prompt and answer" + ("" if survey.num_rows <= SAMPLED else f", {SAMPLED} rows spread over all")
    if survey.languages is not None:
        return Block(f"languages of {name} ({looked_at})", bars=list(survey.languages.items()))
    return Block(f"scripts of {name} ({looked_at})", [languages.MISSING], bars=list(survey.scripts.items()))


def _checks(found: Examination) -> Block:
    checks = {} if found.report is None else found.report.checks
    lines = [
        f"{check.status:<4}  {name}: {check.title}: {check.message}".replace(
            "token for token", "character for character"
        )
        for name, of_split in checks.items()
        for check in of_split
        if check.name in OF_TEXT
    ]
    return Block("checks", lines)


def _examples(split: Split, tokenizer: PreTrainedTokenizerBase, count: int, *, has_model: bool) -> Iterator[Block]:
    """Rows spread over all, with their trained tokens marked where they are those of a model."""
    if split.converted is None or split.report is None:
        return
    for index in spread(len(split.rows), count):
        title = f"row {split.numbers[index]} of {split.name}"
        if has_model:
            parts = split.report.example(split.converted[index], tokenizer).labelled()
            shown = [(label, [(_shortened(text), marked) for text, marked in spans]) for label, spans in parts]
            yield Block(f"{title}, trained tokens marked", parts=shown)
        else:
            row = plain_row(split.rows[index])
            named = {"prompt": row.prompt, **_named_answers(row.answers, row.scores)}
            yield Block(title, parts=[(label, [(_shortened(text), False)]) for label, text in named.items() if text])


def _named_answers(answers: Sequence[str], scores: Sequence[float] | None) -> Mapping[str, str]:
    if scores is None:
        return {"answer": answers[0]} if answers else {}
    if len(answers) == 1:
        return {"good answer" if scores[0] > 0 else "bad answer": answers[0]}
    if tuple(scores) == (1.0, 0.0):
        return dict(zip(("chosen", "rejected"), answers, strict=True))
    return {
        f"{place}: score {score:g}": text for place, (text, score) in enumerate(zip(answers, scores, strict=True), 1)
    }


def _shortened(text: str) -> str:
    if len(text) <= TEXT_SHOWN:
        return text
    half = TEXT_SHOWN // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"


def _verdict(found: Examination, cleaned: tuple[str, int] | None, *, has_model: bool) -> Block:
    lines = [f"a run refuses these rows: {problem}" for problem in found.problems]
    if not lines:
        lines = [
            "a run starts with these rows" if has_model else "nothing stands against these rows; --model says more"
        ]
    if cleaned is not None:
        (path, count), train = cleaned, found.splits["train"]
        all_rows = f"{train.num_rows_in} rows" if train.num_answers_in is None else f"{train.num_answers_in} answers"
        lines.append(f"written: {count} of {all_rows} to {path}")
    elif found.problems and len(found.splits["train"].rows):
        lines.append("--write cleaned.jsonl writes the rows that can be trained on")
    return Block("what a run does", lines)
