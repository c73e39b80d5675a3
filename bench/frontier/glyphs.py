"""Images of characters in many faces, made here: a bank of renderings, and random views of them on any device."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_cuda.bench.suites.peers import installed
from taylor_cuda.errors import InputError
from taylor_cuda.files import replacing

RESOLUTION = 32
"""Pixels of a rendering's longer side, which it fills."""

# Of every family some faces are for training and one is held out: a test image has a face that training never sees.
TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmti10",
    "cmtt10",
)
TEST_FACES = ("DejaVuSans-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")

ALIKE = 0.85
"""Characters whose renderings have a greater cosine, on average over faces, would be one class with two labels."""

SAME = 0.995
"""Two renderings of one character with a greater cosine are one rendering: a bar is a bar in every upright face."""

TEST_SEED = (1 << 32) - 1
"""Of the test images. The generator of the CPU reads 32 bits of a seed only."""


@dataclass(frozen=True)
class Bank:
    """Every character in every face, upright, filling its square in one direction.

    Attributes:
        characters: the classes; their label is their place.
        faces: training faces first.
        images: float32 ``[faces, classes, RESOLUTION, RESOLUTION]``, ink 1 on 0; all zero where there is none.
        present: bool ``[faces, classes]``: the face has the character, and in a test face it looks like in no training
            face.
    """

    characters: str
    faces: tuple[str, ...]
    images: Tensor
    present: Tensor


@functools.cache
def render_bank(classes: int) -> Bank:
    """The first ``classes`` characters, letters and digits first, that all Unicode faces have and that differ in shape.

    Raises:
        InputError: there aren't that many, or matplotlib isn't installed.
    """
    faces = TRAIN_FACES + TEST_FACES
    fonts = {face: _font(face) for face in faces}
    chosen = _choose({face: font for face, font in fonts.items() if not face.startswith("cm")}, classes)
    images = torch.zeros(len(faces), classes, RESOLUTION, RESOLUTION)
    present = torch.zeros(len(faces), classes, dtype=torch.bool)
    for row, face in enumerate(faces):
        for column, character in enumerate(chosen):
            image = render(fonts[face], character) if has(face, fonts[face], character) else None
            if image is not None:
                images[row, column], present[row, column] = image, True
    trained = len(TRAIN_FACES)
    for column in range(classes):
        unit = F.normalize(images[:, column].flatten(1), dim=1)
        shared = known(unit[trained:], unit[:trained])
        present[trained:, column] &= ~shared
        images[trained:, column][shared] = 0
    return Bank("".join(chosen), faces, images, present)


def find_bank(classes: int, folder: Path) -> Bank:
    """``render_bank``, left in ``folder``; where matplotlib isn't installed, what another machine left there."""
    path = folder / f"glyphs-{classes}.pt"
    if installed("matplotlib") is None and path.is_file():
        stored = torch.load(path, weights_only=True)
        return Bank(stored["characters"], tuple(stored["faces"]), stored["images"].float() / 255, stored["present"])
    bank = render_bank(classes)
    folder.mkdir(parents=True, exist_ok=True)
    images = (bank.images * 255).round().to(torch.uint8)
    with replacing(path) as temporary:
        stored = {"characters": bank.characters, "faces": list(bank.faces), "images": images, "present": bank.present}
        torch.save(stored, temporary)
    return bank


def _choose(fonts: Mapping[str, Any], classes: int) -> list[str]:
    """The first characters that look different from those before, and new in some held-out face."""
    chosen: list[str] = []
    held_out = torch.tensor([face in TEST_FACES for face in fonts])
    units = torch.zeros(classes, len(fonts) * RESOLUTION**2)
    for character in candidates(list(fonts.values())):
        if len(chosen) == classes:
            break
        found = [render(font, character) for font in fonts.values()]
        if any(image is None for image in found):
            continue
        stack = F.normalize(torch.stack([image for image in found if image is not None]).flatten(1), dim=1)
        cosines = units[: len(chosen)] @ stack.flatten() / len(fonts)
        if bool((cosines >= ALIKE).any()) or bool(known(stack[held_out], stack[~held_out]).all()):
            continue
        units[len(chosen)] = stack.flatten()
        chosen.append(character)
    if len(chosen) < classes:
        raise InputError(f"classes: wanted at most {len(chosen)}, which the fonts tell apart, got {classes}")
    return chosen


def known(held_out: Tensor, trained: Tensor) -> Tensor:
    """Bool ``[faces]``: which held-out renderings, as unit vectors, are the same as one of a training face."""
    return (held_out @ trained.T).amax(1) > SAME


def candidates(fonts: Sequence[Any]) -> list[str]:
    """What every font has: letters and digits in the order of their code points, then punctuation and symbols.

    A code point without a glyph is drawn as an empty box; a font's map doesn't have it, or sends it to glyph 0.
    """
    common = set.intersection(*({code for code, glyph in font.get_charmap().items() if glyph} for font in fonts))
    shown = [chr(code) for code in sorted(common) if unicodedata.category(chr(code))[0] in "LNPS"]
    # a modifier is a small mark that, without its letter, looks like another one
    shown = [character for character in shown if unicodedata.category(character) not in ("Lm", "Sk")]
    return sorted(shown, key=lambda character: not character.isalnum())


def has(face: str, font: Any, character: str) -> bool:
    """Whether a face has a glyph for exactly this character."""
    # the Computer Modern fonts are encoded as TeX has them, which is Unicode for these alone
    if face.startswith("cm") and not (character.isascii() and character.isalnum()):
        return False
    return bool(font.get_char_index(ord(character)))


def render(font: Any, character: str) -> Tensor | None:
    """Float32 ``[RESOLUTION, RESOLUTION]``: the ink, scaled until it fills the square in one direction; or no ink."""
    font.set_text(character)
    font.draw_glyphs_to_bitmap(antialiased=True)
    drawn = torch.from_numpy(_array(font.get_image())).float() / 255
    rows, columns = ((drawn.amax(dim) > 0.1).nonzero().flatten() if drawn.numel() else drawn for dim in (1, 0))
    if not rows.numel() or not columns.numel():
        return None
    ink = drawn[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    height, width = ink.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = F.pad(ink, (left, side - width - left, top, side - height - top))
    # in 256 steps, as it is stored
    return (255 * F.adaptive_avg_pool2d(square[None], RESOLUTION)[0]).round() / 255


def _array(image: Any) -> Any:
    import numpy as np

    return np.array(image)


def _font(face: str) -> Any:
    try:
        from matplotlib import get_data_path
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise InputError(f"frontier: the glyphs need matplotlib ({error}); pip install matplotlib") from error
    font = FT2Font(str(Path(get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"))
    font.set_size(2 * RESOLUTION, 72)
    return font


class Views:
    """Random views of a bank's characters on one device.

    Args:
        bank: of renderings.
        faces: those to draw from.
        size: height and width of an image in pixels.
        device: where the images are made and stay.
    """

    def __init__(self, bank: Bank, faces: Sequence[str], size: int, device: torch.device) -> None:
        rows = torch.tensor([bank.faces.index(face) for face in faces])
        present = bank.present[rows]
        if not bool(present.any(0).all()):
            missing = [bank.characters[place] for place in (~present.any(0)).nonzero().flatten().tolist()]
            raise InputError(f"faces: wanted every class in one of {', '.join(faces)}, but none has {missing}")
        # at the size of the image at most, so that nothing finer than a pixel is sampled
        self._images = F.adaptive_avg_pool2d(bank.images[rows], min(size, RESOLUTION)).to(device)
        # for each class the faces that have it come first
        self._faces = present.int().argsort(dim=0, descending=True, stable=True).T.contiguous().to(device)
        self._counts = present.sum(0).to(device)
        self.classes, self.size, self.device = len(bank.characters), size, device

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` images, float32 ``[count, 1, size, size]``, and their labels, int64 ``[count]``."""
        device = self.device
        labels = torch.randint(self.classes, (count,), generator=generator, device=device)
        face, angle, scale, aspect, shear, right, down, contrast, bright, loud = torch.rand(
            10, count, generator=generator, device=device
        )
        faces = self._faces[labels, (face * self._counts[labels]).long()]
        glyphs = self._images[faces, labels][:, None]
        grid = F.affine_grid(
            _inverse_map(angle, scale, aspect, shear, right, down), [count, 1, self.size, self.size], False
        )
        ink = F.grid_sample(glyphs, grid, "bilinear", "zeros", False)
        # half of them dark on bright, of any strength but too little to see
        strength = torch.where(contrast < 0.5, -1.0, 1.0) * (0.5 + (2 * contrast) % 1)
        noise = torch.randn(ink.shape, generator=generator, device=device)
        images = _image(strength) * ink + _image(bright - 0.5) + _image(0.25 * loud) * noise
        return images, labels

    def stream(self, seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end, the same ones for the same seed on the same kind of device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        while True:
            yield self.draw(batch, generator)


def _image(value: Tensor) -> Tensor:
    return value[:, None, None, None]


def _inverse_map(angle: Tensor, scale: Tensor, aspect: Tensor, shear: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """``[N, 2, 3]``, from places in the image to places in the rendering, both in [-1, 1]; arguments in [0, 1)."""
    angle = (angle - 0.5) * 0.6  # ± 17°
    scale = 0.55 + 0.3 * scale
    stretch = (0.3 * (aspect - 0.5)).exp()
    cos, sin, shear = angle.cos(), angle.sin(), 0.4 * (shear - 0.5)
    # the inverse of: scale, stretch, shear, rotate, shift
    across = torch.stack([cos + shear * sin, sin - shear * cos], 1) / (scale * stretch)[:, None]
    along = torch.stack([-sin, cos], 1) * (stretch / scale)[:, None]
    linear = torch.stack([across, along], 1)
    room = 0.8 * (1 - scale)
    shift = torch.stack([(2 * right - 1) * room, (2 * down - 1) * room], 1)
    return torch.cat([linear, -(linear @ shift[:, :, None])], 2)
