"""What launchers leave in the environment is checked before anything is started."""

from __future__ import annotations

import pytest

from alignkit.environment import process_of_launch
from alignkit.errors import ConfigError

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def set_only(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """These variables of a launch and no others."""
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, (0, 1)), (WHOLE, (1, 2)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1))]
)
def test_a_launch(variables: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    set_only(monkeypatch, variables)
    assert process_of_launch() == expected


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "x"}, "`RANK=x` is not a whole number"),
        ({"WORLD_SIZE": "two"}, "`WORLD_SIZE=two` is not a whole number"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set.*accelerate launch"),
        ({"RANK": "1"}, "`RANK=1` is not one of the 1 processes"),
        (WHOLE | {"RANK": "2"}, "`RANK=2` is not one of the 2 processes"),
        (WHOLE | {"MASTER_PORT": "http"}, "`MASTER_PORT=http` is not a whole number"),
    ],
)
def test_what_is_no_launch_is_refused(variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_only(monkeypatch, variables)
    with pytest.raises(ConfigError, match=says):
        process_of_launch()
