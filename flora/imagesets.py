"""An image set as it is named on the command line and as it is recorded in artefacts.

On the command line: a path (a folder or tar of class folders), or a dataset of timm's factory with its options behind
commas: `torch/cifar10,root=DIR,split=train,limit=512`. The record keeps a digest of every image, so that a later step
can refuse images that an earlier one has used.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict

from flora.errors import InputError, few

FACTORY_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
OPTIONS = ("root", "split", "limit")


@dataclass(frozen=True, kw_only=True)
class ImageSetSpec:
    """Which images: `name` is empty for a folder or tar at `root`; `limit` takes that many, evenly spaced."""

    name: str
    root: str
    split: str
    limit: int | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `PATH[,limit=N]` or `torch/NAME[,root=DIR][,split=NAME][,limit=N]`."""
        first, *pairs = text.split(",")
        options = dict(pair.partition("=")[::2] for pair in pairs)
        if unknown := [key for key in options if key not in OPTIONS]:
            raise InputError(f"{text!r}: unknown option {few(unknown)}; an image set takes {', '.join(OPTIONS)}.")
        named = first.startswith(FACTORY_PREFIXES)
        if not first or (not named and "root" in options):
            raise InputError(f"{text!r} names no images; write a path, or a dataset such as torch/cifar10,root=DIR.")
        try:
            limit = int(options["limit"]) if "limit" in options else None
        except ValueError as error:
            raise InputError(f"{text!r}: limit must be a whole number, got {options['limit']!r}.") from error
        if limit is not None and limit < 1:
            raise InputError(f"{text!r}: limit must be at least 1.")
        return cls(
            name=first if named else "",
            root=options.get("root", "") if named else first,
            split=options.get("split", "validation"),
            limit=limit,
        )

    def indices(self, length: int) -> range | list[int]:
        """The images taken of `length`: all, or `limit` of them evenly spaced."""
        if self.limit is None or self.limit >= length:
            return range(length)
        return [i * length // self.limit for i in range(self.limit)]


class ImageSetRecord(BaseModel):
    """What an artefact keeps of an image set: `digest` over all images, `image_digests` one by one, in order.

    A streamed dataset has no digests (None): its overlap with other sets cannot be checked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: str
    images: int
    digest: str | None
    image_digests: tuple[str, ...] | None

    @classmethod
    def of(cls, spec: str, images: int, image_digests: list[str] | None) -> Self:
        if image_digests is None:
            return cls(spec=spec, images=images, digest=None, image_digests=None)
        digest = hashlib.sha256("".join(sorted(image_digests)).encode()).hexdigest()
        return cls(spec=spec, images=images, digest=digest, image_digests=tuple(image_digests))

    def refuse_overlap(self, other: "ImageSetRecord", *, own_role: str, other_role: str) -> None:
        """Raise `InputError` when the two sets share an image."""
        shared = set(self.image_digests or ()) & set(other.image_digests or ())
        if shared:
            raise InputError(
                f"{len(shared)} images of the {own_role} set ({self.spec}) are also in the {other_role} set "
                f"({other.spec}); figures measured on images that choices were made on prove nothing. "
                "Use separate images."
            )


def image_digest(content: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of one image."""
    return hashlib.sha256(content).hexdigest()[:16]
