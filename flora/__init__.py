"""flora: from a trained Vision Transformer and a budget to an engine with proof.

The names below are the public Python interface; each is imported when it is first used.
"""

import importlib
from typing import Any

_PUBLIC = {
    "RankConfig": "flora.ranks.config",
    "SearchSpace": "flora.ranks.space",
    "build": "flora.pipeline.build",
    "evaluate": "flora.training.evaluate",
    "export_bundle": "flora.pipeline.export",
    "load_model": "flora.lowrank.checkpoint",
    "load_supernet": "flora.lowrank.checkpoint",
    "materialize": "flora.lowrank.materialize",
    "save_model": "flora.lowrank.checkpoint",
    "verify_bundle": "flora.pipeline.verify",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flora' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
