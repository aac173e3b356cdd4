"""Strips: verdicts that explain themselves, rounds that repeat, and prompts that nobody picked."""

from pathlib import Path

import torch
from PIL import Image

from minireflect.showcase import animation, compare, fixed_prompts, judged, marked, verdict
from minireflect.streams import choices
from minireflect.world.captions import caption
from minireflect.world.laws import LAWS, render
from minireflect.world.prompts import law_prompt, near_miss, sample_scene
from tests.small import brightness, small_pipeline


def test_a_verdict_explains_itself() -> None:
    draw = choices(0, "verdict")
    (prompt,) = (p for p in fixed_prompts(("physical",)) if p.law == "balance")
    image = render(prompt.scene(draw))
    assert verdict(image, prompt.text, 0.5) == (image, "right · reward 0.50", True)
    other = near_miss(prompt, draw, "test")
    _, said, right = verdict(render(other.scene(draw)), prompt.text)
    seen = law_prompt("balance", other.objects, other.outcome).text
    assert not right and said == f"wrong: reads as {seen}"
    _, said, right = verdict(torch.zeros(3, 64, 64), prompt.text, 0.25)
    assert not right and said.startswith("unreadable: ") and said.endswith(" · reward 0.25")
    assert len(said) > len("unreadable:  · reward 0.25")  # the inspector's reason
    _, said, right = verdict(image, "a red ball that nobody defined")
    assert right is None and said.startswith("no law covers the prompt; reads as a balance")


def test_the_block_that_no_scene_explains_is_framed() -> None:
    prompt = fixed_prompts(("physical",))[0]
    image = render(prompt.scene(choices(0, "framed")))
    image[:, 60:64, 0:4] = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    shown, said, _ = verdict(image, prompt.text)
    assert "at x 0, y 60" in said
    changed = (shown != image).any(0)  # (64 64)
    assert changed[59, :5].all() and changed[59:, 4].all() and changed.sum() == 9
    assert marked(image, None) is image


def test_a_round_that_repeats_the_picture_says_so(tmp_path: Path) -> None:
    prompts = fixed_prompts(("physical",))[:2]
    draw = choices(0, "kept")
    first = torch.stack([render(p.scene(draw)) for p in prompts])
    second = first.clone()
    second[1] = 0.0
    columns, texts = {"round 0": first, "round 1": second, "round 2": second}, [p.text for p in prompts]
    rows = compare(columns, brightness, texts, tmp_path / "x.png")
    said = [[mark.split(" ·")[0].split(": no scene")[0] for _, mark, _ in row] for row in rows]
    assert said[0] == ["right", "kept: right", "kept: right"]
    assert (
        said[1][0] == "right"
        and said[1][1].startswith("unreadable")
        and said[1][2].startswith("kept: unreadable")
    )
    assert [[right for *_, right in row] for row in rows] == [[True] * 3, [True, False, False]]
    assert (tmp_path / "x.png").stat().st_size > 5_000


def test_pictures_that_no_inspector_reads_show_their_reward(tmp_path: Path) -> None:
    columns = {"base": torch.ones(1, 3, 32, 32)}
    ((cell,),) = compare(columns, brightness, ["a fox"], tmp_path / "x.png", read=False)
    assert cell[1:] == ("reward 1.000", None)


def test_notes_stand_above_the_verdict(tmp_path: Path) -> None:
    columns = {name: torch.ones(1, 3, 32, 32) for name in ("one", "two")}
    notes = {"one": ["first"], "two": ["second"]}
    (row,) = compare(columns, brightness, ["a fox"], tmp_path / "x.png", notes, read=False)
    assert [mark for _, mark, _ in row] == ["first\nreward 1.000", "second\nreward 1.000"]


def test_the_fixed_prompts_are_the_first_of_every_law() -> None:
    prompts = fixed_prompts()
    assert [(p.law, p.kind) for p in prompts] == [
        (law, kind) for law in LAWS for kind in ("physical", "unconventional")
    ]


def test_judged_pictures_have_a_word_and_a_reward() -> None:
    scene = sample_scene(0, "balance")
    texts = [caption(scene), "the sun on the left of a tall green tree", caption(scene)]
    images = torch.stack([render(scene), render(scene), torch.zeros(3, 64, 64)])
    cells = judged(images, texts, lambda images, texts: torch.tensor([0.9, 0.1, 0.2]))
    assert [mark for _, mark, _ in cells] == ["right · 0.90", "wrong · 0.10", "unreadable · 0.20"]
    assert [right for _, _, right in cells] == [True, False, False]


def test_an_animation_ends_with_the_verdict_of_the_reward(tmp_path: Path) -> None:
    refuse_first = lambda images, texts: (torch.arange(len(images)) % 2).float()  # noqa: E731
    animation(small_pipeline(), refuse_first, ["ball", "block"], 0, tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as gif:
        gif.seek(gif.n_frames - 1)
        last = gif.convert("RGB")
    assert last.size == (288, 160)
    assert last.getpixel((5, 100))[0] > 200 > 100 < last.getpixel((149, 100))[1]  # red, green
