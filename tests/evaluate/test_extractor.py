"""Feature extractors from outside: what goes in, what comes out, and what is said when one cannot be had."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as functional
from evaluate_networks import save_inception
from torch import Tensor, nn

from pipeline.errors import ConfigError, InputError
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.features import ExtractorConfig
from pipeline.features.networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Extractor,
    load_extractor,
    load_state_dict,
    with_features,
)


class Net(nn.Module):
    """Features: the mean over places of three filtered channels; logits: a linear layer on them."""

    def __init__(self, both: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.head = nn.Linear(5, 4)
        self.both = both

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(x)
        return features, self.head(features.mean(dim=(2, 3)))


def images(n: int = 3, h: int = 12, w: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net]:
    torch.manual_seed(0)
    net = Net().eval()
    path = tmp_path_factory.mktemp("script") / "net.pt"
    torch.jit.script(net).save(str(path))
    return path, net


def loaded(**config: Any) -> Extractor:
    extractor = load_extractor(ExtractorConfig(**config))
    assert extractor is not None
    return extractor


def test_a_torchscript_file_gives_what_its_module_gives(script: tuple[Path, Net]) -> None:
    path, net = script
    extractor = loaded(kind="torchscript", path=str(path))
    features, probabilities = extractor(images())
    x = torch.from_numpy(images()).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    with torch.no_grad():
        maps, logits = net(x)
    np.testing.assert_allclose(features, maps.mean(dim=(2, 3)).numpy(), rtol=1e-5, atol=1e-6)
    assert probabilities is not None
    np.testing.assert_allclose(probabilities, logits.softmax(1).numpy(), rtol=1e-5, atol=1e-6)
    assert extractor.contract["extractor_sha256"] == extractor.digest
    assert extractor.contract["extractor_resize"] == "none"


@pytest.mark.parametrize(
    ("values", "low", "high"), [("minus_one_one", -1.0, 1.0), ("zero_one", 0.0, 1.0), ("uint8", 0, 255)]
)
def test_values_and_sizes_go_in_as_configured(tmp_path: Path, values: str, low: float, high: float) -> None:
    class Told(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            whole = x.float().flatten(1)
            return torch.stack([whole.min(1)[0], whole.max(1)[0], torch.full((len(x),), float(x.shape[2]))], 1)

    torch.jit.script(Told()).save(str(tmp_path / "told.pt"))
    extractor = loaded(kind="torchscript", path=str(tmp_path / "told.pt"), values=values, resolution=8)
    black_and_white = np.stack([np.zeros((12, 12, 3), np.uint8), np.full((12, 12, 3), 255, np.uint8)])
    features, probabilities = extractor(black_and_white)
    assert probabilities is None
    np.testing.assert_allclose(features[:, 0], [low, high], atol=1e-6)
    np.testing.assert_allclose(features[:, 2], 8)


def test_features_are_what_the_last_linear_layer_reads() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    x = torch.randn(5, 3, 2, 2)
    with torch.no_grad():
        features, logits = with_features(net)(x)
        assert logits is not None
        assert torch.equal(features, functional.relu(net[1](x.flatten(1))))
        assert torch.equal(logits, net[3](features))
        plain = nn.Conv2d(3, 4, 1)
        alone, none = with_features(plain)(x)
    assert none is None
    assert alone.shape == (5, 4, 2, 2)


def test_a_network_without_its_head_gives_its_own_vector_and_no_classes() -> None:
    class Blocks(nn.Module):
        """Tokens through a block, pooled; an inner layer even reads vectors of the same shape."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.mlp, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2)
            weighed = tokens * self.gate(tokens.mean(1)).sigmoid()[:, None]
            out: Tensor = self.head(self.mlp(weighed).mean(1))
            return out

    class Gated(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).mean(1)
            return tokens * self.gate(tokens).sigmoid()

    torch.manual_seed(0)
    x = torch.randn(5, 3, 2, 3)
    for net in (Blocks().eval(), Gated().eval()):
        with torch.no_grad():
            features, logits = with_features(net)(x)
            assert torch.equal(features, net(x))
        assert logits is None
        assert features.shape == (5, 6)


def test_a_network_that_can_be_asked_for_features_is_asked_for_them(tmp_path: Path) -> None:
    network = save_inception(tmp_path / "inception.pt")
    extractor = loaded(kind="torchscript", path=str(tmp_path / "inception.pt"), values="uint8")
    features, probabilities = extractor(images(3, 40, 48))
    assert probabilities is None
    with torch.no_grad():
        expected = network(torch.from_numpy(images(3, 40, 48)).permute(0, 3, 1, 2), return_features=True)
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-5, atol=1e-6)
    assert not extractor.published


@pytest.mark.parametrize("traced", [False, True])
def test_a_softmax_is_no_feature(tmp_path: Path, traced: bool) -> None:
    class Classes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float().mean(dim=(2, 3)).softmax(dim=1)

    network = torch.jit.trace(Classes(), torch.zeros(1, 3, 8, 8)) if traced else torch.jit.script(Classes())
    network.save(str(tmp_path / "classes.pt"))
    with pytest.raises(InputError, match=r"class probabilities where features are asked for: 3 numbers"):
        loaded(kind="torchscript", path=str(tmp_path / "classes.pt"))(images())


def test_rows_that_sum_to_one_now_and_then_are_features(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shares = x.float().mean(dim=(2, 3)).softmax(dim=1)
            return shares * torch.arange(1, len(x) + 1).unsqueeze(1)

    torch.jit.script(Scaled()).save(str(tmp_path / "scaled.pt"))
    features, _ = loaded(kind="torchscript", path=str(tmp_path / "scaled.pt"))(images())
    np.testing.assert_allclose(features.sum(axis=1), [1, 2, 3], rtol=1e-5)


def test_the_published_inception_is_known_by_its_hash_and_asked_as_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_inception(tmp_path / "inception.pt")
    digest = hashlib.sha256((tmp_path / "inception.pt").read_bytes()).hexdigest()
    monkeypatch.setattr("pipeline.features.networks.INCEPTION_SHA256", digest)
    asked = {"kind": "torchscript", "path": str(tmp_path / "inception.pt")}
    assert loaded(**asked, values="uint8").published
    assert not loaded(**asked, values="uint8", resolution=299).published
    with pytest.raises(ConfigError, match=r"scales pixel values itself[\s\S]*extractor.values = imagenet"):
        loaded(**asked)


def test_a_network_that_gives_no_vectors_is_refused(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2)

    torch.jit.script(Tokens()).save(str(tmp_path / "tokens.pt"))
    with pytest.raises(ConfigError, match=r"gives no vector for an image[\s\S]*\[3, 3, 120\]"):
        loaded(kind="torchscript", path=str(tmp_path / "tokens.pt"))(images())


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("inception_v3", "imagenet", {"init_weights": False, "transform_input": True}),
        ("googlenet", "imagenet", {"init_weights": False, "transform_input": True}),
        ("googlenet", "minus_one_one", {"init_weights": False, "transform_input": False}),
        ("resnet18", "imagenet", {}),
    ],
)
def test_two_torchvision_networks_bring_values_into_their_own_range(
    name: str, values: Any, told: dict[str, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[dict[str, Any]] = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))

    def get_model(name: str, weights: None, **options: Any) -> nn.Module:
        made.append(options)
        return net

    library = SimpleNamespace(list_models=lambda module: [name], get_model=get_model)
    monkeypatch.setattr(importlib, "import_module", lambda _: library)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "n.safetensors")
    loaded(kind="torchvision", name=name, values=values, weights=str(tmp_path / "n.safetensors"))
    assert made == [told]


def test_a_file_that_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"no archive")
    for path in ("a.pt", "none.pt"):
        with pytest.raises(InputError, match="TorchScript file cannot be loaded"):
            load_extractor(ExtractorConfig(kind="torchscript", path=str(tmp_path / path)))


def test_the_classifier_is_no_extractor_from_outside() -> None:
    assert load_extractor(ExtractorConfig()) is None


@pytest.mark.parametrize("kind", ["torchvision", "timm"])
def test_a_package_that_is_not_there_is_named_with_the_extra_that_brings_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == kind:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=rf"The package {kind} is not there[\s\S]*latentloom\[evaluate\]"):
        load_extractor(ExtractorConfig(kind=kind, name="resnet18"))


def test_torchvision_networks_by_name(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.get_model("resnet18", weights=None).eval()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "r.safetensors")
    extractor = loaded(kind="torchvision", name="resnet18", weights=str(tmp_path / "r.safetensors"), resolution=32)
    features, probabilities = extractor(images(2, 32, 32))
    assert features.shape == (2, 512)
    assert probabilities is not None
    assert probabilities.shape == (2, 1000)
    with pytest.raises(ConfigError, match="knows no network of this name"):
        load_extractor(ExtractorConfig(kind="torchvision", name="resnet19"))
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="not those of torchvision resnet18"):
        loaded(kind="torchvision", name="resnet18", weights=str(tmp_path / "b.safetensors"))


def test_timm_networks_by_name(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "r.pth")
    extractor = loaded(kind="timm", name="resnet10t", weights=str(tmp_path / "r.pth"), resolution=64)
    features, probabilities = extractor(images(2, 64, 64))
    assert features.shape == (2, model.num_features)
    assert probabilities is not None
    with pytest.raises(ConfigError, match="knows no network of this name"):
        load_extractor(ExtractorConfig(kind="timm", name="resnet19"))


def test_weights_run_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    for name in ("evil.pth", "list.pth", "torn.safetensors", "none.pth"):
        with pytest.raises(InputError, match=r"cannot be read[\s\S]*extractor\.weights"):
            load_state_dict(str(tmp_path / name), "extractor.weights")
    assert not (tmp_path / "ran").exists()
    assert torch.equal(load_state_dict(str(tmp_path / "good.pth"), "x")["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "torchscript"}, r"needs extractor\.path"),
        ({"kind": "timm"}, r"kind=timm needs extractor\.name"),
        ({"kind": "torchvision"}, r"kind=torchvision needs extractor\.name"),
    ],
)
def test_an_extractor_says_which(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractorConfig(**config)


def fid_config(**changes: Any) -> EvaluateJobConfig:
    values: dict[str, Any] = {
        "reference": {"kind": "folder", "uri": "real", "name": "r"},
        "image": {"resolution": 32},
        "output": {"uri": "/report"},
        "samples": {"uri": "samples"},
        "fid": "published",
        **changes,
    }
    return EvaluateJobConfig.model_validate(values, strict=False)


def test_the_published_fid_is_a_preset_of_the_extractor() -> None:
    config = fid_config(extractor={"path": "inception.pt"})
    extractor = config.extractor
    assert (extractor.kind, extractor.resolution, extractor.values) == ("torchscript", None, "uint8")
    assert EvaluateJobConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"fid=published needs extractor\.path: inception-2015-12-05\.pt .* cannot be called FID"),
        ({"extractor": {"path": "i.pt", "resolution": 299}}, r"takes extractor\.resolution=null, got 299"),
        ({"extractor": {"path": "i.pt", "values": "imagenet"}}, r"takes extractor\.values=uint8, got imagenet"),
        (
            {"extractor": {"kind": "torchvision", "name": "inception_v3", "path": "i.pt"}},
            r"takes extractor\.kind=torchscript, got torchvision",
        ),
    ],
)
def test_a_published_fid_is_not_taken_in_another_way(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fid_config(**changes)
