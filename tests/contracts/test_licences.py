"""Every pinned package has a licence under which anybody may use alignkit with it, or a reason why it may stay.

alignkit ships none of them: pip fetches each under its own terms. What is asked here is whether installing them puts a
duty on the user or on what they train. ``make check`` runs this on the metadata of the installed packages; those of
the machine's missing extras (a CUDA build, evaluation) were read by hand and are listed with the version that was read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ALLOWED = frozenset(
    "0BSD Apache-2.0 BSD BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 CNRI-Python ISC MIT MIT-CMU PSF-2.0 Zlib".split()
    + ["Apache-2.0 WITH LLVM-exception"]
)
"""SPDX identifiers, all permissive; ``BSD`` is one whose number of clauses the package does not say."""

EXCEPTIONS = {
    "MPL-2.0": (
        "certifi hypothesis pathspec",
        "asks only that changes to its own files be passed on; we change none",
    ),
    "MPL-2.0 AND MIT": ("tqdm", "as those under MPL-2.0 alone"),
    "LGPL-2.1-or-later": ("chardet", "of the extra eval alone, a library imported as it is by lm-eval's dependencies"),
    "LGPL-3.0-or-later": ("dominate", "of the extra eval alone, a library imported as it is by lm-eval's dependencies"),
    "LicenseRef-NVIDIA-Proprietary": (
        "nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft "
        "nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 "
        "nvidia-nvjitlink nvidia-nvshmem-cu13",
        "what torch's CUDA build is linked with; a build of torch for the CPU or for ROCm installs none of it",
    ),
    "none stated": ("cuda-toolkit", "a package without files, by which torch's CUDA build names the ones above"),
}
"""Licence outside ``ALLOWED`` to the packages that may have it, and why."""

READ_BY_HAND = {
    "Apache-2.0": (
        "absl-py==2.5.1 aiosignal==1.4.0 cuda-bindings==13.5.0 cuda-pathfinder==1.9.1 evaluate==0.4.6 "
        "frozenlist==1.8.0 multidict==7.2.1 nltk==3.10.4 nvidia-nvtx==13.0.85 propcache==0.5.4 requests==2.34.2 "
        "rouge-score==0.1.2 sacrebleu==2.6.0 sqlitedict==2.1.0 yarl==1.25.1"
    ),
    "Apache-2.0 AND MIT": "aiohttp==3.14.5",
    "BSD": "colorama==0.4.6",
    "BSD-2-Clause": "liger-kernel==0.8.5",
    "BSD-3-Clause": (
        "cloudpickle==3.1.3 joblib==1.6.0 logbook==1.10.1 lxml==6.1.3 portalocker==4.4.2 py3langid==0.4.0 "
        "scikit-learn==1.9.1 scipy==1.17.1 threadpoolctl==3.8.0"
    ),
    "LGPL-2.1-or-later": "chardet==6.0.0.post1",
    "LGPL-3.0-or-later": "dominate==2.9.1",
    "LicenseRef-NVIDIA-Proprietary": (
        "nvidia-cublas==13.1.1.3 nvidia-cuda-cupti==13.0.85 nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.96 "
        "nvidia-cudnn-cu13==9.20.0.48 nvidia-cufft==12.0.0.61 nvidia-cufile==1.15.1.6 nvidia-curand==10.4.0.35 "
        "nvidia-cusolver==12.0.4.66 nvidia-cusparse==12.6.3.3 nvidia-cusparselt-cu13==0.8.1 nvidia-nccl-cu13==2.29.7 "
        "nvidia-nvjitlink==13.5.37 nvidia-nvshmem-cu13==3.4.5"
    ),
    "MIT": (
        "charset-normalizer==3.5.3 dataproperty==0.37.0 datasketch==2.0.0 editables==0.6 lm-eval==0.4.13 "
        "mbstrdecoder==1.1.5 "
        "more-itertools==11.2.1 msgfy==0.2.1 narwhals==2.29.0 pathvalidate==3.3.1 pytablewriter==0.38.0 pytz==2026.6 "
        "six==1.17.0 tabledata==0.0.26 tabulate==0.10.0 triton==3.7.1 typepy==0.3.1 urllib3==2.8.0 word2number==1.1"
    ),
    "MPL-2.0": "certifi==2026.10.19.post1",
    "PSF-2.0": "aiohappyeyeballs==2.7.1 defusedxml==0.7.1",
    "none stated": "cuda-toolkit==13.0.3.0",
}
"""Of packages that a development install on a CPU lacks, from the metadata of their wheels on the package index."""

OLD_NAMES = {
    "Academic Free License (AFL)": "AFL-3.0",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0",
    "BSD 2-Clause License": "BSD-2-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "BSD License": "BSD",
    "GNU Lesser General Public License v2 or later (LGPLv2+)": "LGPL-2.1-or-later",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-or-later",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "LGPL-3.0-or-newer": "LGPL-3.0-or-later",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA-Proprietary",
    "PSFL": "PSF-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The MIT License (MIT)": "MIT",
}
"""What packages wrote before there were SPDX expressions in their metadata."""


def stated_licence(metadata: Message) -> str:
    """The SPDX expression of a package, or what its older fields amount to; a text of more than a name is no name."""
    expression, text = metadata["License-Expression"], (metadata["License"] or "").strip().partition("\n")[0].strip()
    if expression or text in OLD_NAMES or acceptable(text):
        return expression or OLD_NAMES.get(text, text)
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or [] if "License ::" in line]
    return " AND ".join(OLD_NAMES.get(name, name) for name in classifiers) or text or "none stated"


def acceptable(expression: str) -> bool:
    """Whether one of the alternatives of an expression is allowed; with brackets in it, whether all of it is."""
    if "(" in expression:
        return all(part.strip("() ") in ALLOWED for part in re.split(" AND | OR ", expression))
    return any(all(part in ALLOWED for part in one.split(" AND ")) for one in expression.split(" OR "))


def pins(repository: Path) -> list[str]:
    """The lines of constraints.txt, names in their normal form."""
    lines = [line for line in (repository / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return [f"{canonicalize_name(name)}=={version}" for name, version in (line.split("==") for line in lines)]


def problems(pinned: list[str], installed: Mapping[str, str]) -> Iterator[str]:
    """One line a pinned package that has no licence to be here.

    Args:
        pinned: ``name==version`` of each.
        installed: Licence of every installed package, by name.
    """
    by_hand = {pin: licence for licence, several in READ_BY_HAND.items() for pin in several.split()}
    for pin in pinned:
        name = pin.partition("==")[0]
        licence = installed.get(name) or by_hand.get(pin)
        if licence is None:
            yield f"{pin} is not installed here: read its licence and add it to READ_BY_HAND"
        elif not acceptable(licence) and name not in EXCEPTIONS.get(licence, ("",))[0].split():
            yield f"{pin}: {licence} is not in ALLOWED: add it there, or to EXCEPTIONS with a reason, or do without it"


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    """Licence of every package here."""
    return {canonicalize_name(one.metadata["Name"]): stated_licence(one.metadata) for one in distributions()}


def test_every_pinned_package_may_be_used(repository: Path, installed: dict[str, str]) -> None:
    assert not list(problems(pins(repository), installed))


def test_nothing_is_excused_that_is_not_pinned(repository: Path) -> None:
    pinned = pins(repository)
    assert {pin for several in READ_BY_HAND.values() for pin in several.split()} <= set(pinned)
    assert {name for names, _ in EXCEPTIONS.values() for name in names.split()} <= {
        p.partition("==")[0] for p in pinned
    }


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("GPL-3.0-or-later", False),
        ("GPL-2.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND (Apache-2.0 OR BSD-3-Clause)", True),
        ("(MIT OR Apache-2.0) AND AGPL-3.0-only", False),
        ("", False),
    ],
)
def test_an_expression_is_read_strictly(expression: str, expected: bool) -> None:
    assert acceptable(expression) is expected


def test_a_licence_that_changes_and_a_package_nobody_read_are_named() -> None:
    found = list(problems(["tqdm==9.9", "chardet==6.0.0.post1", "new==1.0"], {"tqdm": "AGPL-3.0-only"}))
    assert [line.split()[0] for line in found] == ["tqdm==9.9:", "new==1.0"]
