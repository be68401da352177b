"""The README's and the guide's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> list[str]:
    return BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))


CASES = [
    pytest.param(code, id=f"{name}-{index}")
    for name in ("README.md", "docs/guide.md", "docs/methods.md", "docs/refinement.md")
    for index, code in enumerate(blocks(name))
]


def test_the_documents_have_code() -> None:
    assert len(blocks("README.md")) == 2
    assert len(blocks("docs/guide.md")) == 1


@pytest.mark.parametrize("code", CASES)
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {"__name__": "document"})
