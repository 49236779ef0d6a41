"""Faults planted one at a time in a chain that passes: each must fail at its stage.

The chain is that of `flora export`: the Fashion ViT dense and at uniform ranks for 40 % of its MACs, in torch, on ONNX
Runtime, in FP16 and in INT8.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from verified.clean import EXPORTS, FASHION, model_folder

from calibrate.half import half_onnx
from calibrate.mixed import CONVERSIONS, products_by_layer
from calibrate.ranges import measure_ranges
from calibrate.static import quantize_onnx
from export.departures import first_departure
from export.onnx import onnx_from_module
from export.thresholds import THRESHOLDS
from export.verify import VerifyReport
from flora.lowrank.checkpoint import LoadedModel, load_model_folder
from flora.pipeline.proof import Exported, Protocol, prove
from flora.preprocessing import Preprocessing
from flora.training.data import TimmImages

IMAGES, CALIBRATION_IMAGES = 250, 128
# What the dense model is known to reach on all test images.
EXPECTED_TOP1 = 89.12
SCALE, LARGE_WEIGHT = 4.0, 3e4
SMALLEST_MATRIX, CLASSES = 256, 10
PRODUCTS = ("MatMul", "Gemm")


class Rolled:
    """Images whose classes are counted from another one on."""

    def __init__(self, images: TimmImages, by: int) -> None:
        self._images, self._by = images, by

    def __len__(self) -> int:
        return len(self._images)

    def names(self) -> list[str] | None:
        return self._images.names()

    def record(self):
        return self._images.record()

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for images, labels in self._images.batches(batch_size):
            yield images, None if labels is None else (labels + self._by) % CLASSES


class Chain:
    """The files of the chain in `folder`, and what it says of them."""

    def __init__(self, fashion: str, folder: Path) -> None:
        self.fashion, self.folder = fashion, folder
        self.dense = load_model_folder(FASHION)
        compact = load_model_folder(model_folder(EXPORTS["fashion-40"], fashion))
        self.exported = [_exported("dense", "yardstick", self.dense), _exported("factorized", "candidate", compact)]
        for one in self.exported:
            onnx_from_module(one.module, folder / one.path, preprocessing=self.settings)
        self.write_half()
        self.write_int8()

    @property
    def settings(self) -> Preprocessing:
        return self.dense.config.preprocessing

    def file(self, precision: str) -> Path:
        """The factorized model's file."""
        return self.folder / f"onnx/model-{precision}.onnx"

    def images(self) -> np.ndarray:
        """A few images [B, C, H, W] to look for a layer with."""
        return next(TimmImages(f"{self.fashion},split=train,fold=1/24,limit=16", self.settings).batches(16))[0]

    def write_half(self) -> None:
        """The file in FP16, from what is in the FP32 file now."""
        half_onnx(self.file("fp32"), self.file("fp16"), "fp16")

    def write_int8(self) -> None:
        """The file in INT8."""
        calibration = TimmImages(f"{self.fashion},split=train,fold=1/24,limit={CALIBRATION_IMAGES}", self.settings)
        batches = (images for images, _ in calibration.batches(32))
        quantize_onnx(self.file("fp32"), self.file("int8"), measure_ranges(self.file("fp32"), batches, "min-max"))

    def report(self, settings: Preprocessing | None = None, *, roll: int = 0) -> VerifyReport:
        """What verification finds, with other preprocessing, or classes counted from `roll` on."""
        images = TimmImages(f"{self.fashion},split=validation,limit={IMAGES}", settings or self.settings)
        protocol = Protocol(
            smallest=1, usual=8, repeats=1, threads=1, thresholds=THRESHOLDS, expected_top1=EXPECTED_TOP1
        )
        low = [_low(self.exported[1], precision) for precision in ("fp16", "int8")]
        chain = [*self.exported, *low]
        return prove(chain, self.folder, Rolled(images, roll), protocol, on_step=lambda step: None).report

    def bisected(self, precision: str) -> dict[str, str | None]:
        """The layer that bisection of the file names."""
        found = first_departure(self.file("fp32"), self.file(precision), self.images(), threads=1)
        return {"layer": found.layer if found else None}

    @contextmanager
    def planted(self, path: Path, change: Callable[[ModelProto], None]) -> Iterator[None]:
        """Inside the block, the file is changed."""
        before = path.read_bytes()
        model = onnx.load_from_string(before)
        change(model)
        onnx.save(model, path)
        try:
            yield
        finally:
            path.write_bytes(before)

    def products(self) -> dict[str, list[str]]:
        """The products with weights, by layer: one of a dense layer, two of one of two factors."""
        return products_by_layer(onnx.load(self.file("fp32")), onnx.load(self.file("int8")))


def _exported(name: str, role: str, model: LoadedModel) -> Exported:
    path = f"onnx/{'dense' if role == 'yardstick' else 'model'}-fp32.onnx"
    return Exported(name=name, runtime="ort-cpu", role=role, model=model, path=path, module=model.module)


def _low(one: Exported, precision: str) -> Exported:
    return Exported(
        name=one.name,
        runtime=one.runtime,
        role=one.role,
        model=one.model,
        path=one.path.replace("fp32", precision),
        module=one.module,
        precision=precision,
        fp32_name=one.onnx_name,
    )


def matrices(path: Path) -> list[str]:
    """The weights of products and convolutions."""
    tensors = onnx.load(path).graph.initializer
    return [tensor.name for tensor in tensors if len(tensor.dims) >= 2 and np.prod(tensor.dims) >= SMALLEST_MATRIX]


def flip(name: str, model: ModelProto) -> None:
    """The weight, with the other sign."""
    _scale(model, name, -1.0)


def permute_classes(model: ModelProto) -> None:
    """The classes of the head, each in the place of the next."""
    head = [node for node in model.graph.node if node.op_type in PRODUCTS][-1]
    for name in head.input[1:]:
        tensor = _constant(model, name)
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=values.shape.index(CLASSES)), name))


def overflow(products: Sequence[str], model: ModelProto) -> None:
    """What is between the two factors of a layer, too large for FP16, whose weights fit; the second takes it back."""
    down, up = (_node(model, product).input[1] for product in products)
    factor = LARGE_WEIGHT / float(np.abs(numpy_helper.to_array(_constant(model, down))).max())
    _scale(model, down, factor)
    _scale(model, up, 1 / factor)


def scale_step(product: str, of_weights: bool, model: ModelProto) -> None:
    """The step between the codes of a product's activations or weights."""
    conversions = {node.output[0]: node for node in model.graph.node if node.op_type in CONVERSIONS}
    _scale(model, conversions[_node(model, product).input[of_weights]].input[1], SCALE)


def _scale(model: ModelProto, name: str, factor: float) -> None:
    tensor = _constant(model, name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), name))


def _constant(model: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _node(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def swapped(settings: Preprocessing) -> Preprocessing:
    """Mean and standard deviation, each in the place of the other."""
    return settings.model_copy(update={"mean": settings.std, "std": settings.mean})
