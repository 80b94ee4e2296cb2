"""What the metrics of a pair objective mean; shared by every method on (chosen, rejected) pairs. No upstream names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PAIR_METRICS: Mapping[str, str] = MappingProxyType(
    {
        "rewards/chosen": "implicit reward of the chosen response: its beta times its log-ratio (mean over pairs)",
        "rewards/rejected": "implicit reward of the rejected response",
        "rewards/margins": "z, the chosen minus the rejected reward",
        "rewards/accuracies": "fraction of pairs with a positive margin",
        "logps/chosen": "log-likelihood of the chosen response under the policy, nats a sequence",
        "logps/rejected": "log-likelihood of the rejected response, nats a sequence",
        "mean_logps/chosen": "log-likelihood of the chosen responses, nats a token, every token weighing the same",
        "mean_logps/rejected": "log-likelihood of the rejected responses, nats a token",
        "logratio/chosen": "log pi - log pi_ref of the chosen response; negative with growing margins: degradation",
        "logratio/rejected": "log pi - log pi_ref of the rejected response; its fall is property 1, the drastic drop",
        "grad_ratio_log": (
            "log of the rejected over the chosen gradient in probability space, L_w - L_l + log(beta_neg/beta_pos); "
            "left out when beta_neg is 0"
        ),
        "grad_ratio_log_per_token": (
            "the same with each log-likelihood divided by its length; left out when beta_neg is 0"
        ),
        "effective_weight": "sigma(-z), the share of the gradient that is left; near 0 the pair has stopped training",
    }
)
