"""Pack the example's images: three small tar files of class folders, in PNG, as timm reads them.

Calibration images come from the part of the training set that `train.py` trains on, selection images from its held-out
part, labelled test images from the test set; each file holds the same number of every class, the first ones met.
"""

import argparse
import io
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data import CLASS_NAMES, DEFAULT_ROOT, images, prepare, split_training
from PIL import Image

HERE = Path(__file__).parent
PER_CLASS = {"calibration": 40, "selection": 30, "test": 80}


def pack(source: Iterable[tuple[Image.Image, int]], path: Path, per_class: int) -> None:
    """Write the first `per_class` images of each class to the tar file `path`."""
    packed: Counter[int] = Counter()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for image, label in source:
            if packed[label] == per_class:
                continue
            content = io.BytesIO()
            image.save(content, "png", optimize=True)
            # The folder starts with the class index, so that sorting the names keeps the classes in order.
            member = tarfile.TarInfo(f"{label}-{CLASS_NAMES[label]}/{packed[label]:03}.png")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
            packed[label] += 1
            if packed.total() == per_class * len(CLASS_NAMES):
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="where Fashion-MNIST is or goes")
    root = prepare(parser.parse_args().root)
    trained_on, held_out = split_training(images(root, train=True))
    sources = {"calibration": trained_on, "selection": held_out, "test": images(root, train=False)}
    for name, source in sources.items():
        path = HERE / f"{name}.tar"
        pack((source[i] for i in range(len(source))), path, PER_CLASS[name])
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
