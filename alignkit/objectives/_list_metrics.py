"""What the metrics of an objective on scored lists mean; shared by methods that rank candidates by one number each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

LIST_METRICS: Mapping[str, str] = MappingProxyType(
    {
        "rewards/chosen": "implicit reward of the best candidate",
        "rewards/rejected": "the same of the worst candidate",
        "rewards/margins": "the best minus the worst candidate's reward",
        "rewards/accuracies": "share of the pairs of candidates with unequal scores that the rewards order as the "
        "scores do; equal rewards, as of two candidates with the same tokens, count half",
        "logps/chosen": "log-likelihood of the best candidate under the policy, nats a sequence",
        "logps/rejected": "log-likelihood of the worst candidate, nats a sequence",
        "mean_logps/chosen": "log-likelihood of the best candidates, nats a token, every token weighing the same",
        "mean_logps/rejected": "log-likelihood of the worst candidates, nats a token",
    }
)
