"""Every key that a file can state is read, harmless or refused, and docs/checkpoints.md says which.

`python -m tests.checkpoints.test_stated` writes the tables into the document.
"""

import inspect
import re
from pathlib import Path

import pytest

from minireflect.checkpoints.files import WeightsError
from minireflect.checkpoints.stated import ABSENT, DISCRETE, KINDS, TYPES, Rule, check, check_names
from minireflect.ranges import Refusal, expect

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "checkpoints.md"
BEGIN, END = "<!-- what is stated -->\n", "<!-- end of what is stated -->\n"
TENSORS = ("single file", "LoRA")  # whose keys are names of tensors
EXAMPLES = {
    r"(model\.)?(diffusion_model\.)?((single_)?transformer|joint|double|single)_(blocks|layers)\..*": (
        "model.diffusion_model.joint_blocks.0"
    ),
    r".*\.(diff(_b)?|w_norm|b_norm)|.*lora_.*\.bias": "unet.x.diff_b",  # of keys that are patterns
    r".*lora(\.|_)(A|B|down|up)\b.*|.*\.lora_linear_layer\.(down|up)\.weight": "unet.x.to_q.lora_A.weight",
}


def example(pattern: str) -> str:
    """A key that the pattern takes."""
    if pattern in EXAMPLES:
        return EXAMPLES[pattern]
    text = re.sub(r"\(([^()|]+)\|[^()]*\)", r"\1", pattern.split("|")[0] if "(" not in pattern else pattern)
    text = re.sub(r"\((_\w+)\)\?", "", text.split("|")[0])
    text = text.replace(r"\w*", "x").replace(r"\.", ".").replace(".*", "x").replace("[01]", "0")
    return text.replace(r"\b", "").replace("[AB]", "A")


def said(rule: Rule) -> str:
    values = (
        f" ({', '.join(f'`{v!r}`' for v in rule.values)})" if rule.what != "refused" and rule.values else ""
    )
    return f"{rule.what}{values}" + (f": {rule.why}" if rule.what == "refused" else "")


def tables() -> str:
    """A line for each kind of file and verdict, and one for each refusal."""
    lines = ["| file | keys | |", "|---|---|---|"]
    for kind, rules in KINDS.items():
        groups: dict[str, list[str]] = {}
        for pattern, rule in rules.items():
            groups.setdefault(said(rule), []).append(f"`{pattern}`")
        rows = ((kind, " ".join(keys), verdict) for verdict, keys in groups.items())
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def absent_table() -> str:
    """A line for each kind of file, or class of scheduler, with what is meant where a key is absent."""
    lines = ["| where it is absent | key and value |", "|---|---|"]
    for kind, values in ABSENT.items():
        lines.append(f"| {kind} | {' '.join(f'`{key} = {value!r}`' for key, value in values.items())} |")
    return "\n".join(lines) + "\n"


def fitting(key: str) -> object:
    """A value of the key's type, "something else" where it has none."""
    for value in ("something else", None, 1, True, [], {}):
        try:
            return expect(value, TYPES.get(key, object), key)
        except Refusal:
            continue
    raise AssertionError(f"no value of the test is a {TYPES[key]}")


RULES = [(kind, pattern, rule) for kind, rules in KINDS.items() for pattern, rule in rules.items()]


@pytest.mark.parametrize(("kind", "pattern", "rule"), RULES, ids=lambda value: str(value)[:40])
def test_every_key_is_what_the_table_says(kind: str, pattern: str, rule: Rule) -> None:
    key = example(pattern)
    assert re.fullmatch(pattern, key), key
    for value in rule.values:
        check(kind, {"clip_sample": False, key: value}, "file")  # which DDIM clips where nothing is said
    value = key if kind in TENSORS else fitting(key)
    if key in TYPES:
        with pytest.raises(WeightsError, match=f"^{key} in file must be .*, got <object"):
            check(kind, {key: object()}, "file")
    if rule.what != "refused" and not rule.values:
        check(kind, {key: value}, "file")
        return
    with pytest.raises(WeightsError, match=f"file (has|asks for) {re.escape(key)}.* refused: .") as error:
        check(kind, {key: value}, "file")
    assert len(str(error.value)) < 300 and str(error.value).endswith(rule.why)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TENSORS])
def test_an_unknown_key_is_refused_unless_it_asks_for_nothing(kind: str) -> None:
    for value in (None, False, [], {}, ""):
        check(kind, {"new_in_2030": value}, "file")
    with pytest.raises(
        WeightsError, match="asks for new_in_2030 = 3, which is refused: minireflect does not"
    ):
        check(kind, {"new_in_2030": 3}, "file")


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_stand_in_no_table_are_listed(kind: str) -> None:
    assert check_names(kind, ["what.is.this"], "file") == ["what.is.this"]


def test_what_the_libraries_write_is_known() -> None:
    import diffusers
    from peft import LoraConfig
    from transformers import CLIPConfig, CLIPTextConfig

    net = diffusers.UNet2DConditionModel(block_out_channels=(32,), down_block_types=["DownBlock2D"],
                                         up_block_types=["UpBlock2D"])  # fmt: skip
    check("UNet", dict(net.config), "file")
    check("VAE", dict(diffusers.AutoencoderKL(block_out_channels=(32,)).config), "file")
    check("text encoder", CLIPTextConfig().to_dict(), "file")
    clip = CLIPConfig().to_dict()
    check("CLIP", clip, "file")
    for part in ("text_config", "vision_config"):
        check(f"CLIP's {part}", clip[part], "file")
    check("LoRA's configuration", LoraConfig(peft_type="LORA").to_dict() | {"peft_type": "LORA"}, "file")
    for name in ("DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "DDPM",
                 "LMSDiscrete", "UniPCMultistep", "HeunDiscrete", "DEISMultistep"):  # fmt: skip
        stated = dict(getattr(diffusers, f"{name}Scheduler")().config) | {"clip_sample": False}
        check("scheduler", stated | {"_class_name": f"{name}Scheduler"}, "file")
    for name in ("LCM", "TCD", "EDMEuler", "EDMDPMSolverMultistep", "FlowMatchEulerDiscrete"):
        stated = dict(getattr(diffusers, f"{name}Scheduler")().config)
        with pytest.raises(WeightsError, match="refused"):
            check("scheduler", stated | {"_class_name": f"{name}Scheduler"}, "file")


def defaults() -> dict[str, dict]:
    """What the libraries take for a key that is absent, by kind of file or class of scheduler."""
    import diffusers
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from peft import LoraConfig
    from transformers import CLIPTextConfig, CLIPVisionConfig

    def stated_by(kind: type) -> dict:
        return {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}

    text, vision = CLIPTextConfig().to_dict(), CLIPVisionConfig().to_dict()
    schedulers = [f"{name}Scheduler" for name in DISCRETE.split()]
    return {
        "UNet": stated_by(diffusers.UNet2DConditionModel),
        "VAE": stated_by(diffusers.AutoencoderKL),
        "text encoder": text,
        "CLIP's text_config": text,
        "CLIP's vision_config": vision,
        "open_clip's text_cfg": stated_by(CLIPTextCfg),
        "open_clip's vision_cfg": stated_by(CLIPVisionCfg),
        "LoRA's configuration": stated_by(LoraConfig) | {"alpha_pattern": {}},
        **{name: stated_by(getattr(diffusers, name)) for name in schedulers},
    }


# Absent without a value of ours: nothing is asked for, or what is then done is the same, in other words.
SAME = {"final_sigmas_type": "zero", "eos_token_id": 49407}  # where DDIM ends; CLIP's last token


def test_an_absent_key_is_what_the_library_takes() -> None:
    wrong = []
    for kind, library in defaults().items():
        table = "scheduler" if kind.endswith("Scheduler") else kind
        ours = ABSENT.get(table, {}) | ABSENT.get(kind, {})
        for key in [key for key, rule in KINDS[table].items() if rule.what == "read" and key in library]:
            same = library[key] in (None, False, {}, SAME.get(key)) if key not in ours else False
            if not same and ours.get(key) != library[key]:
                wrong.append(f"{kind} {key}: {ours.get(key)}, the library {library[key]}")
        for key in ours.keys() & library.keys():  # also of what is refused when it is absent
            wrong += [f"{kind} {key}: {ours[key]}"] if ours[key] != library[key] else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", ABSENT)
def test_an_absent_key_is_in_what_check_returns(kind: str) -> None:
    table = "scheduler" if kind.endswith("Scheduler") else kind
    stated = {"_class_name": kind} if kind.endswith("Scheduler") else {"new_in_2030": None}
    off = {"clip_sample": False} if ABSENT[kind].get("clip_sample") else {}
    assert (check(table, stated | off, "file") | off).items() >= (ABSENT[kind] | off).items()
    assert check(table, {}, "file") == {}


def test_the_document_has_the_tables() -> None:
    assert tables() in DOCUMENT.read_text(), "python -m tests.checkpoints.test_stated"
    assert absent_table() in DOCUMENT.read_text(), "python -m tests.checkpoints.test_stated"


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(before + BEGIN + tables() + "\n" + absent_table() + END + after)
