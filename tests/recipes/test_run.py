from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

from fxmpq.quantizers.rule import RuleChoice
from fxmpq.recipes import run as run_module
from fxmpq.recipes.reading import open_recipe
from fxmpq.recipes.run import method_options, run_recipe
from fxmpq.recipes.schema import Recipe, RecipeError, read_recipe
from fxmpq.recipes.token_sequences import language_loss
from fxmpq.report.report import Report
from fxmpq.sensitivity.projection_pass import ProjectionPass
from fxmpq.solver.plan import Plan
from fxmpq.training.loss import classification_loss

FEW = ["data.calibration_samples=48", "data.test_samples=64", "data.batch_size=16"]
ONCE = [*FEW, "target=reference", "uniform=[w4a8]"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resnet")


@pytest.fixture(scope="module")
def printed(output: Path) -> str:
    """Runs the packaged recipe once, on few samples and the quicker target."""
    recipe = open_recipe("resnet.yaml", [*ONCE, f"output={output}"])
    console = Console(file=io.StringIO(), width=100)
    run_recipe(recipe, console)
    return str(console.file.getvalue())


def test_it_prints_what_it_does_and_both_tables(printed: str, output: Path) -> None:
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0] == "• loading resnet20-fashion-mnist and its data"
    assert "Layers at weights=15% on reference" in lines
    assert "On 64 test samples, all running on reference" in lines
    assert any(line.startswith("stage1.0.conv1 w") for line in lines)
    for name in ("float", "mixed", "w4a8"):
        assert any(line.startswith(f"{name} ") for line in lines)
    assert lines[-1].startswith(f"Written to {output}: ") or str(output) in printed


def test_it_writes_everything_down(printed: str, output: Path) -> None:
    assert {path.name for path in output.iterdir()} == {
        "recipe.yaml",
        "plan.json",
        "report.json",
        "report.html",
        "tradeoff.png",
        "tradeoff.svg",
        "refinement.png",
        "refinement.svg",
        "model.safetensors",
        "model.json",
    }
    report = Report.from_json(output / "report.json")
    plan = Plan.from_json(output / "plan.json")
    assert plan.relative["weights"] <= 0.15
    assert report.entries["mixed"].weight_bytes == plan.costs["weights"]
    assert {row.layer: row.precision for row in report.layers} == plan.layers
    assert (report.calibration_samples, report.test_samples) == (48, 64)
    assert report.entries["float"].score > 0.8


def test_the_recipe_it_writes_runs_the_same(printed: str, output: Path) -> None:
    written = yaml.safe_load((output / "recipe.yaml").read_text())
    expected = open_recipe("resnet.yaml", [*ONCE, f"output={output}"])
    assert read_recipe(written) == expected


def test_a_users_text_model_runs_on_onnxruntime(
    bert_folder: Path, csv_file: Path, tmp_path: Path
) -> None:
    data = {
        "source": "files",
        "format": "csv",
        "calibration": str(csv_file),
        "test": str(csv_file),
        "input_columns": ["text"],
        "max_length": 8,
        "calibration_samples": 8,
        "batch_size": 8,
    }
    overrides = [
        f"model.name={bert_folder}",
        f"data={json.dumps(data)}",
        f"output={tmp_path / 'new' / 'folder'}",
        "keep={classifier: w8a8}",
        "products=true",
        "uniform=[]",
    ]
    report = run_recipe(open_recipe("bert.yaml", overrides), Console(file=io.StringIO()))
    assert list(report.entries) == ["float", "mixed"]
    assert "model.onnx" in report.files
    chosen = {row.layer: row for row in report.layers}
    assert chosen["classifier"].precision == "w8a8"
    assert chosen["bert.encoder.layer.0.output.dense"].kernel.startswith("MatMulInteger")
    for part in ("scores", "context"):
        row = chosen[f"bert.encoder.layer.0.attention.self.{part}"]
        assert (row.precision, row.kernel) == ("a8", "MatMulIntegerToFloat")


def test_a_users_decoder_runs_in_blocks_and_has_a_perplexity(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    data = {
        "source": "files",
        "format": "text",
        "calibration": str(text_file),
        "test": str(text_file),
        "input_columns": ["text"],
        "max_length": 16,
        "calibration_samples": 8,
        "batch_size": 4,
    }
    overrides = [
        f"model.name={llama_folder}",
        f"data={json.dumps(data)}",
        f"output={tmp_path}",
        "uniform=[w8b32]",
    ]
    console = Console(file=io.StringIO(), width=100)
    report = run_recipe(open_recipe("decoder.yaml", overrides), console)
    assert report.metric == "perplexity"
    # With random weights it guesses among some 280 tokens.
    base = report.entries["float"].score
    assert base > 100
    assert report.entries["w8b32"].score == pytest.approx(base, rel=0.01)
    kernels = {row.kernel for row in report.layers}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= kernels
    printed = console.file.getvalue()
    assert "ppl." in printed
    assert report.parts is not None
    assert report.parts.weights == report.entries["mixed"].weight_bytes
    assert sum(asdict(report.parts).values()) == report.files["model.onnx"]
    assert f"main file: {report.parts}" in printed
    assert "perplexity" in (tmp_path / "report.html").read_text()


def test_the_seed_reaches_methods_that_take_one() -> None:
    def options(*overrides: str) -> dict[str, object]:
        return method_options(open_recipe("resnet.yaml", ["seed=7", *overrides]))

    assert options() == {"seed": 7}
    assert options("options={probes: 2, seed: 3}") == {"seed": 3, "probes": 2}
    assert options("method=sqnr") == {}
    assert options("method=hessian") == {"seed": 7, "loss": classification_loss}
    decoder = open_recipe("decoder.yaml", ["method=hessian"])
    assert method_options(decoder) == {"seed": 0, "loss": language_loss}


def test_methods_that_need_labels_get_those_of_the_calibration_samples(tmp_path: Path) -> None:
    """The labels are the right ones: the trained network's loss on them is low."""
    wanted = ["method=hessian", "options={probes: 1}", "refine=null", "uniform=[w8a8]"]
    recipe = open_recipe("resnet.yaml", [*FEW, "target=reference", *wanted, f"output={tmp_path}"])
    seen: list[float] = []

    def loss(model: nn.Module, batch: object) -> Tensor:
        seen.append(float(classification_loss(model, batch).detach()))
        return classification_loss(model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "classification_loss", loss)
        report = run_recipe(recipe, Console(file=io.StringIO()))
    assert max(seen) < 1.0
    assert (report.method, report.unit, report.curve) == ("hessian", "score", ())
    page = (tmp_path / "report.html").read_text()
    assert "the method hessian predicts none" in page
    assert "SQNR alone is" not in page


def test_the_recipes_threads_are_used_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def stop(recipe: Recipe) -> None:
        used.append(torch.get_num_threads())
        raise RecipeError("stop here")

    monkeypatch.setattr(run_module, "load", stop)
    before = torch.get_num_threads()
    for threads in (3, None):
        recipe = open_recipe("resnet.yaml", [f"threads={threads or 'null'}", f"output={tmp_path}"])
        with pytest.raises(RecipeError, match="stop here"):
            run_recipe(recipe, Console(file=io.StringIO()))
    assert used == [3, before]
    assert torch.get_num_threads() == before


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had measured is not measured again; the journal goes when the search is done."""
    recipe = open_recipe(
        "resnet.yaml", [*FEW, "target=reference", "options={probes: 1}", f"output={tmp_path}"]
    )
    batches: list[object] = []
    original = ProjectionPass.project

    def project(self: ProjectionPass, *args: object, **kwargs: object) -> object:
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ProjectionPass, "project", project)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, Console(file=io.StringIO()))
    assert (tmp_path / "search.journal").exists()
    monkeypatch.setattr(run_module, "build_report", lambda *_, **__: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        run_recipe(recipe, Console(file=io.StringIO()))
    assert len(batches) == 2 + 2
    assert not (tmp_path / "search.journal").exists()


def test_a_refined_recipe_tells_what_was_refined(
    tmp_path: Path, coarse_refinement: list[str]
) -> None:
    wanted = [*FEW, "target=reference", "refine=coarse", "uniform=[w4a8]", f"output={tmp_path}"]
    console = Console(file=io.StringIO(), width=100)
    report = run_recipe(open_recipe("resnet.yaml", wanted), console)
    layers = [row.layer for row in report.layers]
    assert {row.layer for row in report.refinements} == set(layers)
    assert len(coarse_refinement) == 2 * len(layers)  # the uniform model too
    printed = str(console.file.getvalue())
    assert "refining w4a8 (coarse)" in printed
    assert "Refinement: SQNR in dB" in printed
    names = {path.name for path in tmp_path.iterdir()}
    assert {"refinement.png", "refinement.svg"} < names
    assert not any(name.startswith("search") for name in names)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["refine"] == "coarse"
    assert "refine" in report.search_seconds


def test_its_rules_of_ranges_and_scales_reach_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a mistake in them is found when it is read."""

    class SearchedError(Exception):
        pass

    def search(*_args: object, ranges: object, weight_scales: object, **_options: object) -> None:
        raise SearchedError(ranges, weight_scales)

    monkeypatch.setattr(run_module, "quantize", search)
    overrides = [*FEW, "ranges={rule: sigma, k: 4}", "weight_scales=minmax", f"output={tmp_path}"]
    with pytest.raises(SearchedError) as found:
        run_recipe(open_recipe("resnet.yaml", overrides), Console(file=io.StringIO()))
    assert found.value.args == (RuleChoice("sigma", (("k", 4.0),)), RuleChoice("minmax"))
    with pytest.raises(RecipeError, match="the rule 'sigma' for ranges has no option 'p'"):
        open_recipe("resnet.yaml", ["ranges.rule=sigma", "ranges.p=2"])
