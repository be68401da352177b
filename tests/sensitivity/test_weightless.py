from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, fx
from torch.nn.functional import cross_entropy

from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, Layer, Product
from fxmpq.sensitivity.measure import measure
from fxmpq.sensitivity.weightless import check_all_have_weights

Made = Callable[..., fx.GraphModule]

A4, A8 = Precision(None, 4), Precision(None, 8)
LAYER = Layer("fc", "linear", "fc", "fc.weight", 8, (2, 4), 0)
PRODUCT = Product("scores", "scores", 8)


def test_a_product_with_a_choice_is_refused() -> None:
    group = Group("scores", (), (A4, A8), products=(PRODUCT,))
    with pytest.raises(FxmpqError) as caught:
        check_all_have_weights([group], "'entropy'")
    text = str(caught.value)
    for words in ("'entropy'", "between a4, a8", "keep={'scores': 'a8'}", "'projected'"):
        assert words in text


@pytest.mark.parametrize(
    "group",
    [
        Group("scores", (), (A8,), products=(PRODUCT,)),
        Group("fc", (LAYER,), (Precision(4, 8), Precision(8, 8)), products=(PRODUCT,)),
        Group("fc", (LAYER,), (Precision(4, 8), Precision(8, 8))),
    ],
    ids=["one candidate", "with a layer", "without products"],
)
def test_what_weights_can_tell_is_let_through(group: Group) -> None:
    check_all_have_weights([group], "'entropy'")


METHODS = pytest.mark.parametrize(
    ("method", "options"),
    [
        ("entropy", {}),
        ("orthogonality", {}),
        ("hessian", {"loss": None, "activations": False, "probes": 1}),
    ],
)


def loss_of(model: fx.GraphModule, batch: dict[str, Tensor]) -> Tensor:
    logits = model(**batch).logits
    return cross_entropy(logits, logits.detach().argmax(1))


@METHODS
def test_methods_on_weights_refuse_products_at_the_call(
    method: str,
    options: dict[str, object],
    calibrated: Made,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    candidates = [Precision(4, 4), Precision(8, 8)]
    given = {name: loss_of if name == "loss" else value for name, value in options.items()}
    several = calibrated(bert_graph, token_batches, candidates=candidates, products=True)
    with pytest.raises(FxmpqError, match=f"{method}.* looks at weights alone, and group 'bert"):
        measure(several, token_batches, method=method, progress=False, **given)
    pins = {"*.scores": A8, "*.context": A8}
    one = calibrated(bert_graph, token_batches, candidates=candidates, keep=pins, products=True)
    found = measure(one, token_batches, method=method, progress=False, **given)
    products = [row for name, row in found.values.items() if name.endswith(("scores", "context"))]
    assert products == [{"a8": 0.0}] * 4
