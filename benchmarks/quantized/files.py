"""The ONNX files of the benchmark `quantization`: dense and factorized, in FP32 and INT8.

They lie under `runs/quantization`, made once for all arms.
"""

import contextlib
import io
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from compress import Model, compact

from calibrate.ranges import Ranges, measure_ranges
from calibrate.static import quantize_onnx
from export.graphs import graph_at_ranks
from export.onnx import onnx_from_module
from flora.lowrank.checkpoint import load_model, load_model_folder
from flora.lowrank.targets import find_targets, trace_cost
from flora.pipeline.calibrate import Calibrated, CalibrationRequest, calibrate
from flora.pipeline.precision import Judges, open_judges
from flora.preprocessing import Preprocessing
from flora.ranks.budget import macs_budget
from flora.ranks.uniform import uniform_ranks_for_macs
from flora.training.data import TimmImages

ROOT = Path(__file__).parent.parent.parent
RUNS = ROOT / "runs" / "quantization"
FASHION_MODEL = ROOT / "examples" / "fashion" / "model"
LAYERS = ("qkv", "proj", "fc1", "fc2")
RANDOM_MODELS = {
    "deit-s": "deit_small_patch16_224",
    "vit-s": "vit_small_patch16_224",
    "swin-t": "swin_tiny_patch4_window7_224",
}
ENGINE_MODELS = {
    "deit-s": "deit_small_patch16_224",
    "swin-t": "swin_tiny_patch4_window7_224",
    "vit-b": "vit_base_patch16_224",
    "deit3-s": "deit3_small_patch16_224",
}
SIZE = (3, 224, 224)
FORMS = ("dense", "factorized")
FASHION_BUDGET, RANDOM_BUDGET = 20, "50%"
CALIBRATION_IMAGES, NOISE_IMAGES = 128, 8


@dataclass(frozen=True, kw_only=True)
class Fashion:
    """The trained ViT on Fashion-MNIST, whose images lie in `root`.

    Calibration and selection images are two halves of those that the model was not trained on.
    """

    root: Path

    @property
    def text(self) -> str:
        return f"torch/fashion_mnist,root={self.root}"

    @property
    def preprocessing(self) -> Preprocessing:
        return load_model_folder(FASHION_MODEL).config.preprocessing

    @property
    def request(self) -> CalibrationRequest:
        return CalibrationRequest(
            data=f"{self.text},split=train,fold=1/24",
            select_data=f"{self.text},split=train,fold=13/24",
            images=CALIBRATION_IMAGES,
            threads=1,
        )

    def test(self) -> TimmImages:
        return TimmImages(f"{self.text},split=validation", self.preprocessing)

    def judges(self) -> Judges:
        """The images that INT8 files are calibrated and chosen by."""
        request = self.request
        return open_judges(
            request.data, request.select_data, self.preprocessing, None, count=request.images, seed=request.seed
        )

    def fp32(self, form: str) -> Path:
        """Dense, or factorized as flora compress does it without training."""
        path = RUNS / f"fashion-{form}.onnx"
        if not path.is_file():
            model = Model(
                name="fashion",
                folder=FASHION_MODEL,
                budgets=(FASHION_BUDGET,),
                trained_on=f"{self.text},split=train,except=1/12",
                held_out=f"{self.text},split=train,fold=1/12",
                test=f"{self.text},split=validation",
            )
            with TemporaryDirectory() as scratch:
                loaded = (
                    load_model_folder(FASHION_MODEL)
                    if form == "dense"
                    else compact(model, "compensated", FASHION_BUDGET, Path(scratch))
                )
            onnx_from_module(loaded.module, path, preprocessing=loaded.config.preprocessing)
        return path

    def int8(self, form: str, runtime: str) -> tuple[Path, Calibrated]:
        """What flora calibrate writes for the runtime, and what it says of it."""
        path = RUNS / f"fashion-{form}-int8-{runtime}.onnx"
        record = path.with_suffix(".json")
        if not record.is_file():
            request = replace(self.request, runtime=runtime)
            calibrate(self.fp32(form), path, "int8", request, on_step=lambda step: None).save(record)
        return path, Calibrated.load(record)

    def nncf(self, *, overflow_fix: bool = False) -> Path:
        """The factorized model quantized by NNCF on the same calibration images, a file of OpenVINO.

        By its defaults, or with its fix for processors without VNNI, where products by 8-bit weights overflow.
        """
        path = RUNS / f"fashion-factorized-int8-nncf{'-overflow-fix' if overflow_fix else ''}.xml"
        if not path.is_file():
            import nncf
            import openvino

            fixed = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
            images = np.concatenate(list(self.judges().batches()))
            with contextlib.redirect_stdout(io.StringIO()):
                model = nncf.quantize(
                    openvino.Core().read_model(self.fp32("factorized")),
                    nncf.Dataset([image[None] for image in images]),
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=len(images),
                    advanced_parameters=fixed if overflow_fix else None,
                )
            openvino.save_model(model, path, compress_to_fp16=False)
        return path


def random_fp32(name: str, form: str) -> Path:
    """A model of full size with the random weights of seed 0; factorized at uniform ranks for half of its MACs."""
    path = RUNS / f"{name}-{form}.onnx"
    if path.is_file():
        return path
    torch.manual_seed(0)
    model = load_model((RANDOM_MODELS | ENGINE_MODELS)[name], untrained=True)
    if form == "dense":
        onnx_from_module(model.module, path, preprocessing=model.config.preprocessing)
    else:
        cost = trace_cost(model.module, find_targets(model.module, LAYERS), SIZE)
        ranks = uniform_ranks_for_macs(cost, macs_budget(RANDOM_BUDGET, cost))
        graph_at_ranks(onnx.load(random_fp32(name, "dense")), cost.shapes, ranks, path)
    return path


def random_int8(name: str, form: str) -> Path:
    """The same in INT8, by the largest values seen on noise and with 8-bit weights: for time and builds alone."""
    path = RUNS / f"{name}-{form}-int8.onnx"
    if not path.is_file():
        source = random_fp32(name, form)
        quantize_onnx(source, path, noise_ranges(source))
    return path


def noise_ranges(source: Path) -> Ranges:
    return measure_ranges(source, [noise(NOISE_IMAGES, SIZE)], "min-max")


def noise(batch: int, size: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, *size)).astype(np.float32)
