"""Pictures that launch scripts draw, kept for a test to look at."""

from __future__ import annotations

from typing import Any

import pytest


class Drawn:
    """Stands in for ``plots.picture`` and keeps the figure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.figure: Any = None
        picture = module.picture

        def keep(*given: Any, **options: Any) -> Any:
            self.context = picture(*given, **options)
            return self

        monkeypatch.setattr(module, "picture", keep)

    def __enter__(self) -> tuple[Any, Any]:
        self.figure, axes = self.context.__enter__()
        return self.figure, axes

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
