"""Copies told from other pictures: whatever was done to a file, and what looks alike and is none."""

import dataclasses
import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from metilr.auditing.copies import inliers, likeness, sketch
from metilr.auditing.groups import CopyOptions
from metilr.demo.museum import invent_work
from tests.audit.pictures import picture

SCORE = CopyOptions().copy_score


def jpeg(image: Image.Image, quality: int = 85) -> Image.Image:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=quality)
    return Image.open(io.BytesIO(stream.getvalue()))


def sketched(image: Image.Image):
    return sketch(np.asarray(image.convert("RGB")))


def cropped(image: Image.Image) -> Image.Image:
    return image.crop((image.width // 12, image.height // 10, image.width, image.height))


COPIES = {
    "recompressed": (lambda image: jpeg(image, 40), False, 0),
    "resized": (lambda image: image.resize((int(0.6 * image.width), int(0.6 * image.height))), False, 0),
    "cropped": (cropped, False, 0),
    "grey": (ImageOps.grayscale, False, 0),
    "mirrored": (ImageOps.mirror, True, 0),
    "framed": (lambda image: ImageOps.expand(image, 30, (90, 60, 30)), False, 0),
    "turned": (lambda image: image.rotate(90, expand=True), False, 1),
    "upside down": (lambda image: image.rotate(180), False, 2),
    "turned the other way": (lambda image: image.rotate(-90, expand=True), False, 3),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("change", COPIES)
def test_a_copy_is_known_and_how_it_was_turned(change, seed):
    changed, is_mirrored, turns = COPIES[change]
    image = picture(seed)
    found = likeness(sketched(image), sketched(jpeg(changed(image))))
    assert found.score >= SCORE and (found.mirrored, found.quarter_turns) == (is_mirrored, turns)


def seen_from_the_side(image: Image.Image) -> Image.Image:
    width, height = image.size
    corners = np.float32([[0, 0], [width, 0], [width, height], [0, height]])
    moved = corners + np.float32([[6, 4], [-8, 9], [3, -7], [9, 2]])
    matrix = cv2.getPerspectiveTransform(corners, moved)
    return Image.fromarray(cv2.warpPerspective(np.asarray(image), matrix, (width, height)))


def changed_in_a_corner(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.paste((200, 40, 40), (40, 40, 70, 70))
    return image


OTHERS = {
    "another picture": lambda image: picture(99),
    "turned by two degrees": lambda image: image.rotate(2),
    "stretched": lambda image: image.resize((int(1.03 * image.width), image.height)),
    "seen from the side": seen_from_the_side,
    "changed in a corner": changed_in_a_corner,
    "of one colour": lambda image: Image.new("RGB", image.size, (120, 120, 120)),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("change", OTHERS)
def test_what_looks_alike_is_no_copy(change, seed):
    image = picture(seed)
    assert likeness(sketched(image), sketched(jpeg(OTHERS[change](image)))).score < SCORE


def test_pictures_without_points_are_compared_frame_on_frame():
    image, nothing = picture(1), np.empty((0, 2), np.float32)
    pair = [sketched(each)._replace(points=nothing) for each in (image, image.resize((180, 150)))]
    assert likeness(*pair).score >= SCORE
    assert likeness(pair[0], sketched(picture(99))._replace(points=nothing)).score < SCORE


def test_points_lie_on_the_same_picture_from_the_side_and_not_on_another():
    image = picture(3)
    assert inliers(sketched(seen_from_the_side(image)), sketched(image)) > 30
    assert inliers(sketched(picture(4)), sketched(image)) < 10
    assert inliers(sketched(Image.new("RGB", (50, 50))), sketched(image)) == 0


def test_thin_pictures_are_told_apart_and_found():
    long, other = picture(11, 1200, 90), picture(12, 1200, 90)
    assert likeness(sketched(long), sketched(other)).score < SCORE
    assert likeness(sketched(long), sketched(jpeg(long.resize((900, 68)), 60))).score >= SCORE
    thin = Image.new("RGB", (1300, 60), (200, 180, 160))
    thin.paste((60, 40, 30), (100, 20, 900, 40))
    spear = Image.new("RGB", (1300, 60), (200, 180, 160))
    spear.paste((60, 40, 30), (500, 10, 1200, 30))
    assert likeness(sketched(thin), sketched(spear)).score < SCORE


@pytest.mark.parametrize("seed", range(12))
def test_the_demo_s_near_twins_are_no_copies(seed):
    work = invent_work(seed, 320)
    twin = dataclasses.replace(work, detail_seed=work.detail_seed + 1)
    first, second = (sketched(each.draw_for_catalogue(0)) for each in (work, twin))
    assert likeness(first, second).score < SCORE
    drawn = work.draw_for_catalogue(0)
    for copy in (jpeg(drawn, 80), jpeg(ImageOps.mirror(drawn))):
        assert likeness(first, sketched(copy)).score >= SCORE
