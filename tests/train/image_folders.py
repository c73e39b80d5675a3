"""Small folders of JPEGs, laid out as ``FolderData`` wants them."""

import numpy as np
from PIL import Image


def make_image_folder(root, classes=("ant", "bee"), train=5, val=3, size=40):
    """Flat colours with noise: the class decides the colour, the number of the image the width."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = np.array([60 + 90 * label, 100, 200 - 90 * label])
                noise = generator.integers(-20, 20, (size, size + number, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return root
