"""RoMA (arXiv 2511.07419) on real text: do the last routers of a small trained mixture of experts answer better?

    python scripts/claims/roma_gsm.py

trains the last two of the four routers of ``gsm-tiny-moe`` on multiple-choice questions made from TruthfulQA and from
model solutions of GSM8K questions, and writes its section of roma.md in the output directory. Half an hour of processor
time; finished runs are kept.

Fixed before the runs of the page. What had been looked at: with seed 100, the untrained model's accuracies. Held-out
accuracy, mean of the two sources, chance .375; the step size or lambda of every arm is chosen by the accuracy on
validation questions, the first value on a tie. Three seeds with a few hundred test questions resolve differences of
several hundredths, not smaller ones.

1. RoMA ends higher than the model begins.
2. RoMA ends higher than CE only.
3. RoMA ends higher than with random neighbours.
4. RoMA ends higher than DenseMixer.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from alignkit.losses.roma import roma_loss
from alignkit.losses.types import RoutedBatch
from alignkit.models._forward import add_completion_head
from alignkit.models._routers import RouterCapture, last_routers
from alignkit.models.dense_mixer import DenseMixer
from alignkit.models.loading import ModelSource, load_model, load_tokenizer
from alignkit.routing.build import build_bank
from alignkit.routing.options import BankOptions
from alignkit.routing.passes import routing_vectors
from alignkit.routing.store import RoutingBank
from glad_page import KEPT, figure_text, kept_run, origin, table, write_section
from gsm8k_pairs import SOLUTIONS
from intervals import MAX_FEW_SEEDS, student_interval, verdict
from noise_rows import TRUTHFULQA
from online_page import timed
from roma_page import HEADER, PAGE
from roma_questions import MODEL, Questions, Sizes, accuracy, draw_questions, read_questions

ROUTERS = 2
RATES, LAMBDAS = (1e-3, 3e-3, 1e-2), (1.0, 10.0, 100.0)
RATE = RATES[1]


@dataclass(frozen=True)
class Arm:
    """A way to train the routers; every arm chooses among three runs.

    Attributes:
        trials: Pairs of lambda and step size.
        bank: Options of the bank that differ from its defaults.
        dense: Straight-through gradients for experts that are not at work.
    """

    trials: tuple[tuple[float, float], ...] = tuple((0.0, rate) for rate in RATES)
    bank: Mapping[str, Any] = field(default_factory=dict)
    dense: bool = False


BASE, CE, ROMA, RANDOM, DENSE = "base", "CE only", "RoMA", "random neighbours", "DenseMixer"
WITH_LAMBDA = tuple((weight, RATE) for weight in LAMBDAS)
ARMS: Mapping[str, Arm] = {
    CE: Arm(),
    ROMA: Arm(WITH_LAMBDA),
    RANDOM: Arm(WITH_LAMBDA, {"bank_neighbours": "random"}),
    DENSE: Arm(dense=True),
}


@dataclass(frozen=True)
class Budget:
    """What every run has in common.

    Attributes:
        train: Training questions of each source.
        validation: Those that lambda and step size are chosen with.
        test: Those that are reported.
        epochs: Passes over the training questions.
        batch_size: Questions a step.
    """

    train: int = 96
    validation: int = 48
    test: int = 150
    epochs: int = 2
    batch_size: int = 16

    @property
    def sizes(self) -> Sizes:
        """Questions of each source."""
        return Sizes(self.train, self.validation, self.test)


class Study:
    """One seed: its questions, and the model, which every run begins with.

    Args:
        seed: Of the questions, the batches and random neighbours.
        budget: Number of questions and steps.
        model_path: Of the model.
        directory: Where the banks are kept.
    """

    def __init__(self, seed: int, budget: Budget, model_path: Path, directory: Path) -> None:
        self.seed, self.budget, self.directory = seed, budget, directory
        self.tokenizer = load_tokenizer(str(model_path))
        self.model: PreTrainedModel = load_model(ModelSource(model=str(model_path), dtype="float32"))
        add_completion_head(self.model)
        self.routers = last_routers(self.model, ROUTERS)
        self.questions: Questions = draw_questions(read_questions(), self.tokenizer, budget.sizes, seed)
        self.model.requires_grad_(False)
        self.weights = [router.module.get_parameter(router.parameter) for router in self.routers]
        self.start = [weight.clone() for weight in self.weights]

    def measure(self, part: str) -> dict[str, float]:
        """Accuracy on each source of ``validation`` or ``test``, and their mean."""
        parts: dict[str, Dataset] = vars(self.questions)[part]
        found = {name: accuracy(self.model, rows, self.tokenizer.pad_token_id) for name, rows in parts.items()}
        return found | {"mean": float(np.mean(list(found.values())))}

    def reset(self) -> None:
        """Give the routers their first weights back."""
        with torch.no_grad():
            for weight, start in zip(self.weights, self.start, strict=True):
                weight.copy_(start)

    def bank(self, arm: Arm) -> RoutingBank:
        """The bank of an arm under the untrained model."""
        self.reset()
        options = BankOptions(bank_layers=ROUTERS, bank_choice_score="mean", bank_seed=self.seed, **arm.bank)
        return build_bank(self.model, self.tokenizer, self.questions.train, options, self.directory)

    def run(self, arm: Arm) -> dict[str, Any]:
        """Every trial of an arm, and the test of the one that the validation questions prefer."""
        bank = self.bank(arm)
        trials: list[dict[str, float]] = []
        test: dict[str, float] = {}
        for weight, rate in arm.trials:
            self.train(bank, arm, weight, rate)
            score = self.measure("validation")["mean"]
            if all(score > earlier["validation"] for earlier in trials):
                test = self.measure("test")
            trials.append({"weight": weight, "rate": rate, "validation": score})
        solved = float(bank.success.float().mean())
        return {"trials": trials, "test": test, "solved": solved, "same task": same_task(bank, self.questions.train)}

    def train(self, bank: RoutingBank, arm: Arm, weight: float, rate: float) -> None:
        """Train the routers from their first weights, and nothing else.

        Args:
            bank: Of the training questions.
            arm: How.
            weight: lambda.
            rate: Step size of AdamW, which is constant.
        """
        self.reset()
        trained = [parameter.requires_grad_(True) for parameter in self.weights]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(self.seed)
        number, step = len(self.questions.train), 0
        self.model.train()
        with DenseMixer(self.model, self.routers) if arm.dense else nullcontext():
            for _ in range(self.budget.epochs):
                for rows in torch.randperm(number, generator=generator).split(self.budget.batch_size):
                    batch = self.batch(rows, bank, step)
                    optimizer.zero_grad()
                    roma_loss(batch, manifold_coef=weight).mean().backward()
                    optimizer.step()
                    step += 1
        for parameter in trained:
            parameter.requires_grad_(False)

    def batch(self, rows: Tensor, bank: RoutingBank, step: int) -> RoutedBatch:
        """One forward pass over questions with their right answers, padded on the right."""
        chosen = self.questions.train.select(rows.tolist())
        texts = [torch.tensor(row["prompt_ids"] + row["completion_ids"]) for row in chosen]
        starts = torch.tensor([len(row["prompt_ids"]) for row in chosen])
        lengths = torch.tensor([len(text) for text in texts])
        input_ids = pad_sequence(texts, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        places = torch.arange(input_ids.shape[1])
        with RouterCapture(self.routers) as captured:
            output = self.model(input_ids=input_ids, attention_mask=(places < lengths[:, None]).long(), use_cache=False)
        logps = output.logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        last = (starts - 1)[:, None], torch.ones(len(rows), 1, dtype=torch.bool)
        known = bank.targets(rows)
        return RoutedBatch(
            policy_token_logps=logps,
            label_mask=(places[1:] >= starts[:, None]) & (places[1:] < lengths[:, None]),
            routing=routing_vectors(captured.logits, self.routers, last, "auto"),
            target_routing=known.target,
            target_variance=known.variance,
            has_target=known.has_target,
            base_routing=known.routing,
            num_layers=ROUTERS,
            step=step,
        )


def same_task(bank: RoutingBank, rows: Dataset) -> float:
    """Share of neighbours, by weight, that are questions of the same source."""
    number = {name: index for index, name in enumerate(sorted(set(rows["task"])))}
    tasks = torch.tensor([number[name] for name in rows["task"]])
    indices, weights = bank.found["indices"], bank.found["weights"]
    same = (tasks[indices.clamp_min(0)] == tasks[:, None]) & (indices >= 0)
    return float((weights * same).sum() / weights.sum())


Run = Mapping[str, Any]
"""Of :meth:`Study.run`; of the untrained model ``test`` alone."""
Runs = Mapping[str, Sequence[Run]]
"""The runs of each arm, and of the untrained model, one a seed."""


def run_all(num_seeds: int, budget: Budget, kept: Path) -> dict[str, list[dict[str, Any]]]:
    """Every arm from every seed."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (BASE, *ARMS)}
    with tqdm(total=num_seeds * len(runs), desc="real text", unit="arm") as progress:
        for seed in range(num_seeds):
            study = Study(seed, budget, MODEL, kept / f"seed{seed}")
            for name, own in runs.items():
                settings = {"arm": str(ARMS.get(name)), "seed": seed} | vars(budget)
                compute = partial(study.run, ARMS[name]) if name in ARMS else partial(_measure_start, study)
                own.append(kept_run(kept / f"seed{seed}_{name}.json", settings, partial(timed, compute)))
                progress.update()
    return runs


def _measure_start(study: Study) -> dict[str, Any]:
    study.reset()
    return {"test": study.measure("test")}


def values(runs: Runs, arm: str, source: str) -> np.ndarray:
    """Test accuracy of an arm on a source, or their mean, one a seed [S]."""
    return np.array([found["test"][source] for found in runs[arm]])


def accuracy_rows(runs: Runs, sources: Sequence[str]) -> dict[str, list[str]]:
    """One line an arm: accuracies, and what was chosen."""
    rows = {}
    for arm, own in runs.items():
        cells = [figure_text(values(runs, arm, source)) for source in sources]
        best = [max(found["trials"], key=lambda trial: trial["validation"]) for found in own if arm in ARMS]
        cells.append(", ".join(f"{trial['weight']:g} / {trial['rate']:g}" for trial in best) or "-")
        rows[arm] = cells
    return rows


def claim_rows(runs: Runs) -> dict[str, list[str]]:
    """Each claim with its difference and verdict."""
    pairs = [(ROMA, BASE), (ROMA, CE), (ROMA, RANDOM), (ROMA, DENSE), (CE, BASE)]
    lines = {}
    for number, (first, second) in enumerate(pairs, 1):
        difference = values(runs, first, "mean") - values(runs, second, "mean")
        name = f"{number}: {first} - {second}" if number < len(pairs) else f"beside them: {first} - {second}"
        lines[name] = [figure_text(difference), verdict(difference, student_interval)]
    return lines


TEXT = """\
## Real text

{origin}

`gsm-tiny-moe` has 4.4 M parameters, 4 layers of 8 experts, two at work, weights renormalised, and was trained on
GSM8K's training questions alone. Multiple choice: a question of TruthfulQA with one right and three wrong answers
(chance .25), or a question of GSM8K's test set with one right and one wrong solution of another model (chance .5;
nothing here is a GSM8K score). The answer is the choice of the largest mean log-prob a token. Of each source {train}
questions to train on, {validation} to choose with and {test} to test on; {epochs} epochs of {batch_size} questions a
step, AdamW at a constant rate, cross-entropy on the right choice. Only the last two routers are trained. Each arm
chooses among three runs by validation accuracy: RoMA and random neighbours lambda, of {lambdas}, at the rate {rate:g};
the others their rate, of {rates}. Bank: alignkit's defaults but for two layers and the choice score `mean`; the
embedder is the base model itself. The base model solves {solved} of the training questions, and {same} of the
neighbours, by weight, are questions of the same source. {seeds} seeds draw questions and batches; means with Student's
95 % intervals, differences paired by seed and not corrected for their number. Bank, loss, capture of the routing and
DenseMixer are alignkit's; the loop around them is a plain one, not its trainer.

### Claims

Test accuracy, mean of the two sources; numbered as in the script, where they were written down before the runs.

{claims}

### Test accuracy

{accuracies}
"""


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (2 to 10)")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/results"), help="where the page goes")
    arguments = parser.parse_args()
    if not 2 <= arguments.seeds <= MAX_FEW_SEEDS:
        parser.error(f"--seeds {arguments.seeds} is not among 2 to {MAX_FEW_SEEDS}; write a number between them")
    if absent := [path for path in (MODEL, SOLUTIONS, TRUTHFULQA) if not path.exists()]:
        print(f"skipped: {', '.join(map(str, absent))} not found; this study needs the shared model and data")
        return
    disable_progress_bars()
    torch.set_num_threads(1)
    budget = Budget()
    runs = run_all(arguments.seeds, budget, KEPT / "roma_gsm")
    sources = ["mean", "TruthfulQA", "GSM8K"]
    seconds = sum(found["seconds"] for own in runs.values() for found in own)
    text = TEXT.format(
        origin=origin("python scripts/claims/roma_gsm.py", seconds),
        claims=table("claim", ["difference", "verdict"], claim_rows(runs)),
        accuracies=table("arm", [*sources, "lambda / rate chosen"], accuracy_rows(runs, sources)),
        solved=f"{np.mean([found['solved'] for found in runs[ROMA]]):.0%}",
        same=f"{np.mean([found['same task'] for found in runs[ROMA]]):.0%}",
        lambdas=", ".join(f"{weight:g}" for weight in LAMBDAS),
        rates=", ".join(f"{rate:g}" for rate in RATES),
        rate=RATE,
        seeds=arguments.seeds,
        **vars(budget),
    )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_section(arguments.output_dir / PAGE, HEADER, "text", text)


if __name__ == "__main__":
    main()
