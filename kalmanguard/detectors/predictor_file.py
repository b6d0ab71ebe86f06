"""Files that hold a trained failure predictor: plain JSON, checked by digest and by schema, never unpickled."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kalmanguard.detectors.classifiers import Classifier, LogisticClassifier, Node, TreeClassifier
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.features import FEATURES

#: Version of the files that this module writes and reads.
FORMAT = 1
#: Package whose ``predictor`` folder holds the shipped files; named only, since it imports torch.
_PACKAGE = "kalmanguard.models"
#: What ``"default"`` stands for.
DEFAULT = "boosting"


class PredictorFile(BaseModel):
    """A trained predictor and how it came about.

    Attributes
    ----------
    kind
        ``"logistic"`` (with ``coefficients``) or ``"trees"`` (with ``trees``).
    features
        Names of the features in order; they must be those of this version, `kalmanguard.estimators.features.FEATURES`.
    horizon, harm
        What is predicted: that within so many steps more than this share of the progress is given back.
    threshold, false_alarms_per_1000
        Probability from which it fires, and the rate on healthy training steps that it was chosen for.
    typical
        Mean of every feature over healthy steps.
    trained_on
        Where it comes from: the command and the data, as text and numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal[1] = 1
    kind: Literal["logistic", "trees"]
    features: list[str]
    horizon: int = Field(ge=1)
    harm: float = Field(gt=0)
    threshold: float = Field(gt=0, lt=1)
    false_alarms_per_1000: float = Field(gt=0)
    typical: list[float]
    intercept: float
    coefficients: list[float] = []
    trees: list[list[tuple[int, float, int, int, float]]] = []
    trained_on: dict[str, str | int | float] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if tuple(self.features) != FEATURES:
            raise ValueError("it was trained on other features than this version computes; train it anew")
        if len(self.typical) != len(FEATURES):
            raise ValueError(f"{len(self.typical)} typical values for {len(FEATURES)} features")
        if self.kind == "logistic" and (len(self.coefficients) != len(FEATURES) or self.trees):
            raise ValueError(f"a logistic predictor has {len(FEATURES)} coefficients and no trees")
        if self.kind == "trees" and (not self.trees or self.coefficients):
            raise ValueError("a predictor of trees has at least one, and no coefficients")
        return self

    def classifier(self) -> Classifier:
        """Make what computes the log odds.

        Raises
        ------
        ConfigurationError
            The trees are not trees.
        """
        if self.kind == "logistic":
            return LogisticClassifier(intercept=self.intercept, coefficients=self.coefficients)
        trees = [[Node(*node) for node in tree] for tree in self.trees]
        return TreeClassifier(intercept=self.intercept, trees=trees, features=len(FEATURES))

    def dump(self) -> str:
        """Write it as JSON, with its SHA-256 digest."""
        content = self.model_dump(mode="json")
        return json.dumps({**content, "digest": _digest(content)}, sort_keys=True, separators=(",", ":")) + "\n"


def read_predictor(name: str | Path) -> PredictorFile:
    """Read a shipped predictor by name (``"default"``, ``"logistic"``, ``"boosting"``), or a file of yours by its path.

    Raises
    ------
    ConfigurationError
        There is none of that name, the package that ships them is not installed, the file cannot be read, its digest
        does not fit its content, or the content is not a predictor of this version.

    Examples
    --------
    >>> file = read_predictor("default")
    >>> file.kind, file.horizon
    ('trees', 50)
    """
    where, text = _text(name)
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{where} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{where} holds a {type(content).__name__}; a predictor is an object.")
    if content.get("format") != FORMAT:
        raise ConfigurationError(f"{where} has format {content.get('format')!r}; this version reads format {FORMAT}.")
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise ConfigurationError(f"{where} is damaged or was edited: its digest does not fit its content.")
    try:
        # From JSON text: in strict mode a list is no tuple for Python values, but is one for JSON.
        return PredictorFile.model_validate_json(json.dumps(content))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "as a whole"
        message = problem["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{where} is no predictor of this version: {place}: {message}.") from None


def _text(name: str | Path) -> tuple[str, str]:
    if isinstance(name, Path) or name.endswith(".json"):
        try:
            return str(name), Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"The predictor {name} cannot be read: {error}.") from None
    folder = _shipped()
    name = DEFAULT if name == "default" else name
    found = {file.name.removesuffix(".json"): file for file in folder.iterdir() if file.name.endswith(".json")}
    if name not in found:
        raise ConfigurationError(
            f"There is no predictor {name!r}; choose one of {', '.join(sorted(found)) or '(none is installed)'}, or "
            "give the path of a .json file."
        )
    return f"The predictor {name!r}", found[name].read_text(encoding="utf-8")


def _shipped() -> Any:
    """Find the folder through the package's resource reader, which runs none of the package's code: it needs torch."""
    try:
        spec = find_spec(_PACKAGE)
    except ModuleNotFoundError:
        spec = None
    reader = getattr(spec.loader, "get_resource_reader", None) if spec is not None else None
    folder = reader(_PACKAGE).files() / "predictor" if reader is not None else None
    if folder is None or not folder.is_dir():
        raise ConfigurationError(
            f"The package {_PACKAGE} with the shipped predictors is not installed; install the whole of kalmanguard, "
            "or give the path of a predictor's .json file."
        )
    return folder


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
