"""A backbone is known again in another precision, and only then; one that was packaged is found in the user's cache."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from seam.modeling_seam import SeamForSpeechRecognition
from seam.modeling_seam import weights as module
from seam.modeling_seam.weights import (
    BACKBONE_RECORD,
    WeightSamples,
    backbone_record,
    packaged_folder,
    weight_files,
    weights_record,
)
from seam.publishing.export import export
from seam.tests.helpers.hub_cache import add_to_cache

pytestmark = pytest.mark.oldest

Weights = dict[str, torch.Tensor]
SHAPES = {"embed": (97, 64), "one": (32, 32, 3), "two": (64, 96), "three": (1, 32), "norm": (64,), "bias": (1,)}
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def original() -> Weights:
    """Weights of 36 tensors, as different in size as a model's."""
    torch.manual_seed(0)
    return {f"{i}.{name}": torch.randn(shape) * 0.3**i for i in range(6) for name, shape in SHAPES.items()}


@pytest.fixture
def samples(tmp_path) -> Callable[..., WeightSamples]:
    def samples(weights: Weights, **options) -> WeightSamples:
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return WeightSamples.read(weight_files(tmp_path), **options)

    return samples


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: weight.to(dtype) for name, weight in weights.items()}


def trained_on(weights: Weights, by: float, names: str = "") -> Weights:
    """Return weights that were moved by a share of their spread; `names` is in the names of those that were."""
    torch.manual_seed(1)
    moved = {}
    for name, weight in weights.items():
        moved[name] = weight + by * weight.std(correction=0) * torch.randn(weight.shape) * (names in name)
    return moved


def in_four_bits(weights: Weights) -> tuple[Weights, Weights]:
    """Round each block of 16 to 16 values between its least and greatest; returns how far, too. Vectors stay."""
    rounded, half_steps = {}, {}
    for name, weight in weights.items():
        if weight.ndim != 2:
            rounded[name], half_steps[name] = weight.half(), torch.zeros(weight.shape)
            continue
        blocks = weight.reshape(-1, 16)
        least = blocks.amin(-1, keepdim=True).half().float()
        step = ((blocks.amax(-1, keepdim=True) - least) / 15).half().float()
        rounded[name] = (
            (least + step * ((blocks - least) / step.clamp(min=1e-9)).round().clamp(0, 15)).reshape(weight.shape).half()
        )
        half_steps[name] = (step / 2 + blocks.abs().amax(-1, keepdim=True) / 1024).expand(-1, 16).reshape(weight.shape)
    return rounded, half_steps


# ---- samples ----


@pytest.mark.parametrize("trained", PRECISIONS)
@pytest.mark.parametrize("found", PRECISIONS)
def test_the_same_weights_in_any_two_precisions(original, samples, trained, found):
    one, other = (samples(cast(original, dtype)) for dtype in (trained, found))
    assert one.agree(other) and other.agree(one)
    assert (one.precision, other.precision) == (str(trained)[6:], str(found)[6:])
    assert 1000 < len(one.values) <= 2000


@pytest.mark.parametrize("found", PRECISIONS)
@pytest.mark.parametrize("by", [1e-3, 0.1])
def test_weights_that_were_trained_further_are_others(original, samples, found, by):
    one = samples(cast(original, torch.float16))
    assert not one.agree(samples(cast(trained_on(original, by), found)))
    assert not one.agree(samples(cast(trained_on(original, by, "two"), found)))  # some of them


def test_other_weights_names_and_shapes_are_others(original, samples):
    one = samples(original)
    torch.manual_seed(5)
    others = [
        {name: torch.randn(weight.shape) * weight.std(correction=0) for name, weight in original.items()},
        {name: weight * 1.01 for name, weight in original.items()},
        {name: torch.full_like(weight, float("nan")) for name, weight in original.items()},
        {name.replace("two", "2"): weight for name, weight in original.items()},
        {name: weight.reshape(-1) for name, weight in original.items()},
        original | {"more": torch.zeros(1)},
        {name: weight for name, weight in original.items() if name != "3.two"},
    ]
    assert [one.agree(samples(cast(other, torch.float16))) for other in others] == [False] * len(others)


def test_four_bits(original, samples):
    rounded, steps = in_four_bits(original)
    four = samples(rounded, precision="Q4_1", half_steps=lambda name, _: steps[name])
    assert four.precision == "Q4_1"
    for dtype in PRECISIONS:
        found = samples(cast(original, dtype))
        assert four.agree(found) and found.agree(four)
        assert not four.agree(samples(cast(trained_on(original, 0.1), dtype)))
    assert not samples(rounded).agree(samples(original))  # unless it is said that they were rounded


def test_a_copy_of_the_table_may_be_stored_or_not(original, samples):
    without = samples(original)
    head = {"lm_head.weight": original["0.embed"].clone()}
    assert without.agree(samples(cast(original | head, torch.bfloat16)))
    assert not without.agree(samples(original | {"lm_head.weight": original["0.embed"] + 1}))
    assert not without.agree(samples(original | {"head.weight": original["0.embed"].clone()}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_a_step_is_what_rounding_moves(dtype):
    """Down to the numbers near zero, whose steps are all the same."""
    torch.manual_seed(0)
    numbers = torch.finfo(dtype)
    smallest = torch.tensor(numbers.smallest_normal * numbers.eps, dtype=torch.float64).log2()
    largest = torch.tensor(numbers.max / 2, dtype=torch.float64).log2()
    values = torch.randn(4000).sign() * 2 ** (smallest + (largest - smallest) * torch.rand(4000, dtype=torch.float64))
    stored = values.to(dtype)
    moved, half = (stored.double() - values).abs(), module._half_ulp(stored)
    assert (moved <= half).all() and (moved > 0.9 * half).sum() > 100
    assert torch.equal(module._half_ulp(torch.tensor([3, 4])), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(("n", "count"), [(0, 5), (1, 5), (7, 7), (64 * 64, 8), (10**9, 8)])
def test_positions_are_spread(n, count):
    positions = module._positions(n, count)
    assert positions == sorted(set(positions)) and all(0 <= one < n for one in positions)
    assert len(positions) == count if n > 10 * count else len(positions) <= n
    if n == 64 * 64:
        assert len({one % 64 for one in positions}) == count  # no column twice
        assert max(after - before for before, after in zip(positions, positions[1:], strict=False)) < n / 3


def test_samples_go_through_a_config(original, samples):
    one = samples(cast(original, torch.bfloat16))
    record = json.loads(json.dumps({"id": "a/b", "fingerprint": "f", "samples": one.to_dict()}))
    again = WeightSamples.of(record)
    assert again.agree(one) and (again.layout, again.precision) == (one.layout, one.precision)
    assert (again.values == one.values).all()
    assert WeightSamples.of({"id": "a/b", "fingerprint": "f"}) is None  # from before there were any


@pytest.mark.parametrize(
    "damage",
    [
        {"values": "AAAA"},
        {"values": "!"},
        {"values": ""},
        {"values": None},
        {"half_steps": "AAAAAAAAAAA="},
        {"layout": ...},
        [],
    ],
)
def test_damaged_samples_are_named(original, samples, damage):
    content = samples(original).to_dict()
    if isinstance(damage, dict):
        content = {name: value for name, value in (content | damage).items() if value is not ...}
    with pytest.raises(ValueError, match="samples of a/b in config.backbones are damaged"):
        WeightSamples.of({"id": "a/b", "fingerprint": "f", "samples": content if damage else damage})


# ---- light checkpoints ----

COMMITS = {"whisper": "a" * 40, "llm": "b" * 40}


@pytest.fixture
def caches(tmp_path, monkeypatch) -> dict[str, Path]:
    """Return the user's cache and the Hub's, both empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return {"user": tmp_path / "user", "hub": tmp_path / "hub"}


@pytest.fixture
def package(backbones, caches) -> Callable[..., list[str]]:
    """Return a function that lays both backbones down as `seam backbones` does, in half precision."""

    def package(owner: str = "owner") -> list[str]:
        folders = []
        for name, source in zip(COMMITS, backbones, strict=True):
            folder = packaged_folder(f"{owner}/{name}")
            shutil.copytree(source, folder)
            rewrite(folder, lambda weights: cast(weights, torch.float16))
            record = {"id": f"{owner}/{name}", **weights_record(weight_files(folder))}
            (folder / BACKBONE_RECORD).write_text(json.dumps(record))
            folders.append(str(folder))
        return folders

    return package


@pytest.fixture
def on_hub(backbones, caches) -> Callable[[], None]:
    """Return a function that puts both backbones, in full precision, into the Hub's cache."""

    def on_hub() -> None:
        for (name, commit), folder in zip(COMMITS.items(), backbones, strict=True):
            add_to_cache(caches["hub"], f"owner/{name}", Path(folder), commit)

    return on_hub


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved_light(processor, tmp_path) -> Callable[..., tuple[SeamForSpeechRecognition, Path]]:
    """Return a function that builds a model around backbones, and saves it light."""

    def saved_light(names, **config) -> tuple[SeamForSpeechRecognition, Path]:
        torch.manual_seed(1)
        model = SeamForSpeechRecognition.from_backbones(*names, processor, **{"lora_rank": 4, **config}).eval()
        model.save_pretrained(tmp_path / "light", light=True)
        return model, tmp_path / "light"

    return saved_light


@pytest.fixture
def logits(processor, waveforms):
    inputs = processor(audio=waveforms[:2], text=["one two three", "stop"])

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    return logits


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """Return what is said at the level that a user sees."""
    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    return said


def load(folder: Path, **options) -> SeamForSpeechRecognition:
    return SeamForSpeechRecognition.from_pretrained(folder, **options)


def test_a_packaged_backbone_has_a_record_without_commit(package, saved_light, logits, warnings):
    folders = package()
    record = backbone_record(folders[0])
    assert record["id"] == "owner/whisper" and record.keys() == {"id", "fingerprint", "samples"}
    model, light = saved_light(folders)
    config = json.loads((light / "config.json").read_text())
    assert {role: one["id"] for role, one in config["backbones"].items()} == {
        "encoder": "owner/whisper",
        "llm": "owner/llm",
    }
    assert str(Path(folders[0]).parent) not in (light / "config.json").read_text()
    again = load(light)
    assert torch.equal(logits(again), logits(model)) and not warnings
    assert again.config.backbones == model.config.backbones


def test_the_hubs_precision_instead_of_the_packaged_one(package, on_hub, saved_light, logits, caches, warnings):
    model, light = saved_light(package())
    shutil.rmtree(caches["user"])
    with pytest.raises(OSError, match="encoder owner/whisper is not to be had.*Run `seam backbones`, connect"):
        load(light)
    on_hub()
    again = load(light)  # of any commit, since its weights agree
    torch.testing.assert_close(logits(again), logits(model), rtol=0.01, atol=0.05)
    assert not torch.equal(logits(again), logits(model))
    assert [line.split(":")[0] for line in warnings] == [
        f"the {role} owner/{name} is here in float32, and the checkpoint was trained with it in float16"
        for role, name in (("encoder", "whisper"), ("llm", "llm"))
    ]


def test_the_packaged_precision_instead_of_the_hubs(package, on_hub, saved_light, logits, caches, warnings):
    on_hub()
    model, light = saved_light(["owner/whisper", "owner/llm"])
    package()
    assert torch.equal(logits(load(light)), logits(model)) and not warnings  # the commit that it was trained with first
    shutil.rmtree(caches["hub"])
    torch.testing.assert_close(logits(load(light)), logits(model), rtol=0.01, atol=0.05)
    assert len(warnings) == 2 and "trained with it in float32" in warnings[0]


def test_what_is_said_reaches_the_user(package, on_hub, saved_light, caches, caplog):
    _, light = saved_light(package())
    shutil.rmtree(caches["user"])
    on_hub()
    root = logging.getLogger("seam")
    root.addHandler(caplog.handler)
    try:
        load(light)
    finally:
        root.removeHandler(caplog.handler)
    assert "the same weights" in caplog.text


def test_a_packaged_backbone_of_the_same_name_but_another_owner_is_not_taken(package, saved_light, caches):
    _, light = saved_light(package())
    shutil.rmtree(caches["user"])
    package("other")
    with pytest.raises(OSError, match="owner/whisper is not to be had"):
        load(light)


@pytest.mark.parametrize("role", ["encoder", "llm"])
def test_a_named_folder_in_another_precision_but_not_trained_further(package, backbones, saved_light, tmp_path, role):
    _, light = saved_light(package())
    load(light, encoder=backbones[0], llm=backbones[1])
    folder = tmp_path / "other"
    shutil.copytree(backbones[("encoder", "llm").index(role)], folder)
    rewrite(folder, lambda weights: cast(weights, torch.bfloat16))
    load(light, **{role: str(folder)})
    rewrite(folder, lambda weights: trained_on(weights, 0.02))
    with pytest.raises(ValueError, match=f"other are not those of the {role} .*trained with .owner/"):
        load(light, **{role: str(folder)})


@pytest.mark.parametrize("role", ["encoder", "llm"])
def test_in_the_same_precision_every_byte_counts(package, saved_light, tmp_path, role):
    folders = package()
    _, light = saved_light(folders)
    folder = tmp_path / "other"
    shutil.copytree(folders[("encoder", "llm").index(role)], folder)
    load(light, **{role: str(folder)})

    def one_bit(weights: Weights) -> Weights:
        weights[sorted(weights)[0]].view(torch.uint8).flatten()[6] ^= 1
        return weights

    rewrite(folder, one_bit)
    with pytest.raises(ValueError, match=f"other are not those of the {role} .*trained with .owner/"):
        load(light, **{role: str(folder)})


def test_a_record_without_samples_asks_for_the_very_weights(on_hub, saved_light, backbones, logits, tmp_path):
    """As records were before."""
    on_hub()
    model, light = saved_light(["owner/whisper", "owner/llm"])
    config = json.loads((light / "config.json").read_text())
    for record in config["backbones"].values():
        del record["samples"]
    (light / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(light)), logits(model))
    shutil.copytree(backbones[0], tmp_path / "half")
    rewrite(tmp_path / "half", lambda weights: cast(weights, torch.float16))
    with pytest.raises(ValueError, match="half are not those of the encoder"):
        load(light, encoder=str(tmp_path / "half"))
    del config["backbones"]["encoder"]["revision"]
    (light / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names a Hub id .owner/name. and a commit"):
        load(light)


def test_a_packaged_folder_that_was_trained_on_is_a_folder_like_any(package):
    folder = Path(package()[0])
    rewrite(folder, lambda weights: trained_on(weights, 0.1))
    assert backbone_record(folder) is None
    for content in ("", "[]", "{}", '{"id": "owner/whisper"}'):
        (folder / BACKBONE_RECORD).write_text(content)
        assert backbone_record(folder) is None


def test_four_bits_in_a_packaged_folder(package, on_hub, saved_light, logits, caches, warnings):
    """It says itself how far its weights were rounded: the float weights of the Hub are known by that, and back."""
    folders = [Path(folder) for folder in package()]
    llm = load_file(folders[1] / "model.safetensors")
    rounded, steps = in_four_bits({name: weight.float() for name, weight in llm.items()})
    rewrite(folders[1], lambda _: rounded)
    record = weights_record(weight_files(folders[1]), precision="Q4_1", half_steps=lambda name, _: steps[name])
    (folders[1] / BACKBONE_RECORD).write_text(json.dumps({"id": "owner/llm", **record}))
    model, light = saved_light(folders)
    assert torch.equal(logits(load(light)), logits(model)) and not warnings
    shutil.move(caches["user"], caches["user"].with_name("aside"))
    on_hub()
    load(light)
    assert "is here in float32, and the checkpoint was trained with it in Q4_1" in warnings[1]
    shutil.rmtree(light)
    _, light = saved_light(["owner/whisper", "owner/llm"])
    shutil.rmtree(caches["hub"])
    shutil.move(caches["user"].with_name("aside"), caches["user"])
    load(light)
    assert "is here in Q4_1, and the checkpoint was trained with it in float32" in warnings[3]


def test_stage_1_alone_finds_its_packaged_llm(package, saved_light):
    _, light = saved_light(package(), alignment_only=True)
    assert not load(light).add_llm().config.alignment_only


def test_a_checkpoint_is_exported_light_with_packaged_backbones(package, saved_light, processor, logits, tmp_path):
    model, _ = saved_light(package())
    model.config.backbones = None  # as one that was trained from folders
    model.save_pretrained(tmp_path / "full")
    processor.save_pretrained(tmp_path / "full")
    encoder, llm = (str(packaged_folder(f"owner/{name}")) for name in COMMITS)
    folder = export(str(tmp_path / "full"), tmp_path / "exported", light=True, encoder=encoder, llm=llm)
    assert torch.equal(logits(load(folder)), logits(model))
