"""What a recipe says: its fields and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from fxmpq.calibration.options import read_ranges, read_weight_scales
from fxmpq.errors import FxmpqError
from fxmpq.explain import explain
from fxmpq.formats import Precision
from fxmpq.graph.patterns import read_ties
from fxmpq.quantizers.rule import RuleChoice
from fxmpq.solver.budget import Budget

LANGUAGE = "language-modelling"
Task = Literal["image-classification", "text-classification", "language-modelling"]


class RecipeError(FxmpqError):
    """A recipe cannot be read, or asks for something that is not there."""


def _read_budget(value: object) -> Budget:
    if not isinstance(value, (str, Mapping, Budget)):
        raise RecipeError(f"a budget is written as 'weights=15%'; found {value!r}")
    return Budget.parse(value)


def _read_precision(text: str) -> str:
    return str(Precision.parse(text))


def _write_rule(choice: RuleChoice) -> str | dict[str, object]:
    return choice.written


BudgetText = Annotated[InstanceOf[Budget], BeforeValidator(_read_budget), PlainSerializer(str)]
RangesText = Annotated[
    InstanceOf[RuleChoice], BeforeValidator(read_ranges), PlainSerializer(_write_rule)
]
WeightScalesText = Annotated[
    InstanceOf[RuleChoice], BeforeValidator(read_weight_scales), PlainSerializer(_write_rule)
]
TiesText = Annotated[tuple[tuple[str, ...], ...], BeforeValidator(read_ties)]
PrecisionName = Annotated[str, AfterValidator(_read_precision)]


class _Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EmbeddedModel(_Section):
    """A model that comes with the recipes.

    Attributes:
        source: `embedded`.
        name: `resnet20-fashion-mnist`, this project's ResNet-20.
    """

    source: Literal["embedded"]
    name: Literal["resnet20-fashion-mnist"] = "resnet20-fashion-mnist"


class TransformersModel(_Section):
    """A trained model in transformers' format, its weights in safetensors.

    Attributes:
        source: `transformers`.
        name: A hub name, as `microsoft/resnet-18`, or a local folder.
        task: What it does; decides how its data is prepared, and whether accuracy or, for
            `language-modelling`, perplexity is measured.
        revision: Branch, tag or commit on the hub.
    """

    source: Literal["transformers"]
    name: str = Field(min_length=1)
    task: Task
    revision: str | None = None


class _Data(_Section):
    """What every source of data has; a language model's samples are sequences of tokens.

    Attributes:
        calibration_samples: Samples for the search; most methods leave their labels unread.
        test_samples: At most so many samples for the figures, held in memory; all there are if
            `None`.
        batch_size: Samples a batch.
    """

    calibration_samples: int = Field(512, ge=1)
    test_samples: int | None = Field(4000, ge=1)
    batch_size: int = Field(64, ge=1)


class EmbeddedData(_Data):
    """Data that comes with the recipes.

    Attributes:
        source: `embedded`.
        name: `fashion-mnist`: 1,024 calibration and 4,000 test images.
    """

    source: Literal["embedded"]
    name: Literal["fashion-mnist"] = "fashion-mnist"


class _Columns(_Data):
    """Where inputs and labels are in a table of samples.

    Attributes:
        input_columns: The image's column; or the text's, two of them for pairs of sentences.
        label_column: Class numbers, or names that the model's configuration lists.
        max_length: Tokens a text is padded or cut to; of a language model's sequence, to which
            joined texts are cut.
    """

    input_columns: tuple[str, ...] = Field(min_length=1, max_length=2)
    label_column: str = "label"
    max_length: int = Field(128, ge=1)


class HubData(_Columns):
    """A data set by its name on the `datasets` hub.

    Attributes:
        source: `hub`.
        name: As `stanfordnlp/sst2`, or a local folder in a layout that `datasets` knows.
        config: The data set's configuration, where it has several.
        revision: Branch, tag or commit on the hub.
        calibration_split: Split the search takes its samples from.
        test_split: Split the figures are measured on.
    """

    source: Literal["hub"]
    name: str = Field(min_length=1)
    config: str | None = None
    revision: str | None = None
    calibration_split: str = "train"
    test_split: str = "validation"

    def describe(self) -> str:
        """Which data, for people."""
        config = "" if self.config is None else f" ({self.config})"
        return f"{self.name}{config}, splits {self.calibration_split} and {self.test_split}"


class FilesData(_Columns):
    """Local files.

    Attributes:
        source: `files`.
        format: `csv`, `json` (an object a line), `parquet`, `text` (with the column `text`), or
            `imagefolder`: a folder for each class, with its images.
        calibration: File or, for `imagefolder`, folder the search takes its samples from.
        test: File or folder the figures are measured on.
    """

    source: Literal["files"]
    format: Literal["csv", "json", "parquet", "text", "imagefolder"]
    calibration: Path
    test: Path

    def describe(self) -> str:
        """Which data, for people."""
        return f"{self.calibration} and {self.test} ({self.format})"


Model = Annotated[EmbeddedModel | TransformersModel, Field(discriminator="source")]
Data = Annotated[EmbeddedData | HubData | FilesData, Field(discriminator="source")]


class Recipe(_Section):
    """A whole run: model, data, what to choose from and where to write.

    Attributes:
        title: One line for the report; the model's name if `None`.
        model: The trained model.
        data: Calibration and test data.
        target: Runtime to quantize for.
        budget: What the plan may cost, as `weights=15%`, or a mapping of the same.
        candidates: Precisions to choose from; the target's own if `None`.
        method: Sensitivity method; one that needs labels gets those of the calibration samples.
        program: Form of the bit-width program; the method's own if `None`.
        keep: Layer pattern to the precision it must have.
        exclude: Patterns of layers that stay float.
        ties: Layers that share a precision: each entry a pattern on their names, or a list of
            several.
        products: Whether products of two activations, as in attention, are quantized too.
        options: Of the method, as `probes`.
        ranges: Rule of the activation ranges, as `percentile`, or a mapping with its options, as
            `{rule: percentile, percentile: 99.9}`.
        weight_scales: Rule of the weight scales, in the same form.
        bias_correction: Whether quantized layers get corrected biases.
        refine: A recipe or method of refinement, as `light` or `advanced`, for the plan's graph
            and the uniform ones beside it; none if `None`.
        uniform: Precisions to compare with; every candidate if `None`.
        threads: Threads torch uses inside an operator; its own choice if `None`. Latencies are
            always measured on one.
        seed: Seeds the choice of calibration samples and the method's random numbers.
        output: Folder to write to.
    """

    title: str | None = None
    model: Model
    data: Data
    target: str = "onnxruntime"
    budget: BudgetText
    candidates: tuple[PrecisionName, ...] | None = Field(None, min_length=1)
    method: str = "projected"
    program: str | None = None
    keep: dict[str, PrecisionName] = Field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    ties: TiesText = ()
    products: bool = False
    options: dict[str, int | float | str | bool] = Field(default_factory=dict)
    ranges: RangesText = read_ranges("mse")
    weight_scales: WeightScalesText = read_weight_scales("mse")
    bias_correction: bool = True
    refine: str | None = None
    uniform: tuple[PrecisionName, ...] | None = None
    threads: int | None = Field(None, ge=1)
    seed: int = 0
    output: Path = Path("fxmpq-output")

    @model_validator(mode="after")
    def _model_fits_data(self) -> Recipe:
        """The embedded images are prepared for the embedded model, and it has nothing else."""
        if (self.model.source == "embedded") != (self.data.source == "embedded"):
            raise RecipeError(
                f"a model from {self.model.source!r} cannot take data from {self.data.source!r}: "
                "the embedded model and the embedded data belong together, and a transformers "
                "model takes data from 'hub' or 'files'"
            )
        return self


def read_recipe(content: object) -> Recipe:
    """Check what a recipe file or a program gives and fill in the defaults.

    Args:
        content: Nested mappings, lists and values, as YAML gives them.

    Returns:
        The recipe.

    Raises:
        RecipeError: Listing every unknown key, with the closest ones, and every wrong value.

    Examples:
        >>> recipe = read_recipe(
        ...     {
        ...         "model": {"source": "embedded"},
        ...         "data": {"source": "embedded"},
        ...         "budget": "weights=15%",
        ...     }
        ... )
        >>> recipe.target, recipe.data.calibration_samples
        ('onnxruntime', 512)
    """
    if not isinstance(content, Mapping):
        raise RecipeError(
            f"a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}; "
            f"found {type(content).__name__}"
        )
    try:
        return Recipe.model_validate(dict(content))
    except ValidationError as error:
        raise RecipeError(f"the recipe cannot be used:\n{explain(error, Recipe)}") from error
