"""What an engine can be built for, and which profile serves a batch."""

import pytest

from export.engine_spec import BuildOptions, EngineSpec, named, profile_for
from flora.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt_rtx"}, "Did you mean tensorrt-rtx"),
        ({"min_batch": 4, "opt_batch": 2}, "4/2/64"),
        ({"min_batch": 0}, "0/8/64"),
        ({"max_batch": 4}, "1/8/4"),
        ({"workspace_mib": 0}, "at least 1 MiB"),
        ({"more_profiles": ((2, 1, 4),)}, "2/1/4"),
        ({"more_profiles": ((1, 1, 1), (1, 1, 1))}, "given twice: 1/8/64 and 1/1/1"),
        ({"builder_level": 2}, "takes no builder level: it chooses kernels on the GPU"),
        ({"hardware_compatible": "ampere-plus"}, "takes no hardware compatible: name the GPUs"),
        ({"version_compatible": True}, "takes no version compatible"),
        ({"backend": "tensorrt", "builder_level": 6}, "0 to 5, got 6"),
        ({"backend": "tensorrt", "hardware_compatible": "all"}, "same-capability or ampere-plus"),
        ({"compute_capabilities": ("sm90",)}, "sm75, sm80.*got sm90"),
        ({"compute_capabilities": ()}, "got none"),
        ({"compute_capabilities": ("sm80", "sm80")}, "at most once"),
        ({"backend": "tensorrt", "compute_capabilities": ("sm80",)}, "GPU that is present"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        EngineSpec(**({"backend": "tensorrt-rtx"} | arguments))


def test_tensorrt_rtx_gets_the_options_that_it_takes():
    given = BuildOptions(more_profiles=((1, 1, 1),), workspace_mib=512, builder_level=4, version_compatible=True)
    assert given.for_tensorrt == ["builder_level", "version_compatible"]
    assert given.taken_by("tensorrt") == given
    assert given.taken_by("tensorrt-rtx") == BuildOptions(more_profiles=((1, 1, 1),), workspace_mib=512)


def test_of_the_profiles_that_contain_a_batch_the_nearest_serves_it():
    profiles = ((1, 8, 32), (1, 1, 1), (16, 64, 128))
    assert named(profiles) == "1/8/32 and 1/1/1 and 16/64/128"
    found = {batch: profile_for(batch, profiles) for batch in (1, 2, 8, 32, 40, 128, 129)}
    assert found == {1: 1, 2: 0, 8: 0, 32: 0, 40: 2, 128: 2, 129: None}
