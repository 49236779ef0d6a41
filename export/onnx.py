"""From a torch module to an ONNX file that every runtime and engine builder here accepts.

The torch.export based exporter, opset 20 unless asked otherwise (18 and 19 take GELU apart, 23 and above put attention
into one node that TensorRT-RTX refuses in FP32), a dynamic batch, and attention written out as two products: engines
built from that are smaller. The file carries what a server needs: class names, preprocessing, and what goes in and out.
"""

import contextlib
import importlib.metadata
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir
import torch
from torch import Tensor, nn

from flora.artifact import new_file
from flora.errors import FloraError, InputError
from flora.onnxfiles import SCOPES, fits_in_one_file, save_in_two
from flora.preprocessing import Preprocessing

OPSETS = range(17, 26)
INPUT = "images"


def onnx_from_module(
    module: nn.Module,
    path: Path,
    *,
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None = None,
    opset: int = 20,
    max_batch: int = 64,
    eager_attention: bool = True,
    normalize: bool = False,
    softmax: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `module` as ONNX with input `images` [batch, C, H, W] and output `logits` [batch, classes].

    With `normalize` the file takes pixels in 0..1 and normalizes them itself; with `softmax` it gives
    `probabilities`. From opset 23 on TensorRT-RTX refuses attention in FP32. Weights too large for one file go to
    PATH.data beside it.
    """
    _check(module, opset, max_batch, class_names)
    output = "probabilities" if softmax else "logits"
    described = _metadata(preprocessing, class_names, normalize=normalize, output=output)
    wrapped = _Wrapped(module, preprocessing, normalize=normalize, softmax=softmax) if normalize or softmax else module
    with _eval_mode(wrapped), eager_attention_of(module) if eager_attention else contextlib.nullcontext():
        program = _export(wrapped, preprocessing, opset=opset, max_batch=max_batch, output=output)
    program.model.metadata_props.update({**described, **(metadata or {})})
    for node in program.model.graph.all_nodes():
        # Keep which layer a node is of; the rest quotes source files of this machine.
        kept = {key: value for key, value in node.metadata_props.items() if key == SCOPES}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
    with new_file(path) as partial:
        if fits_in_one_file(sum(t.nbytes for t in (*module.parameters(), *module.buffers()))):
            onnx_ir.save(program.model, partial)
        else:
            save_in_two(lambda weights: onnx_ir.save(program.model, partial, external_data=weights), partial, path)
        onnx.checker.check_model(str(partial))


@contextlib.contextmanager
def eager_attention_of(module: nn.Module) -> Iterator[None]:
    """Attention written out in all of `module`'s layers inside the block, as it was after it."""
    fused = {layer: layer.fused_attn for layer in module.modules() if hasattr(layer, "fused_attn")}
    try:
        for layer in fused:
            setattr(layer, "fused_attn", False)  # noqa: B010 (a plain attribute, which nn.Module's types hide)
        yield
    finally:
        for layer, value in fused.items():
            setattr(layer, "fused_attn", value)  # noqa: B010


class _Wrapped(nn.Module):
    """The module between the optional normalization and softmax: [B, C, H, W] -> [B, classes]."""

    def __init__(self, module: nn.Module, settings: Preprocessing, *, normalize: bool, softmax: bool) -> None:
        super().__init__()
        self.module, self.normalize, self.softmax = module, normalize, softmax
        self.mean: Tensor
        self.std: Tensor
        like = next(module.parameters())
        for name, values in (("mean", settings.mean), ("std", settings.std)):
            tensor = torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.module((images - self.mean) / self.std if self.normalize else images)
        return logits.softmax(-1) if self.softmax else logits


def _check(module: nn.Module, opset: int, max_batch: int, class_names: Sequence[str] | None) -> None:
    if opset not in OPSETS:
        raise InputError(f"Opset {opset} is not supported; give one from {OPSETS[0]} to {OPSETS[-1]} (20 suits most).")
    if max_batch < 1:
        raise InputError(f"The largest batch must be at least 1, got {max_batch}.")
    classes = getattr(module, "num_classes", None)
    if class_names is not None and classes not in (None, len(class_names)):
        raise InputError(f"There are {len(class_names)} class names, the model has {classes} classes.")
    if next(module.parameters(), None) is None:
        raise InputError(f"{type(module).__name__} has no parameters; there is nothing to export.")


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    training = [layer for layer in module.modules() if layer.training]
    module.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


def _export(
    module: nn.Module, settings: Preprocessing, *, opset: int, max_batch: int, output: str
) -> torch.onnx.ONNXProgram:
    like = next(module.parameters())
    # Two images, so that a batch of one is not taken for a constant.
    images = torch.zeros(2, *settings.input_size, dtype=like.dtype, device=like.device)
    name = type(getattr(module, "module", module)).__name__
    failed = f"{name} cannot be exported to ONNX at opset {opset} for images of {settings.input_size}: "
    with _quiet():
        try:
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=max(2, max_batch))},),
                optimize=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[output],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = _first_line(_root_cause(error))
            raise FloraError(f"{failed}{reason}. Check that it runs on such images.") from error
    assert program is not None  # dynamo=True always gives a program
    if program.model.opset_imports[""] != opset:
        raise FloraError(f"{failed}the exporter stops at {program.model.opset_imports['']}. Use that opset or 20.")
    graph = program.model.graph
    # The exporter may take the batch for a constant without a word.
    if any(value.shape is None or isinstance(value.shape[0], int) for value in (graph.inputs[0], graph.outputs[0])):
        raise FloraError(f"{failed}the batch came out fixed. Remove from the model what depends on its size.")
    return program


def _metadata(
    settings: Preprocessing, class_names: Sequence[str] | None, *, normalize: bool, output: str
) -> dict[str, str]:
    described = {
        "flora.version": importlib.metadata.version("flora-vit"),
        "flora.preprocessing": settings.model_dump_json(),
        "flora.input": "pixels in 0..1" if normalize else "normalized pixels",
        "flora.output": output,
    }
    return described | ({"flora.class_names": json.dumps(list(class_names))} if class_names is not None else {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No prints, warnings or log lines of the exporter; what fails raises."""
    level = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
