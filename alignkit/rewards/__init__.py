"""Rewards for what a model wrote: plain Python functions, one file a family, for any trainer that takes functions.

``load_rewards`` makes those that a run names. A file here whose ``REWARDS`` lists subclasses of
:class:`~alignkit.parts.reward.Reward` adds some. Neither torch nor a trainer is imported.
"""

from alignkit.parts.reward import Reward as Reward
from alignkit.parts.reward import load_reward as load_reward
from alignkit.parts.reward import reward_names as reward_names
from alignkit.rewards._choice import ChosenReward as ChosenReward
from alignkit.rewards._choice import check_columns as check_columns
from alignkit.rewards._choice import load_rewards as load_rewards
from alignkit.rewards._files import file_function as file_function
from alignkit.rewards._guard import guarded as guarded
