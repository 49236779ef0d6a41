"""What an engine is built for: a backend, batch profiles, GPUs, and how hard the builder tries."""

from dataclasses import dataclass, replace
from typing import Self

from flora.errors import InputError, near_matches

RTX, TENSORRT = "tensorrt-rtx", "tensorrt"
BACKENDS = (RTX, TENSORRT)
COMPUTE_CAPABILITIES = {RTX: ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"), TENSORRT: ()}
DEFAULT_COMPUTE_CAPABILITIES = {RTX: ("sm80", "sm86", "sm89", "sm120"), TENSORRT: ()}
COMPUTE_CAPABILITIES_OF = {"fp8": ("sm89", "sm120", "sm121"), "bf16": ("sm80", "sm86", "sm89", "sm120", "sm121")}
# By what is said here, TensorRT's name of it.
HARDWARE_LEVELS = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
BUILDER_LEVELS = range(6)
# What TensorRT-RTX has no use for, and why.
NOT_OF_RTX = {
    "builder_level": "it chooses kernels on the GPU that runs the engine, not while it builds",
    "hardware_compatible": "name the GPUs as compute capabilities",
    "version_compatible": "its engines run on the version that built them alone",
}

# Smallest, usual and largest batch.
Profile = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How engines are built, whatever for.

    The builder optimizes an engine for the usual batch of its profile, and for that of each further one, such as
    (1, 1, 1). The workspace is what kernels may use beside; the higher the level, 0 to 5, the longer it looks for fast
    ones.
    TensorRT builds for the present GPU alone, unless the engine is `hardware_compatible` with those of the same compute
    capability or with all from Ampere on, which costs speed; `version_compatible`, it loads in later versions too.
    """

    more_profiles: tuple[Profile, ...] = ()
    workspace_mib: int | None = None
    builder_level: int | None = None
    hardware_compatible: str | None = None
    version_compatible: bool = False

    @property
    def for_tensorrt(self) -> list[str]:
        """The names of those that are given and that TensorRT alone takes."""
        return [name for name in NOT_OF_RTX if getattr(self, name) not in (None, False)]

    def taken_by(self, backend: str) -> Self:
        """Those that the backend takes."""
        defaults = {name: getattr(BuildOptions, name) for name in self.for_tensorrt}
        return replace(self, **defaults) if backend == RTX else self


AS_USUAL = BuildOptions()


@dataclass(frozen=True, kw_only=True)
class EngineSpec(BuildOptions):
    """What to build: the batch profile, and for TensorRT-RTX the GPUs (all of sm80 to sm120 unless named).

    TensorRT builds for the present GPU, so it takes no compute capabilities.
    """

    backend: str
    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 64
    compute_capabilities: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            hint = near_matches(self.backend, BACKENDS)
            raise InputError(f"{self.backend!r} is no engine backend; give {' or '.join(BACKENDS)}.{hint}")
        for smallest, usual, largest in self.profiles:
            if not 1 <= smallest <= usual <= largest:
                raise InputError(f"The batch profile {smallest}/{usual}/{largest} is not min <= opt <= max from 1.")
        if len(set(self.profiles)) != len(self.profiles):
            raise InputError(f"A batch profile is given twice: {named(self.profiles)}.")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(f"The workspace must be at least 1 MiB, got {self.workspace_mib}.")
        if self.builder_level is not None and self.builder_level not in BUILDER_LEVELS:
            raise InputError(f"The builder level is 0 to {BUILDER_LEVELS[-1]}, got {self.builder_level}.")
        if self.hardware_compatible not in (None, *HARDWARE_LEVELS):
            raise InputError(
                f"An engine can be compatible with {' or '.join(HARDWARE_LEVELS)} hardware, got "
                f"{self.hardware_compatible!r}."
            )
        if self.backend == RTX and self.for_tensorrt:
            name = self.for_tensorrt[0]
            raise InputError(f"{RTX} takes no {name.replace('_', ' ')}: {NOT_OF_RTX[name]}.")
        if self.compute_capabilities is None:
            object.__setattr__(self, "compute_capabilities", DEFAULT_COMPUTE_CAPABILITIES[self.backend])
        self._check_compute_capabilities()

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """All batch profiles, the usual one first."""
        return ((self.min_batch, self.opt_batch, self.max_batch), *self.more_profiles)

    def fit_for(self, precision: str) -> Self:
        """The same for files of this precision: GPUs that cannot compute in it are left out, or refused where named."""
        allowed = COMPUTE_CAPABILITIES_OF.get(precision, self.compute_capabilities)
        if allowed is None or set(self.compute_capabilities or ()) <= set(allowed):
            return self
        if self.compute_capabilities != DEFAULT_COMPUTE_CAPABILITIES[self.backend]:
            raise InputError(
                f"{precision} needs a GPU of {', '.join(allowed)}; got {', '.join(self.compute_capabilities or ())}. "
                "Leave the precision or the others out."
            )
        return replace(self, compute_capabilities=tuple(one for one in self.compute_capabilities if one in allowed))

    def _check_compute_capabilities(self) -> None:
        allowed, given = COMPUTE_CAPABILITIES[self.backend], self.compute_capabilities or ()
        if not allowed and given:
            raise InputError(f"{self.backend} builds for the GPU that is present; give no compute capabilities.")
        if allowed and (not given or len(set(given)) != len(given) or not set(given) <= set(allowed)):
            raise InputError(
                f"{self.backend} builds for {', '.join(allowed)}, each at most once; got {', '.join(given) or 'none'}."
            )


def named(profiles: tuple[Profile, ...]) -> str:
    """Batch profiles as text, such as 1/8/64 and 1/1/1."""
    return " and ".join("/".join(map(str, profile)) for profile in profiles)


def profile_for(batch: int, profiles: tuple[Profile, ...]) -> int | None:
    """The number of the profile to run a batch with: of those that contain it, the one optimized nearest to it."""
    fitting = [number for number, (smallest, _, largest) in enumerate(profiles) if smallest <= batch <= largest]
    return min(fitting, key=lambda number: abs(profiles[number][1] - batch), default=None)
