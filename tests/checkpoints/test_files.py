"""Weights: what is written comes back, what does not fit is named, and a file is never half there."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minireflect.checkpoints.files import (
    CHECKSUM,
    WeightsError,
    checksum,
    load_into,
    new_names,
    read_json,
    read_metadata,
    read_weights,
    save_weights,
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def filled(value: float) -> dict[str, Tensor]:
    return {name: torch.full_like(t, value) for name, t in network().state_dict().items()}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    net = network().to(memory_format=torch.contiguous_format)
    tensors = {**net.state_dict(), "picture": torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)}
    save_weights(path, tensors, {"config": "tiny"})
    back = read_weights(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], t) for name, t in tensors.items())
    assert read_metadata(path) == {"config": "tiny", CHECKSUM: checksum(tensors, {"config": "tiny"})}
    save_weights(path, tensors, {})
    assert read_metadata(path) == {CHECKSUM: checksum(tensors, {})}
    assert os.listdir(tmp_path) == ["net.safetensors"]
    (tmp_path / "plain").touch()
    assert (
        path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    )  # a class can read its teacher's weights


def test_unreadable_files_are_named_in_one_sentence(tmp_path: Path) -> None:
    whole, cut, foreign, empty = (tmp_path / name for name in ("whole", "cut", "foreign", "empty"))
    save_weights(whole, filled(1), {})
    cut.write_bytes(whole.read_bytes()[:-7])
    torch.save(filled(1), foreign)
    empty.touch()
    for path in (cut, foreign, empty):
        for read in (read_weights, read_metadata):
            with pytest.raises(
                WeightsError, match=f"{path.name} is truncated or not a safetensors file"
            ) as error:
                read(path)
            assert "\n" not in str(error.value)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(WeightsError, match="does not exist, or is not a file"):
            read_weights(path)
    assert issubclass(WeightsError, ValueError)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(path, filled(1), {})
    before = path.read_bytes()

    def dies_half_way(handle: int) -> None:
        raise OSError("no space left on device")

    def dies_at_the_end(source: Path, target: Path) -> None:
        raise OSError("power cut")

    for name, broken in (("fsync", dies_half_way), ("replace", dies_at_the_end)):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(os, name, broken)
            save_weights(path, filled(2), {})
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["net.safetensors"]


def test_the_bytes_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    save_weights(tmp_path / "net.safetensors", filled(1), {})
    assert calls == ["fsync", "replace"]


def test_loads_into_the_precision_of_the_module() -> None:
    net = network()
    load_into(net, {name: t.half() for name, t in filled(0.5).items()})
    assert all(p.dtype == torch.float32 and (p == 0.5).all() for p in net.parameters())
    half = network().half()
    load_into(half, filled(0.25))
    assert all(p.dtype == torch.float16 and (p == 0.25).all() for p in half.parameters())


def test_a_module_on_meta_takes_the_tensors_themselves() -> None:
    with torch.device("meta"):
        net = network()
    tensors = filled(3)
    load_into(net, tensors)
    assert net[0].weight.data_ptr() == tensors["0.weight"].data_ptr()
    assert isinstance(net[0].weight, nn.Parameter) and net[0].weight.requires_grad


def test_strict_both_ways_and_leaves_the_module_alone() -> None:
    net = network()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    tensors = filled(1)
    del tensors["2.bias"]
    tensors["3.weight"] = torch.zeros(7)
    tensors["0.weight"] = torch.zeros(3, 5)
    with pytest.raises(WeightsError) as error:
        load_into(net, tensors, source="some.safetensors")
    lines = str(error.value).splitlines()
    assert lines[0] == "some.safetensors does not fit Sequential (1 missing, 1 extra, 1 misshapen):"
    assert [line.strip() for line in lines[1:]] == [
        "missing 2.bias (2,)",
        "extra 3.weight (7,)",
        "misshapen 0.weight: expected (5, 3), found (3, 5)",
    ]
    assert all(torch.equal(net.state_dict()[name], t) for name, t in before.items())


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_each_mismatch_alone_is_an_error(change: str) -> None:
    tensors = filled(1)
    if change == "missing":
        del tensors["2.bias"]
    elif change == "extra":
        tensors["9.bias"] = torch.zeros(1)
    else:
        tensors["2.bias"] = torch.zeros(1)  # would broadcast
    with pytest.raises(WeightsError, match=change):
        load_into(network(), tensors)


def test_long_lists_are_cut_with_a_count() -> None:
    tensors = {**filled(1), **{f"other.{i}": torch.zeros(1) for i in range(25)}}
    with pytest.raises(WeightsError) as error:
        load_into(network(), tensors)
    lines = str(error.value).splitlines()
    assert len(lines) == 12 and lines[-1].strip() == "... and 15 more extra"


def test_nothing_matched_is_its_own_error() -> None:
    with pytest.raises(
        WeightsError, match=r"no tensor of a\.bin matches Sequential: it has conv\.weight, expected 0\.weight"
    ):
        load_into(network(), {"conv.weight": torch.zeros(1)}, source="a.bin")
    with pytest.raises(WeightsError, match="no tensors at all"):
        load_into(network(), {})


def test_renaming() -> None:
    table = [(r"^first\.", "0."), (r"^second\.", "2."), (r"\.position_ids$", ""), (r"^2$", "")]
    theirs = {name.replace("0.", "first.").replace("2.", "second."): t for name, t in filled(4).items()}
    assert set(new_names(theirs, table).values()) == network().state_dict().keys()
    net = network()
    load_into(net, {**theirs, "second.position_ids": torch.zeros(1)}, table)
    assert all((p == 4).all() for p in net.parameters())
    with pytest.raises(WeightsError, match=r"extra third\.bias \(3,\)"):
        load_into(net, {**theirs, "third.bias": torch.zeros(3)}, table)
    with pytest.raises(WeightsError, match=r"a1 and a2 would both be renamed a"):
        new_names(["a1", "a2"], [(r"\d", "")])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named_and_not_loaded(value: float) -> None:
    net, tensors = network(), filled(1.0)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    tensors["2.weight"][1, 2] = value
    for kind in (torch.float32, torch.float16, torch.float8_e5m2):
        with pytest.raises(WeightsError, match=r"not finite 2\.weight"):
            load_into(net, tensors | {"2.weight": tensors["2.weight"].to(kind)})
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


# --- files that lie, or run ---------------------------------------------------------------------------------
class Runs(nn.Module):
    """Opened by `torch.jit.load`, it writes a file."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.training = state[1]
        self.weight = torch.from_file("it-ran", True, 4).fill_(1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inner", [False, True])
def test_a_program_in_a_torchscript_archive_does_not_run(
    inner: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 3), Runs()) if inner else Runs()), "evil.pt")
    with pytest.raises(WeightsError, match=r"may run code .* was not opened: it uses __setstate__; use the"):
        read_weights("evil.pt")
    (tmp_path / "mobile.pt").write_bytes(b"PK\3\4PTMF" + Path("evil.pt").read_bytes()[8:])
    with pytest.raises(WeightsError, match=r"may run code|truncated or not a torch file"):
        read_weights("mobile.pt")
    assert not Path("it-ran").exists()
    torch.jit.load("evil.pt")
    assert Path("it-ran").exists()  # the trap is in the file


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(1, 3))])
def test_the_tensors_of_a_torchscript_archive_are_read(make: Callable, tmp_path: Path) -> None:
    """As OpenAI published CLIP."""
    net = network().half()
    net.register_buffer("input_resolution", torch.tensor(224))
    torch.jit.save(make(net.float()).half(), tmp_path / "ViT.pt")
    found = read_weights(tmp_path / "ViT.pt")
    assert found.keys() == net.state_dict().keys() and found["0.weight"].dtype == torch.float16
    assert all(torch.equal(found[name], t.half()) for name, t in net.state_dict().items())


@pytest.mark.parametrize("name", ["a.safetensors", "A.SAFETENSORS", "a.ckpt", "A.CKPT"])
@pytest.mark.parametrize("old", [False, True])
def test_a_torch_file_is_known_by_its_first_bytes(name: str, old: bool, tmp_path: Path) -> None:
    torch.save(filled(1), tmp_path / name, _use_new_zipfile_serialization=not old)
    assert read_weights(tmp_path / name).keys() == filled(1).keys()
    torch.save({"a": Path()}, tmp_path / name, _use_new_zipfile_serialization=not old)
    with pytest.raises(WeightsError, match="may run code when it is opened, so it was not opened: it uses"):
        read_weights(tmp_path / name)


def test_what_stands_beside_the_weights_in_a_torch_file_is_named(tmp_path: Path) -> None:
    torch.save({"model_ema": filled(2), "state_dict": filled(1), "schema": {}}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"averaged weights \('model_ema'\) are ignored") as told:
        assert read_weights(tmp_path / "a.pt")["0.weight"].unique().tolist() == [1]
    assert len(told) == 1
    torch.save({**filled(1), 3: torch.zeros(1)}, tmp_path / "a.pt")
    assert "3" in read_weights(tmp_path / "a.pt")  # no part of a network has this name, so it is refused


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_type_that_cannot_be_converted_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net.{suffix}"
    four = torch.zeros(2, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    whole = {"a": torch.zeros(2, dtype=torch.float8_e5m2), "b": four}
    (torch.save if suffix == "pt" else save_file)(whole, path)
    with pytest.raises(WeightsError, match=r"holds 'b' in torch.float4_e2m1fn_x2, which cannot be converted"):
        read_weights(path)


PARTS = {"one.safetensors": ["a", "b"], "two.safetensors": ["a", "c"]}


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ({"a": "one", "b": "one", "c": "two"}, "two.safetensors has 'a', but .*all.json does not say so"),
        ({"a": "two", "b": "one", "c": "two"}, "one.safetensors has 'a', but .*all.json does not say so"),
        ({"a": "two", "b": "two"}, "lists 1 tensors that its files do not have, such as 'b' in two.safe"),
        ({"b": "one"}, "one.safetensors has 'a', but .*all.json does not say so"),
    ],
)
def test_an_index_that_does_not_say_where_each_tensor_is(where: dict, told: str, tmp_path: Path) -> None:
    for part, names in PARTS.items():
        save_file({name: torch.zeros(1) for name in names}, tmp_path / part)
    about = {"weight_map": {name: f"{part}.safetensors" for name, part in where.items()}}
    (tmp_path / "all.json").write_text(json.dumps(about))
    with pytest.raises(WeightsError, match=told):
        read_weights(tmp_path / "all.json")


def test_the_parts_of_a_distributed_training_are_read(tmp_path: Path) -> None:
    where = {"module._orig_mod.a": "one.safetensors", "module._orig_mod.b": "two.safetensors"}
    for name, part in where.items():
        save_file({name: torch.zeros(1)}, tmp_path / part)
    (tmp_path / "all.json").write_text(json.dumps({"weight_map": where}))
    assert sorted(read_weights(tmp_path / "all.json")) == ["a", "b"]


def test_a_key_that_a_published_json_repeats_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"act_fn": "silu", "act_fn": "relu"}')
    with pytest.raises(WeightsError, match=r"config.json is not JSON: the key 'act_fn' appears twice"):
        read_json(tmp_path / "config.json")
