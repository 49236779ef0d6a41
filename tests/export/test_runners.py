"""Runners compute what torch computes, say what really runs, and refuse what does not fit before they run it."""

import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from export_samples import random_images, tiny_model
from torch import nn

from export.runners import CPU, OnnxRunner, OpenVinoRunner
from export.runtimes import PROVIDERS, open_runner
from export.torch_runner import TorchRunner
from flora.errors import BackendMissingError, InputError

TORCH_FREE = (
    *("verify", "images", "preprocessing", "runners", "bundle", "benchmark", "engines", "runtimes"),
    *("tensorrt_runner", "inputs", "latency", "memory"),
    *("tensorrt_runner", "engine_record", "timing_cache", "padded"),
)


def test_onnx_and_torch_agree(onnx_file, model):
    images = random_images(3)
    with OnnxRunner(onnx_file, threads=1) as on_onnx, TorchRunner(model, name="torch") as on_torch:
        np.testing.assert_allclose(on_onnx(images), on_torch(images), atol=1e-4)
        assert (on_onnx.provider, on_torch.provider) == (CPU, "torch cpu")
        assert (on_onnx.name, on_torch.name) == ("model.onnx", "torch")


def test_the_torch_runner_leaves_the_module_as_it_was():
    model = tiny_model().train()
    with TorchRunner(model, name="torch") as runner:
        assert np.array_equal(runner(random_images(2)), runner(random_images(2)))
        assert not model.training
    assert all(layer.training for layer in model.modules())


@pytest.mark.parametrize(
    "images",
    [
        random_images(2)[:, :, :14],
        random_images(2)[0],
        random_images(2).astype(np.float64),
        random_images(2).repeat(3, axis=1),
        random_images(2)[:0],
    ],
    ids=["size", "rank", "dtype", "channels", "empty"],
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_images_that_do_not_fit_are_refused_before_inference(onnx_file, model, runtime, images):
    runners = {
        "onnxruntime": lambda: OnnxRunner(onnx_file),
        "openvino": lambda: OpenVinoRunner(onnx_file),
        "torch": lambda: TorchRunner(model, name="model in torch", input_size=(1, 28, 28)),
    }
    refused = r"takes float32 images of shape \[any, 1, 28, 28\], got "
    with runners[runtime]() as runner:
        with pytest.raises(InputError, match=refused):
            runner(images)
        with pytest.raises(InputError, match=refused):
            runner.bind(images)()


def test_openvino_computes_what_onnx_runtime_does_in_the_precision_that_it_says(onnx_file):
    images = random_images(3)
    with OnnxRunner(onnx_file, threads=1) as one, OpenVinoRunner(onnx_file, threads=1) as other:
        np.testing.assert_allclose(other(images), one(images), atol=1e-4)
        np.testing.assert_array_equal(other.bind(images)(), other(images))
        assert other.provider == "OpenVINO CPU, f32"


def test_what_is_timed_is_the_run_itself(onnx_file, model):
    images, ran = random_images(2), []
    model.register_forward_hook(lambda module, inputs, output: ran.append(inputs[0].shape))
    with OnnxRunner(onnx_file, threads=1) as on_onnx, TorchRunner(model, name="torch") as on_torch:
        np.testing.assert_array_equal(on_onnx.bind(images)(), on_onnx(images))
        ran.clear()
        call = on_torch.bind(images)
        call()
        call()
    assert ran == [images.shape] * 2


def test_a_closed_runner_says_so(onnx_file):
    with OnnxRunner(onnx_file) as runner:
        pass
    with pytest.raises(InputError, match="closed"):
        runner(random_images(1))


@pytest.mark.parametrize("content", [b"", b"not onnx", None])
def test_a_corrupt_file_is_refused(onnx_file, tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(onnx_file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(InputError, match=r"bad\.onnx"):
        OnnxRunner(path)
    with pytest.raises(InputError, match="does not exist"):
        OnnxRunner(tmp_path / "none.onnx")


def test_a_provider_that_is_not_there_is_refused(onnx_file):
    with pytest.raises(BackendMissingError, match="ImaginaryExecutionProvider"):
        OnnxRunner(onnx_file, providers=("ImaginaryExecutionProvider",))


@pytest.mark.parametrize(
    ("runtime", "provider"),
    [("ort-cuda", "CUDAExecutionProvider"), ("ort-tensorrt", "TensorrtExecutionProvider")],
)
@pytest.mark.parametrize("loads", [(), ("CUDAExecutionProvider",)])
def test_a_silent_fall_back_to_another_provider_is_refused(onnx_file, monkeypatch, runtime, provider, loads):
    """A package that claims GPUs without a driver, or without TensorRT: the list names it, the session has others."""
    asked = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*PROVIDERS["ort-tensorrt"], CPU])
    plain_session = onnxruntime.InferenceSession

    def session(path, options, providers):
        asked.extend(providers)
        opened = plain_session(path, options, providers=[CPU])
        monkeypatch.setattr(opened, "get_providers", lambda: [*loads, CPU])
        return opened

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    if provider in loads:
        assert open_runner(runtime, onnx_file).provider == provider
    else:
        with pytest.raises(BackendMissingError, match=f"asked for {provider} and loaded {', '.join([*loads, CPU])}"):
            open_runner(runtime, onnx_file)
    assert [name for name, _ in asked] == list(PROVIDERS[runtime])
    assert all(value == "0" for _, options in asked for value in options.values())


def test_a_missing_runtime_says_what_to_install(onnx_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissingError, match=r"pip install 'flora-vit\[cpu\]'"):
        OnnxRunner(onnx_file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(model):
    with pytest.raises(BackendMissingError, match="no GPU"):
        TorchRunner(model, name="torch", device="cuda")


class Tiny(nn.Module):
    """What compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(images.flatten(1)))


class Breaking(Tiny):
    """What torch cannot compile as one graph."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(images)


def square_images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 1, 2, 2)).astype(np.float32)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_module_computes_what_the_eager_one_does():
    module = Tiny()
    with TorchRunner(module, name="compiled", compiled=True) as compiled, TorchRunner(module, name="eager") as eager:
        for batch in (2, 5, 2):
            np.testing.assert_allclose(compiled(square_images(batch)), eager(square_images(batch)), atol=1e-6)
        assert compiled._forward._graphs == 2
        assert (compiled.provider, eager.provider) == ("torch cpu, compiled by Inductor", "torch cpu")


def test_a_silent_fall_back_to_eager_is_refused():
    with (
        torch.compiler.set_stance("force_eager"),
        TorchRunner(Tiny(), name="compiled", compiled=True) as runner,
        pytest.raises(BackendMissingError, match="built nothing and ran the model eagerly"),
    ):
        runner(square_images(2))


@pytest.mark.parametrize("how", ["no compiler", "no single graph"])
def test_what_cannot_be_compiled_says_what_to_do(monkeypatch, how):
    from torch._inductor import cpp_builder

    def no_compiler() -> None:
        raise cpp_builder.exc.InvalidCxxCompiler

    module = Breaking() if how == "no single graph" else Tiny()
    if how == "no compiler":
        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        TorchRunner(module, name="compiled", compiled=True) as runner,
        pytest.raises(BackendMissingError, match=r"does not work here for batches of 3 .*apt-get install g\+\+"),
    ):
        runner(square_images(3))


def test_serving_modules_import_and_run_without_torch(onnx_file, image_folder):
    program = f"""
import sys
for name in ("torch", "torchvision", "timm", "onnx"):
    sys.modules[name] = None
import {", ".join(f"export.{name}" for name in TORCH_FREE)}
from export.images import LabelledImages
from export.runtimes import PROVIDERS, open_runner
from export.runners import OnnxRunner
from export.verify import Stage, verify
from flora.preprocessing import Preprocessing
settings = Preprocessing(input_size=(1, 28, 28), mean=(0.286,), std=(0.353,))
with OnnxRunner({str(onnx_file)!r}, threads=1) as runner:
    stages = [Stage(name="onnx", runner=runner, batch_size=7, kind="fp32")]
    print(verify(stages, LabelledImages({str(image_folder)!r}, settings)).stages[0].images)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "20\n", done.stderr
