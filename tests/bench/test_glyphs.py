from __future__ import annotations

import itertools
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from taylor_cuda.bench.frontier import glyphs
from taylor_cuda.bench.frontier.glyphs import ALIKE, RESOLUTION, TEST_FACES, TRAIN_FACES, Bank, Views, render_bank
from taylor_cuda.errors import InputError

CPU = torch.device("cpu")
CLASSES = 70
"""Letters and digits of ASCII, and some that the Computer Modern fonts don't have."""


@pytest.fixture(scope="module")
def bank():
    return render_bank(CLASSES)


class FakeFont:
    def __init__(self, charmap):
        self.charmap = charmap

    def get_charmap(self):
        return self.charmap


def fake_bank(values):
    """Faces whose every glyph is a square of one value: faces × classes values."""
    images = torch.tensor(values)[:, :, None, None].expand(-1, -1, RESOLUTION, RESOLUTION)
    names = tuple("abcdef"[: len(values)])
    return Bank("xyz"[: images.shape[1]], names, images.contiguous(), images[:, :, 0, 0] != 0)


def test_the_bank_is_the_same_every_time(bank):
    again = render_bank.__wrapped__(CLASSES)
    assert again.characters == bank.characters
    assert again.images.equal(bank.images)
    assert again.present.equal(bank.present)
    assert len(set(bank.characters)) == CLASSES
    assert render_bank(10).characters == bank.characters[:10]
    assert not bank.characters.isascii()


def test_every_glyph_has_ink_that_fills_its_square_one_way(bank):
    ink = bank.images.flatten(2).amax(2) > 0.1
    assert ink.equal(bank.present)
    assert bank.images.min() >= 0
    assert bank.images.max() <= 1
    edges = torch.stack([bank.images[..., 0, :], bank.images[..., -1, :]]).amax(-1)
    sides = torch.stack([bank.images[..., :, 0], bank.images[..., :, -1]]).amax(-1)
    reached = (edges > 0).all(0) | (sides > 0).all(0)
    assert reached.equal(bank.present)


def test_no_glyph_is_the_box_of_a_missing_one(bank):
    for row, face in enumerate(bank.faces):
        font = glyphs._font(face)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # matplotlib says that the glyph is missing
            box = glyphs.render(font, "\u4e00")
        if box is not None:
            images = bank.images[row][bank.present[row]]
            assert (images - box).abs().mean((1, 2)).min() > 0.02, face


def test_classes_differ(bank):
    faces = [row for row, face in enumerate(bank.faces) if not face.startswith("cm")]
    unit = F.normalize(bank.images[faces].flatten(2), dim=2)
    cosine = torch.einsum("fcx,fdx->cd", unit, unit) / len(faces)
    assert cosine.fill_diagonal_(0).max() < ALIKE
    # of signs that look the same in print the first one stays
    assert "O" in bank.characters
    assert not set("\u039f\u041e\u0391\u0410") & set(bank.characters)


def test_a_machine_without_matplotlib_takes_the_bank_that_another_left(bank, tmp_path, monkeypatch):
    assert glyphs.find_bank(CLASSES, tmp_path / "work") is bank
    monkeypatch.setattr(glyphs, "installed", lambda name: None)
    found = glyphs.find_bank(CLASSES, tmp_path / "work")
    assert found is not bank
    assert (found.characters, found.faces) == (bank.characters, bank.faces)
    assert found.images.equal(bank.images)
    assert found.present.equal(bank.present)
    glyphs.render_bank.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="frontier: the glyphs need matplotlib"):
        glyphs.find_bank(CLASSES, tmp_path / "elsewhere")


def test_only_what_all_fonts_have():
    fonts = [
        FakeFont({65: 3, 66: 4, 33: 5, 32: 6, 67: 0, 0x2C6: 8}),
        FakeFont({66: 1, 65: 2, 33: 9, 32: 7, 67: 8, 68: 9}),
    ]
    assert glyphs.candidates(fonts) == ["A", "B", "!"]


def test_computer_modern_is_believed_for_letters_and_digits_alone(bank):
    font = glyphs._font("cmr10")
    assert glyphs.has("cmr10", font, "A")
    assert font.get_char_index(ord("\u00c5")) or not glyphs.has("cmr10", font, "\u00c5")
    assert not glyphs.has("cmr10", font, "\u00c5")
    for row, face in enumerate(bank.faces):
        expected = [not face.startswith("cm") or (c.isascii() and c.isalnum()) for c in bank.characters]
        if face in TRAIN_FACES:
            assert bank.present[row].tolist() == expected
        else:
            assert all(wanted for wanted, there in zip(expected, bank.present[row].tolist(), strict=True) if there)


def test_more_classes_than_there_are(monkeypatch):
    monkeypatch.setattr(glyphs, "candidates", lambda fonts: ["A", "\u0391", "B", " "])
    with pytest.raises(InputError, match="classes: wanted at most 2, which the fonts tell apart, got 3"):
        render_bank.__wrapped__(3)


def test_training_and_test_share_no_rendering(bank):
    assert not set(TRAIN_FACES) & set(TEST_FACES)
    assert set(bank.faces) == set(TRAIN_FACES) | set(TEST_FACES)
    train, test = (bank.images[[bank.faces.index(face) for face in faces]] for faces in (TRAIN_FACES, TEST_FACES))
    for label in range(CLASSES):
        unit, held_out = (F.normalize(part[:, label].flatten(1), dim=1) for part in (train, test))
        assert torch.cdist(unit, held_out[held_out.amax(1) > 0]).min() > 0.09, bank.characters[label]
    # the I without serifs is a bar in two families
    place = bank.characters.index("I")
    assert not bank.present[bank.faces.index("cmss10"), place]
    assert bank.present[:, place].sum() > len(TRAIN_FACES)


def test_views_are_of_their_own_faces_and_of_those_that_have_the_class():
    bank = fake_bank([[0.1, 0.2], [0.3, 0.0], [0.5, 0.6]])
    views = Views(bank, ("a", "b"), 8, CPU)
    assert views._faces.tolist() == [[0, 1], [0, 1]]
    assert views._counts.tolist() == [2, 1]
    other = Views(fake_bank([[0.1, 0.0], [0.3, 0.4]]), ("a", "b"), 8, CPU)
    assert other._faces.tolist() == [[0, 1], [1, 0]]
    drawn = {
        round(float(v), 4)
        for v in other._images[other._faces[torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0])], 1].flatten()
    }
    assert drawn == {0.4}
    with pytest.raises(InputError, match=r"faces: wanted every class in one of b, but none has \['y'\]"):
        Views(bank, ("b",), 8, CPU)


def test_a_class_is_never_drawn_in_a_face_that_has_not_got_it():
    views = Views(fake_bank([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), ("a", "b", "c"), 16, CPU)
    images, labels = views.draw(200, torch.Generator().manual_seed(0))
    assert 70 < labels.sum() < 130
    ink = images[:, 0, 6:10, 6:10].mean((1, 2)) - images[:, 0, [0, 15]].mean((1, 2))
    assert ink.abs().min() > 0.2


def test_a_character_without_ink_in_one_face_is_no_class(monkeypatch):
    render = glyphs.render
    monkeypatch.setattr(glyphs, "candidates", lambda fonts: ["A", "B", "C"])
    monkeypatch.setattr(
        glyphs, "render", lambda font, c: None if c == "B" and "DejaVuSerif-Bold" in font.fname else render(font, c)
    )
    assert render_bank.__wrapped__(2).characters == "AC"


def test_streams_are_keyed_by_their_seed(bank):
    views = Views(bank, TRAIN_FACES, 16, CPU)
    one, same, other = ([*itertools.islice(views.stream(seed, 8), 3)] for seed in (1, 1, 2))
    for (images, labels), (images_again, labels_again) in zip(one, same, strict=True):
        assert images.equal(images_again)
        assert labels.equal(labels_again)
    assert images.shape == (8, 1, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert not one[0][0].equal(other[0][0])
    assert not one[0][0].equal(one[1][0])


def test_a_draw_leaves_the_global_generator_alone(bank):
    state = torch.get_rng_state()
    next(Views(bank, TRAIN_FACES, 16, CPU).stream(0, 4))
    assert state.equal(torch.get_rng_state())


def test_the_map_is_the_inverse_of_scale_stretch_shear_turn_and_shift():
    """By hand: what an affine map does to a point, then back through the one that is used."""
    arguments = torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    used = glyphs._inverse_map(*arguments)
    angle, scale, aspect, shear, right, down = arguments
    angle, scale, shear = 0.6 * (angle - 0.5), 0.55 + 0.3 * scale, 0.4 * (shear - 0.5)
    stretch = (0.3 * (aspect - 0.5)).exp()
    for n in range(5):
        turn = torch.tensor([[angle[n].cos(), -angle[n].sin()], [angle[n].sin(), angle[n].cos()]])
        slant = torch.tensor([[1.0, shear[n]], [0.0, 1.0]], dtype=torch.float64)
        wide = torch.diag(torch.stack([scale[n] * stretch[n], scale[n] / stretch[n]]))
        shift = 0.8 * (1 - scale[n]) * torch.stack([2 * right[n] - 1, 2 * down[n] - 1])
        point = torch.tensor([0.3, -0.7], dtype=torch.float64)
        seen = turn @ slant @ wide @ point + shift
        assert torch.allclose(used[n] @ torch.cat([seen, torch.ones(1)]), point, atol=1e-12)


def test_images_vary_in_contrast_polarity_and_noise():
    views = Views(fake_bank([[1.0]]), ("a",), 16, CPU)
    images, labels = views.draw(512, torch.Generator().manual_seed(0))
    assert labels.eq(0).all()
    centre, corner = images[:, 0, 8, 8], images[:, 0, 0, 0]
    strength = centre - corner
    assert 0.4 < (strength > 0).float().mean() < 0.6
    assert strength.abs().median() > 0.6
    assert 0.2 < images[:, 0, 0].mean(1).std() < 0.4
    noise = images[:, 0, 0].std(1)
    assert noise.min() < 0.02
    assert 0.05 < noise.median() < 0.25
