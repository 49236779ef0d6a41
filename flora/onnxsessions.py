"""How ONNX Runtime is loaded and set up wherever a session is opened. Needs neither torch nor onnx."""

from types import ModuleType
from typing import Any

from flora.errors import BackendMissingError

FATAL_ONLY = 4


def onnxruntime_module() -> ModuleType:
    """The package; `BackendMissingError` where it is not installed or does not load."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissingError(
            f"onnxruntime is not installed or does not load ({error}). Run: pip install 'flora-vit[cpu]'"
        ) from error
    return onnxruntime


def onnxruntime_failures() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a file that it cannot load or run."""
    states = onnxruntime_module().capi.onnxruntime_pybind11_state
    return (
        states.Fail,
        states.InvalidArgument,
        states.InvalidGraph,
        states.InvalidProtobuf,
        states.NoModel,
        states.NotImplemented,
        states.RuntimeException,
    )


def session_options(threads: int | None, *, as_written: bool = False) -> Any:
    """Options for so many threads, as many as it likes for None.

    `as_written`, each node is run by itself: no quantized product then overflows in a kernel of this processor.
    """
    onnxruntime = onnxruntime_module()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Threads that spin after a run, waiting for the next, take time from whatever runs meanwhile.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    return options
