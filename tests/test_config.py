"""Presets, and config.json: what a command was given comes back, and nothing else is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minireflect.cli import TRAINED
from minireflect.cli import train as command_line
from minireflect.config import FIELDS, Config, changed, options_of, preset, read_config, to_dict
from minireflect.methods.srrl import SRRLConfig


def written(folder: Path, config: Config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder


@pytest.mark.parametrize("name", ["cpu", "gpu", "smoke"])
@pytest.mark.parametrize("command", TRAINED)
def test_what_a_command_was_given_comes_back(tmp_path: Path, command: str, name: str) -> None:
    config = replace(preset(name, command), seed=7, weights=Path("/somewhere"))
    again = read_config(written(tmp_path, config))
    assert again == replace(config, out=tmp_path, resume=True)


def test_a_changed_option_comes_back(tmp_path: Path) -> None:
    config = changed(preset("cpu", "rlrig"), {"rlrig": {"loop": {"rounds": 1}, "graphs": 7}})
    again = read_config(written(tmp_path, config))
    assert again.rlrig.loop.rounds == 1 and again.rlrig.graphs == 7


def test_a_run_keeps_the_records_of_its_command_only() -> None:
    assert set(to_dict(Config("reward"))) == {
        "command",
        "preset",
        "seed",
        "weights",
        "scenes",
        "method",
        "reward",
    }
    on_checkpoint = changed(Config(), {"finetune": {"base": "sd"}})
    assert {"world", "autoencoder", "mix"}.isdisjoint(to_dict(on_checkpoint))
    graphs = Config("all", scenes="graphs")
    assert {"autoencoder", "diffusion", "checker", "actor", "rlrig"} <= set(to_dict(graphs))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"command": "srrl"}',
        '{"command": "srrl", "preset": "cpu", "weights": null, "scenes": "laws", "speed": 3}',
    ],
)  # fmt: skip
def test_a_broken_config_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not a valid configuration of minireflect train") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no run to resume"):
        read_config(tmp_path / "nowhere")


def test_presets() -> None:
    smoke, gpu = preset("smoke"), preset("gpu")
    assert smoke.srrl.iterations == 2 and smoke.vq.steps == 3 and smoke.evaluation.pictures == 8
    assert gpu.srrl.batch == 256 and gpu.srrl.lr == preset("cpu").srrl.lr
    assert preset("smoke", scenes="graphs").diffusion.reading_steps == 3
    assert preset("cpu", scenes="graphs").diffusion.steps == 8_000
    assert preset("cpu", "reason-grpo").mix != preset("cpu").mix
    assert preset("smoke", srrl=SRRLConfig(rounds=0)).srrl.rounds == 0
    for bad in ({"name": "huge"}, {"name": "cpu", "scenes": "dreams"}):
        with pytest.raises(ValueError, match="must be one of"):
            preset(**bad)


@pytest.mark.parametrize(("device", "expected"), [("cuda", "gpu"), ("mps", "cpu"), ("cpu", "cpu")])
def test_only_a_cuda_gpu_gets_the_gpu_preset(
    device: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "best_device", lambda: device)
    assert command_line.defaults("srrl", []).preset == expected
    assert command_line.defaults("srrl", ["--preset", "smoke"]).preset == "smoke"
    assert command_line.defaults("srrl", ["--device", "cpu"]).preset == "cpu"


@pytest.mark.parametrize("method", ["ddpo", "grpo"])
@pytest.mark.parametrize("base", [[], ["--base", "x"]])
def test_a_method_decides_the_defaults(method: str, base: list[str]) -> None:
    words = ["--method", method, *base]
    config = command_line.defaults("srrl", words)
    assert config.method == method and config.srrl.group == 4 and config.srrl.rounds == 0
    assert command_line.parse([*words, "--rounds", "2"], config).srrl.rounds == 2


def test_each_command_has_the_options_of_its_records() -> None:
    for command in TRAINED:
        names = set(vars(options_of(Config(command))))
        assert set(FIELDS[command].split()) <= names
    assert {"srrl", "finetune", "sampler"} <= set(
        vars(options_of(changed(Config(), {"finetune": {"base": "sd"}})))
    )


def test_an_option_that_is_there_twice_is_named(tmp_path: Path) -> None:
    """Python takes the last one: the run would go on with another seed than it began with."""
    text = json.dumps({"weights": None, **to_dict(preset("smoke"))})
    for name in ('"seed": 0', '"steps": 4'):
        (tmp_path / "config.json").write_text(text.replace(name, f"{name}, {name}.5"))
        with pytest.raises(ValueError, match=f"'{name.split(chr(34))[1]}' appears twice"):
            read_config(tmp_path)
