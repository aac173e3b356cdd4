"""scripts/measure.py: the parts of it that make something."""

import sys
from pathlib import Path

import numpy as np
import torch

from minireflect.evaluate import EvaluationConfig
from minireflect.evaluate_reason import evaluation_prompts
from minireflect.rl.rewards import ACCEPT_WORD
from minireflect.streams import choices
from minireflect.world.captions import plan_of, read_rationale
from minireflect.world.prompts import KINDS, prompt_set
from minireflect.world.scenes import Reading

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import measure
import reports


def test_false_rationales_are_false_and_readable() -> None:
    draw = choices(0, "false")
    for prompt in evaluation_prompts(EvaluationConfig(pictures=24)):
        scene = prompt.scene(draw)
        plan = read_rationale(measure.false_rationale(prompt, scene, "test", draw))
        assert plan is not None and plan != plan_of(scene)


def test_every_test_prompt_has_a_twin_that_does_not_fulfil_it() -> None:
    draw = choices(0, "twins")
    for prompt in (p for kind in KINDS for p in prompt_set(kind, "test")):
        assert not prompt.fulfilled_by(Reading(measure.twin_scene(prompt, draw), 0.0)), prompt.text


def test_a_captioner_that_accepts_everything_keeps_all_and_one_that_accepts_nothing_none() -> None:
    for value in (0.0, ACCEPT_WORD, 1.0):
        table = measure.measure_captioner(lambda images, texts, v=value: torch.full((len(texts),), v), 6)
        assert [v for row in table.rows.values() for v in row.values()] == [float(value > 0)] * 12


def test_the_area_under_the_curve_counts_pairs() -> None:
    """The share of (right, wrong) pairs in which the right one has the higher value; ties count half."""
    values, right = np.array([0.9, 0.5, 0.5, 0.1, 0.7]), np.array([True, True, False, False, False])
    pairs = [(a > b) + (a == b) / 2 for a in values[right] for b in values[~right]]
    assert reports.auc(values, right) == np.mean(pairs)
    assert np.isnan(reports.auc(values, right | True))
