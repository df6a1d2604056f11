"""vramplan: will this fine-tuning job fit this card?

>>> import vramplan
>>> card = vramplan.find_gpu("rtx-3060-12gb")
>>> prediction = vramplan.predict(vramplan.find_model("gpt-j-6b"), vramplan.Job(), card)
>>> vramplan.judge(prediction, card.slug, vramplan.usable_bytes(card)).verdict
'fits'
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from vramplan.catalogue import find_model
    from vramplan.comparing import compare
    from vramplan.comparison import Comparison
    from vramplan.errors import VramplanError
    from vramplan.gpus import Gpu, find_gpu
    from vramplan.job import Job
    from vramplan.model import Model
    from vramplan.prediction import (
        Prediction,
        Verdict,
        job_for,
        judge,
        predict,
        usable_bytes,
    )
    from vramplan.record import read_record

__version__ = "0.1.0"

_HOMES = {
    "Comparison": "comparison",
    "Gpu": "gpus",
    "Job": "job",
    "Model": "model",
    "Prediction": "prediction",
    "Verdict": "prediction",
    "VramplanError": "errors",
    "compare": "comparing",
    "find_gpu": "gpus",
    "find_model": "catalogue",
    "job_for": "prediction",
    "judge": "prediction",
    "predict": "prediction",
    "read_record": "record",
    "usable_bytes": "prediction",
}

__all__ = [
    "Comparison",
    "Gpu",
    "Job",
    "Model",
    "Prediction",
    "Verdict",
    "VramplanError",
    "__version__",
    "compare",
    "find_gpu",
    "find_model",
    "job_for",
    "judge",
    "predict",
    "read_record",
    "usable_bytes",
]


def __getattr__(name: str) -> _Any:
    """Import a public name when it is first used; nothing happens at import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vramplan' has no attribute {name!r}")
    return getattr(_importlib.import_module(f"vramplan.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__doc__"]
