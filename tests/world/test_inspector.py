"""The inspector is the truth of this project, so it is tested hardest: every fact, every disturbance, every
forgery.
"""

import io
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from minireflect.world.canvas import PALETTE, to_tensor
from minireflect.world.captions import caption
from minireflect.world.data import WorldConfig, training_pairs
from minireflect.world.inspector import inspect, inspect_all
from minireflect.world.laws import LAWS, render, render_pixels
from minireflect.world.prompts import draw_prompts, near_miss, prompt_set, sample_scene
from minireflect.world.scenes import COLORS, Object, Reading, Scene, arrangement

N = 150  # scenes a test; the README's figures use 2,000 (scripts/measure.py)
LAW_NAMES = [*LAWS, "arrangement"]


def scenes(n: int = N, start: int = 0) -> list[Scene]:
    return [sample_scene(start + i, split="test" if i % 3 == 0 else "train") for i in range(n)]


def pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def jpeg(image: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    pillow(image).save(buffer, "JPEG", quality=50)
    return to_tensor(np.asarray(Image.open(buffer))[None])[0]


def blur(image: torch.Tensor) -> torch.Tensor:
    return to_tensor(np.asarray(pillow(image).filter(ImageFilter.GaussianBlur(1)))[None])[0]


def shift(image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(image[None], (0, 2, 2, 0), mode="replicate")[0, :, :64, 2:]


GENERATOR = torch.Generator().manual_seed(0)


def tint(image: torch.Tensor) -> torch.Tensor:
    """A colour matrix within 5 % of the identity, on [0, 1]."""
    M = torch.eye(3) + 0.1 * torch.rand(3, 3, generator=GENERATOR) - 0.05
    return (torch.einsum("ij,jhw->ihw", M, image + 1) - 1).clamp(-1, 1)


def strip(image: torch.Tensor) -> torch.Tensor:
    """A strip of two rows or columns of any colour over the picture."""
    covered, (at, turned) = image.clone(), torch.randint(0, 63, (2,), generator=GENERATOR).tolist()
    lines = covered.mT if turned % 2 else covered
    lines[:, at : at + 2] = 2 * torch.rand(3, 1, 1, generator=GENERATOR) - 1
    return covered


DISTURBANCES = {
    "noise of 0.05": lambda x: (x + 0.1 * torch.randn(x.shape, generator=GENERATOR)).clamp(
        -1, 1
    ),  # 0.05 of [0, 1]
    "JPEG at quality 50": jpeg,
    "a blur of one pixel": blur,
    "a shift of two pixels": shift,
    "10 % brighter": lambda x: ((x + 1) * 1.1 - 1).clamp(-1, 1),
    "10 % darker": lambda x: (x + 1) * 0.9 - 1,
    "a tint of 5 %": tint,
}


@pytest.mark.parametrize("law", LAW_NAMES)
def test_every_scene_of_every_law_is_read_right(law: str) -> None:
    for i in range(N // 5):
        scene = sample_scene(i, law)
        assert inspect(render(scene)).agrees_with(scene), scene


def test_every_combination_and_outcome_is_read_right() -> None:
    for name, law in LAWS.items():
        for objects in law.combinations:
            for outcome in law.outcomes:
                scene = Scene(name, objects, outcome, (1, -2))
                assert inspect(render(scene)).scene == scene


@pytest.mark.parametrize("name", DISTURBANCES)
def test_disturbed_pictures_are_still_read_right(name: str) -> None:
    drawn = scenes(start=10_000)
    right = [inspect(DISTURBANCES[name](render(s))).agrees_with(s) for s in drawn]
    assert np.mean(right) >= 0.99, f"{name}: {np.mean(right):.3f}"


def test_a_strip_over_the_picture_is_forgiven() -> None:
    drawn = scenes(start=20_000)
    right = [inspect(strip(render(s))).agrees_with(s) for s in drawn]
    assert np.mean(right) >= 0.9, np.mean(right)


@pytest.mark.parametrize("forgiven", [tint, strip])
def test_what_is_forgiven_hides_no_wrong_fact(forgiven: Callable[[torch.Tensor], torch.Tensor]) -> None:
    draw = random.Random(2)
    for kind in ("physical", "unconventional"):
        for prompt in draw_prompts(kind, "test", N // 5, draw):
            other = near_miss(prompt, draw, "test")  # recoloured, swapped, of another size, or reversed
            assert not prompt.fulfilled_by(inspect(forgiven(render(other.scene(draw))))), other.text
    for prompt in draw.sample(prompt_set("arrangement", "train"), N // 5):
        scene = prompt.scene(draw)
        if fewer := scene.objects[1:]:
            removed = inspect(forgiven(render(replace(scene, objects=fewer))))
            assert not removed.agrees_with(scene), prompt.text


def test_two_strips_or_one_of_two_colours_are_not_forgiven() -> None:
    image = render(Scene("gravity", LAWS["gravity"].combinations[0], "floor"))
    image[:, :, 8:10] = -1
    assert inspect(image).readable
    two, mixed = image.clone(), image.clone()
    two[:, :, 40:42] = -1
    mixed[:, 40:, 8:10] = 1
    assert not inspect(two).readable and not inspect(mixed).readable


@pytest.mark.parametrize("kind", ["physical", "unconventional", "arrangement"])
def test_a_picture_with_one_fact_wrong_is_never_accepted(kind: str) -> None:
    draw = random.Random(0)
    for prompt in draw_prompts(kind, "test", N, draw):
        other = near_miss(prompt, draw)
        assert prompt.fulfilled_by(inspect(render(prompt.scene(draw)))), prompt.text
        shown = other.scene(draw)
        reading = inspect(render(shown))
        # a scene of another task may fulfil this one too: "a red ball" is also "a ball"
        if not (prompt.graph and prompt.graph.fulfilled_by(shown.objects)):
            assert not prompt.fulfilled_by(reading), (prompt.text, other.text)


def test_a_picture_with_an_object_removed_is_never_accepted() -> None:
    draw = random.Random(1)
    for prompt in draw.sample(prompt_set("arrangement", "train"), 60):
        scene = prompt.scene(draw)
        fewer = Scene("arrangement", scene.objects[1:], "")
        if fewer.objects:
            assert not inspect(render(fewer)).agrees_with(scene)
    pixels, drawn, _ = training_pairs(N, WorldConfig(arrangements=0), draw)
    paper = pixels[0, 32, 0]
    for image, scene in zip(pixels, drawn):
        if scene.law == "balance":  # paint paper over the left ball, wherever it hangs
            gone = image.copy()
            gone[16:44, 4:24] = paper
            assert not inspect(to_tensor(gone[None])[0]).agrees_with(scene)


@pytest.mark.parametrize("rows", [slice(0, 32), slice(32, 64)], ids=["ceiling", "floor"])
@pytest.mark.parametrize("columns", [slice(0, 64), slice(0, 32), slice(32, 64)], ids=["all", "left", "right"])
def test_a_room_without_floor_or_ceiling_is_never_accepted(rows: slice, columns: slice) -> None:
    """They differ from paper by less than the tolerance of a block; the band finds what is missing."""
    paper, ground = ((torch.tensor(PALETTE[c]) / 127.5 - 1)[:, None, None] for c in ("paper", "ground"))
    for seed in range(20):
        image = render(sample_scene(seed, "gravity"))
        gone = torch.zeros(64, 64, dtype=torch.bool)
        gone[rows, columns] = (image - ground).abs().amax(0)[rows, columns] < 0.02
        assert inspect(image).readable and not inspect(torch.where(gone, paper, image)).readable, seed


@pytest.mark.slow
def test_nothing_is_read_into_noise_blank_or_dissolved_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = scenes(60)
    pictures = [render(s) for s in drawn]
    forged = [torch.rand(3, 64, 64, generator=generator) * 2 - 1 for _ in range(30)]
    forged += [torch.randn(3, 64, 64, generator=generator) for _ in range(30)]
    forged += [torch.full((3, 64, 64), v) for v in np.linspace(-1, 1, 21)]
    forged += [0.5 * p + 0.5 * torch.randn(p.shape, generator=generator) for p in pictures]
    laws = [s.law for s in drawn]
    forged += [0.5 * p + 0.5 * q for p, q, a, b in zip(pictures, pictures[1:], laws, laws[1:]) if a != b]
    dissolve = torch.rand(60, 1, 64, 64, generator=generator) < 0.5
    forged += [
        torch.where(d, p, torch.rand(p.shape, generator=generator) * 2 - 1)
        for d, p in zip(dissolve, pictures)
    ]
    assert [r.why for r in inspect_all(torch.stack(forged)) if r.readable] == []
    assert "not finite" in inspect(torch.full((3, 64, 64), float("nan"))).why


def test_an_unreadable_picture_says_what_no_scene_explains() -> None:
    scene = Scene("gravity", LAWS["gravity"].combinations[0], "floor")
    image = render(scene)
    spot = image.clone()
    spot[:, 20:24, 36:40] = -1  # one 4x4 block is black
    why = inspect(spot).why
    assert inspect(spot).block == (36, 20) and inspect(image).block is None
    assert f"nearest is '{caption(scene)}'" in why and "at x 36, y 20 are 0.9" in why and "0.25" in why
    assert "off on average" in inspect((image + 1) * 0.8 - 1).why  # darker than the inspector evens out
    grey, brown = (
        Scene("gravity", (replace(*scene.objects, size="small", color=color),), "floor")
        for color in ("grey", "brown")
    )
    why = inspect(0.5 * render(grey) + 0.5 * render(brown)).why
    assert "halfway between two scenes" in why and caption(grey) in why and caption(brown) in why
    big = Scene("gravity", (replace(*scene.objects, color="brown"),), "floor")
    assert "8 rows of 32 pixels are 0.1" in inspect(0.5 * image + 0.5 * render(big)).why


def test_the_wrong_shape_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 64, 64\), not \(3, 32, 32\)"):
        inspect(torch.zeros(3, 32, 32))


def test_reading_takes_no_part_of_the_scene() -> None:
    """The same pixels give the same reading, whoever drew them."""
    scene = sample_scene(3)
    copy = to_tensor(np.array(render_pixels(scene))[None])[0]
    assert inspect(copy) == inspect(render(scene))


@pytest.mark.parametrize(
    ("worst", "mean", "readable"), [(0.22, 0, True), (0.28, 0, False), (0, 0.03, True), (0, 0.04, False)]
)
def test_the_tolerances_are_those_that_the_header_states(worst: float, mean: float, readable: bool) -> None:
    """0.25 in a block of 4x4 pixels, 0.035 on average, here made by twice that in every other block."""
    image = render(Scene("gravity", LAWS["gravity"].combinations[0], "floor"))
    other = torch.arange(256).view(16, 16).add(torch.arange(16)[:, None]) % 2
    image[1] -= 2 * 2 * mean * other.repeat_interleave(4, 0).repeat_interleave(4, 1)  # of [-1, 1]
    image[0, 20:24, 36:40] -= 2 * worst
    assert inspect(image).readable is readable


@pytest.mark.parametrize(("share", "readable"), [(0.46, True), (0.48, False)])
def test_a_picture_is_read_up_to_47_percent_of_the_way_to_another_scene(share: float, readable: bool) -> None:
    stone = replace(*LAWS["gravity"].combinations[0], size="small")
    grey, brown = (
        render(Scene("gravity", (replace(stone, color=color),), "floor")) for color in ("grey", "brown")
    )
    assert inspect((1 - share) * grey + share * brown).readable == readable


def test_the_other_scene_is_found_behind_camera_positions_and_a_second_scene() -> None:
    """The four nearest points of the filter are of one scene here; the other scene is the third here."""
    stone = replace(*LAWS["gravity"].combinations[0], size="small", color="grey")
    block = Object("block", "iron", "small", "right")
    pairs = [
        ("gravity", "floor", (2, 1), replace(stone, place="left"), replace(stone, place="middle")),
        ("buoyancy", "sinks", (-2, 0), block, replace(block, color="wooden")),
    ]
    for law, outcome, moved, *both in pairs:
        one, two = (render(Scene(law, (o,), outcome, moved)) for o in both)
        assert "halfway" in inspect(0.52 * one + 0.48 * two).why


@pytest.mark.parametrize(("share", "seen"), [(0.75, True), (0.55, True), (0.45, False)])
def test_the_ink_of_a_pale_shape_is_seen_from_one_half(share: float, seen: bool) -> None:
    """The tolerances then decide: of the pale shapes that are seen only the first is read."""
    scene = arrangement([Object("cylinder", "red", xy=(20, 30))])
    paper = torch.tensor(PALETTE["paper"])[:, None, None] / 127.5 - 1
    reading = inspect(paper + share * (render(scene) - paper))
    assert reading.agrees_with(scene) == (share > 0.7)
    assert ("red cylinder" in (reading.why or caption(scene))) == seen


def test_two_equal_shapes_six_pixels_apart_remain_two() -> None:
    places = {"red": [(31, 39), (25, 35)], "blue": [(33, 37)]}
    red = [Object("cylinder", "red", xy=xy) for xy in places["red"]]
    scene = arrangement([*red, Object("block", "blue", xy=places["blue"][0])])
    assert inspect(render(scene)).agrees_with(scene)


def test_a_box_that_another_divides_is_read_once() -> None:
    """Its two parts fit boxes a pixel apart."""
    scene = arrangement([Object("box", "blue", xy=(33, 36)), Object("box", "red", xy=(33, 39))])
    assert inspect(render(scene)).agrees_with(scene)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_strip_that_is_off_in_one_channel_is_forgiven(channel: int) -> None:
    """0.4 of [0, 1] in two of eight rows are 0.1 in a band, too much; over the channels they are 0.13."""
    scene = Scene("gravity", LAWS["gravity"].combinations[0], "floor")
    image = render(scene)
    image[channel, 20:22] -= 0.8
    assert inspect(image).agrees_with(scene)


@pytest.mark.parametrize(("std", "readable"), [(0.07, True), (0.09, False)])
def test_a_strip_is_forgiven_if_it_is_flat(std: float, readable: bool) -> None:
    """Rows that alternate by `std`, of [0, 1], along a dark strip: the header's tolerance is 0.08."""
    image = render(Scene("gravity", LAWS["gravity"].combinations[0], "floor"))
    image[:, :, 8:10] = (2 * std * (-1.0) ** torch.arange(64) - 0.6)[:, None]
    assert inspect(image).readable == readable


@pytest.mark.parametrize(("aside", "lower", "readable"), [(4, 1, True), (3, 3, True), (2, 1, False)])
def test_a_ball_is_read_by_what_a_block_in_front_leaves_of_it(aside: int, lower: int, readable: bool) -> None:
    """Of its 150 pixels 38 and 43 suffice; 16 are less than MIN_PIXELS."""
    block = Object("block", "blue", xy=(32 + aside, 32 + lower))
    scene = arrangement([Object("ball", "red", xy=(32, 32)), block])
    assert inspect(render(scene)).agrees_with(scene) == readable


@pytest.mark.parametrize(("n", "readable"), [(6, True), (7, False)])
def test_up_to_six_shapes_are_read(n: int, readable: bool) -> None:
    """A graph has four: a picture with more is wrong, but it is readable."""
    places = [(10 + 21 * (i % 3), 12 + 20 * (i // 3)) for i in range(n)]
    scene = arrangement(Object("ball", COLORS[i % 5], xy=xy) for i, xy in enumerate(places))
    assert inspect(render(scene)).agrees_with(scene) == readable


@pytest.mark.parametrize(("off", "agrees"), [((2, -2), True), ((3, 0), False), ((0, -3), False)])
def test_a_shape_may_be_read_two_pixels_off_its_place(off: tuple[int, int], agrees: bool) -> None:
    truth = arrangement([Object("ball", "red", xy=(20, 30)), Object("ball", "blue", xy=(50, 30))])
    moved = replace(truth.objects[0], xy=(20 + off[0], 30 + off[1]))
    assert Reading(arrangement([moved, truth.objects[1]]), 0.0).agrees_with(truth) == agrees
