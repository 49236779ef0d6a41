"""An image set as it is named on the command line and as it is recorded in artefacts.

On the command line: a path (a folder or tar of class folders), or a dataset of timm's factory with its options behind
commas: `torch/cifar10,root=DIR,split=train,limit=512`. `fold=2/10` takes every tenth image, the second first, and
`except=2/10` all but these: so one set is trained on in one part and held out in the other. The record keeps a digest
of every image, so that a later step can refuse images that an earlier one has used.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from flora.errors import InputError, few

FACTORY_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
Role = Literal["calibration", "selection", "training"]
OPTIONS = ("root", "split", "fold", "except", "limit")


@dataclass(frozen=True, kw_only=True)
class ImageSetSpec:
    """Which images: `name` is empty for a folder or tar at `root`; `limit` takes that many, evenly spaced.

    `fold` and `left_out` are pairs (k, n): the images k-1, k-1+n, k-1+2n, ... alone, or all others.
    """

    name: str
    root: str
    split: str
    limit: int | None
    fold: tuple[int, int] | None = None
    left_out: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `PATH[,OPTION=VALUE...]` or `torch/NAME[,root=DIR][,OPTION=VALUE...]`, see `OPTIONS`."""
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
            fold=_fold(text, options.get("fold")),
            left_out=_fold(text, options.get("except")),
        )

    def indices(self, length: int) -> Sequence[int]:
        """The images taken of `length`: those of the fold, or all; `limit` of them evenly spaced."""
        taken: Sequence[int] = range(length)
        if self.fold:
            taken = range(self.fold[0] - 1, length, self.fold[1])
        if self.left_out:
            taken = [i for i in taken if i % self.left_out[1] != self.left_out[0] - 1]
        if self.limit is None or self.limit >= len(taken):
            return taken
        return [taken[i * len(taken) // self.limit] for i in range(self.limit)]


def at_most(text: str, limit: int) -> str:
    """The image set `text` with no more than `limit` images; a lower limit that it has stays."""
    given = ImageSetSpec.parse(text).limit
    return text if given is not None and given <= limit else f"{text},limit={limit}"


def _fold(text: str, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    part, _, parts = value.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise InputError(f"{text!r}: a fold is K/N with K from 1 to N, for example 1/10; got {value!r}.")
    return int(part), int(parts)


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

    def joined(self, other: "ImageSetRecord | None") -> "ImageSetRecord":
        """The record of both sets together; an image in both counts once."""
        if other is None or other == self:
            return self
        spec = f"{self.spec} and {other.spec}"
        if self.image_digests is None or other.image_digests is None:
            return ImageSetRecord.of(spec, self.images + other.images, None)
        both = list(dict.fromkeys((*self.image_digests, *other.image_digests)))
        return ImageSetRecord.of(spec, len(both), both)

    def refuse_overlap(self, other: "ImageSetRecord", *, own_role: str, other_role: str) -> None:
        """Raise `InputError` when the two sets share an image."""
        others = set(other.image_digests or ())
        shared = [digest for digest in dict.fromkeys(self.image_digests or ()) if digest in others]
        if shared:
            raise InputError(
                f"{len(shared)} images of the {own_role} set ({self.spec}) are also in the {other_role} set "
                f"({other.spec}), by SHA-256: {few(shared, 3)}; figures measured on images that choices were made on "
                "prove nothing. Use separate images."
            )


def image_digest(content: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of one image."""
    return hashlib.sha256(content).hexdigest()[:16]
