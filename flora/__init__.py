"""flora: from a trained Vision Transformer and a budget to an engine with proof.

The names below are the public Python interface; each is imported when it is first used.
"""

import importlib
from typing import Any

_PUBLIC = {
    "BenchRequest": "flora.pipeline.bench",
    "CompressRequest": "flora.pipeline.compress",
    "ExportRequest": "flora.pipeline.export",
    "FilterRequest": "flora.pipeline.filter",
    "RankConfig": "flora.ranks.config",
    "SearchRequest": "flora.pipeline.search",
    "SearchSpace": "flora.ranks.space",
    "TrainRequest": "flora.pipeline.train",
    "bench_bundle": "flora.pipeline.bench",
    "build": "flora.pipeline.build",
    "compress": "flora.pipeline.compress",
    "evaluate": "flora.training.evaluate",
    "export_bundle": "flora.pipeline.export",
    "filter_space": "flora.pipeline.filter",
    "load_model": "flora.lowrank.checkpoint",
    "load_supernet": "flora.lowrank.checkpoint",
    "materialize": "flora.lowrank.materialize",
    "save_model": "flora.lowrank.checkpoint",
    "search": "flora.pipeline.search",
    "train": "flora.pipeline.train",
    "training_settings": "flora.training.settings",
    "verify_bundle": "flora.pipeline.verify",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flora' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
