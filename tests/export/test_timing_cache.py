"""What was timed is read where it holds, and nowhere else."""

import pytest

from export.timing_cache import TimingCache
from flora.errors import BackendMissingError
from tests.fake_gpu import FakeGpu, fake_tensorrt, install


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    gpu = FakeGpu()
    install(monkeypatch, gpu, fake_tensorrt(lambda plan: None))
    return gpu


@pytest.fixture
def config():
    """A real one: that of TensorRT-RTX takes a cache, empty as it is."""
    trt = pytest.importorskip("tensorrt_rtx")
    return trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()


def test_each_version_gpu_and_driver_has_a_file_of_its_own(gpu, tmp_path):
    first = TimingCache.of(tmp_path, "tensorrt 11.4.0")
    assert first.file.parent == tmp_path
    assert first.file.name.startswith("tensorrt-11.4.0-NVIDIA-A10-sm86-")
    found = {first.file, TimingCache.of(tmp_path, "tensorrt 11.4.0").file}
    assert len(found) == 1
    found.add(TimingCache.of(tmp_path, "tensorrt 11.3.0").file)
    for name, value in (("name", "NVIDIA A10G"), ("capability", (8, 9)), ("cuda", 13010)):
        setattr(gpu, name, value)
        found.add(TimingCache.of(tmp_path, "tensorrt 11.4.0").file)
    assert len(found) == 5


def test_without_a_gpu_there_is_nothing_to_time(gpu, tmp_path):
    gpu.is_there = False
    with pytest.raises(BackendMissingError, match="CUDA finds none here"):
        TimingCache.of(tmp_path, "tensorrt 11.4.0")


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
@pytest.mark.parametrize("known", [None, b"", b"not a cache"])
def test_a_cache_is_kept_whole_whatever_lay_there(tmp_path, config, known):
    cache = TimingCache(tmp_path / "caches" / "one.timing")
    if known is not None:
        cache.file.parent.mkdir()
        cache.file.write_bytes(known)
    cache.attach(config)
    cache.keep(config)
    content = cache.file.read_bytes()
    assert len(content) > 100
    assert [path.name for path in cache.file.parent.iterdir()] == ["one.timing"]
    cache.attach(config)
    cache.keep(config)
    assert len(cache.file.read_bytes()) == len(content)
