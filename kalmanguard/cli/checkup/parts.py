"""Packages: what is needed, what the extras add, and whether the versions are those that were tested."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

from kalmanguard.cli.checkup.check import Check, Verdict

#: The newest version that the test suite has passed with; the oldest is what the package requires.
TESTED = {
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "scipy": "1.17.1",
    "filterpy": "2.0.0",
    "statsmodels": "0.15.0",
    "mapie": "1.6.0",
    "scikit-learn": "1.9.1",
    "pydantic": "2.14.3",
    "typer": "0.29.2",
    "rich": "15.0.0",
    "matplotlib": "3.11.2",
    "jinja2": "3.1.6",
    "safetensors": "0.8.0",
    "pyarrow": "26.0.1",
    "gymnasium": "1.4.0",
    "tensorboard": "2.21.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "lightning": "2.6.6",
    "peft": "0.21.2",
    "starlette": "1.10.0",
    "uvicorn": "0.54.0",
}
#: What an extra is good for.
EXTRAS = {
    "parquet": "trajectories from Parquet files",
    "rl": "the plant cartpole",
    "tensorboard": "decisions in TensorBoard, and trajectories from its logs",
    "huggingface": "the callback for the Hugging Face Trainer",
    "lightning": "the callback for Lightning",
    "accelerate": "the guard for Accelerate",
    "peft": "LoRA and other adapters under supervision",
    "dashboard": "runs live on a page in the browser",
}
_DEVELOPMENT = ("dev", "docs", "test")
_REQUIREMENT = re.compile(
    r"([\w.-]+)\s*(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?[^;]*(?:;.*extra\s*==\s*['\"]([\w-]+)['\"])?"
)


class Requirement(NamedTuple):
    """A package that is asked for, from which version on, and by which extra (``""`` for all uses)."""

    name: str
    oldest: str
    extra: str


def requirements() -> list[Requirement]:
    """What the installed kalmanguard asks for; empty where it is not installed but only copied."""
    try:
        lines = requires("kalmanguard") or []
    except PackageNotFoundError:
        return []
    found = [match for line in lines if (match := _REQUIREMENT.match(line))]
    return [Requirement(match[1], match[2] or "", match[3] or "") for match in found]


def check_parts() -> Iterator[Check]:
    """Look at the packages that are needed, then at each extra."""
    wanted = requirements()
    if not wanted:
        yield Check(
            "Packages", "kalmanguard", Verdict.PROBLEM, "kalmanguard is not installed: only its sources are found.",
            "Install it (pip install ., or pip install -e . in the sources): plants and versions are found that way.",
        )  # fmt: skip
        return
    yield Check(
        "Packages", "kalmanguard", Verdict.OK, version("kalmanguard"), values={"version": version("kalmanguard")}
    )
    for requirement in wanted:
        if not requirement.extra:
            yield judge(requirement, installed(requirement.name), needed=True)
    for extra in dict.fromkeys(requirement.extra for requirement in wanted):
        if extra and extra not in _DEVELOPMENT:
            yield _extra(extra, [requirement for requirement in wanted if requirement.extra == extra])


def judge(requirement: Requirement, found: str | None, *, needed: bool) -> Check:
    """Judge an installed version against what is required and what was tested."""
    name, oldest, _ = requirement
    newest = TESTED.get(name.lower(), "")
    values = {"version": found, "required": oldest, "tested": newest}
    if found is None:
        verdict = Verdict.PROBLEM if needed else Verdict.ABSENT
        return Check("Packages", name, verdict, "not installed", f"Install it: pip install '{name}>={oldest}'.", values)
    if oldest and release(found) < release(oldest):
        return Check(
            "Packages", name, Verdict.PROBLEM, f"{found} is older than the required {oldest}",
            f"Upgrade it: pip install '{name}>={oldest}'.", values,
        )  # fmt: skip
    if newest and release(found)[:2] > release(newest)[:2]:
        return Check(
            "Packages", name, Verdict.NOTE, f"{found} is newer than the tested {newest}",
            f"It may work; if something breaks, try pip install '{name}=={newest}'.", values,
        )  # fmt: skip
    return Check("Packages", name, Verdict.OK, found, values=values)


def _extra(extra: str, wanted: list[Requirement]) -> Check:
    found = {requirement.name: installed(requirement.name) for requirement in wanted}
    gives = EXTRAS.get(extra, "")
    values = {"versions": found, "gives": gives}
    missing = [name for name, there in found.items() if there is None]
    if missing:
        text = f"not installed (lacks {', '.join(missing)}); it would give {gives or 'an optional part'}"
        return Check("Extras", extra, Verdict.ABSENT, text, f"If wanted: pip install 'kalmanguard[{extra}]'.", values)
    told = ", ".join(f"{name} {there}" for name, there in found.items())
    worst = next(
        (check for r in wanted if (check := judge(r, found[r.name], needed=False)).verdict is not Verdict.OK), None
    )
    if worst is not None:
        return Check("Extras", extra, Verdict.NOTE, f"{worst.name} {worst.text}", worst.advice, values)
    return Check("Extras", extra, Verdict.OK, f"{told}: {gives}" if gives else told, values=values)


def installed(name: str) -> str | None:
    """Version of an installed package, ``None`` when there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version that count.

    >>> release("2.13.0+cpu") > release("2.6"), release("1.0rc1")
    (True, (1, 0))
    """
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()
