"""What a run of treg does beside its loss: the prompts of its token rewards, and what these are like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from alignkit.data.contrast import load_contrast_prompts
from alignkit.parts.method import Preparation
from alignkit.references.token_reward_report import NUM_SHOWN, write_heatmap


class TokenRewarded(Preparation):
    """The prompts that token rewards are made with; rows may bring their own rewards."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        options = config.method_options
        path = None if options.contrast_prompts is None else Path(options.contrast_prompts)
        self.prompts = load_contrast_prompts(path, include_response=options.include_response)

    def for_conversion(self, split: str) -> dict[str, Any]:
        """The prompts, for the rows that bring no rewards."""
        return {"contrast": self.prompts}

    def attach(self, trainer: Any, tokenizer: Any, source: Any, directory: Any) -> None:
        """Print and record what the token rewards are like, with a picture of some."""
        if trainer.args.process_index != 0:
            return
        reports = trainer.reference.token_reward_reports
        for report in reports.values():
            print(report)
        directory.record(token_rewards={name: report.to_dict() for name, report in reports.items()})
        if isinstance(trainer.train_dataset, Dataset):
            picture = directory.path / "token_rewards.html"
            directory.manifest.claim(picture.name)
            write_heatmap(picture, trainer.train_dataset.take(NUM_SHOWN), tokenizer)
            print(f"  {picture} shows some of them")
