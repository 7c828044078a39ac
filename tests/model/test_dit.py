"""The reference DiT: identity at the start, shapes, conditioning, masks, positions, and that it learns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.model.dit import DiT, _patchify, _rotate, _unpatchify, rope_2d, sincos_2d, time_features


def a_dit(**changes: object) -> DiT:
    torch.manual_seed(0)
    arguments: dict[str, object] = {"latent_channels": 3, "hidden": 32, "depth": 2, "heads": 2} | changes
    return DiT(**arguments)  # type: ignore[arg-type]


def stirred(model: DiT) -> DiT:
    """The same model with nothing left at zero: every path carries signal."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_fresh_model_is_zero_and_its_blocks_are_the_identity() -> None:
    model = a_dit(num_classes=4, text_dim=6)
    x, t = noise(2, 3, 4, 6), torch.tensor([0.2, 0.9])
    assert torch.equal(model(x, t, torch.tensor([0, 4]), noise(2, 5, 6)), torch.zeros(2, 3, 4, 6))
    tokens, condition = noise(2, 6, 32), noise(2, 32)
    assert torch.equal(model.blocks[0](tokens, condition, None, noise(2, 5, 32), None), tokens)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 4]))
def test_patches_go_back_where_they_came_from(rows: int, columns: int, patch: int) -> None:
    x = noise(2, 3, rows * patch, columns * patch)
    tokens = _patchify(x, patch)
    assert tokens.shape == (2, rows * columns, 3 * patch * patch)
    assert torch.equal(tokens[:, -1].reshape(2, 3, patch, patch), x[:, :, -patch:, -patch:])
    assert torch.equal(_unpatchify(tokens, rows, columns, patch), x)


@pytest.mark.parametrize("position", ["rope", "sincos"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 10), (12, 2)])
def test_one_model_takes_every_size(position: str, height: int, width: int) -> None:
    model = stirred(a_dit(position=position))
    x = noise(2, 3, height, width)
    t = torch.tensor([0.3, 0.6])
    out = model(x, t)
    assert out.shape == x.shape
    # Positions matter: without them, swapping two patches would only swap the answers of the two.
    first, last = (..., slice(2), slice(2)), (..., slice(-2, None), slice(-2, None))
    swapped, expected = x.clone(), out.clone()
    swapped[first], swapped[last] = x[last], x[first]
    expected[first], expected[last] = out[last], out[first]
    assert not torch.allclose(model(swapped, t), expected, atol=1e-3)


def test_a_size_that_is_no_whole_number_of_patches_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.patch = 2[\s\S]*height and width, 5x4"):
        a_dit()(noise(1, 3, 5, 4), torch.rand(1))


def test_time_label_and_text_each_change_the_answer() -> None:
    model = stirred(a_dit(num_classes=4, text_dim=6))
    x, text = noise(1, 3, 4, 4), noise(1, 5, 6)
    base = model(x, torch.tensor([0.3]), torch.tensor([1]), text)
    for other in (
        model(x, torch.tensor([0.4]), torch.tensor([1]), text),
        model(x, torch.tensor([0.3]), torch.tensor([2]), text),
        model(x, torch.tensor([0.3]), torch.tensor([1]), noise(1, 5, 6, seed=9)),
    ):
        assert (other - base).abs().max() > 1e-3


def test_no_labels_is_the_last_label_and_no_text_is_an_empty_mask() -> None:
    model = stirred(a_dit(num_classes=4, text_dim=6))
    x, t, text = noise(2, 3, 4, 4), torch.tensor([0.3, 0.6]), noise(2, 5, 6)
    nobody = torch.zeros(2, 5, dtype=torch.bool)
    unconditional = model(x, t, torch.tensor([4, 4]), text, nobody)
    assert torch.isfinite(unconditional).all()
    assert torch.allclose(model(x, t), unconditional, atol=1e-5)


def test_labels_are_never_dropped_inside() -> None:
    model = stirred(a_dit(num_classes=4)).train()
    x, t, labels = noise(8, 3, 4, 4), torch.rand(8), torch.arange(8) % 4
    first = model(x, t, labels)
    assert all(torch.equal(model(x, t, labels), first) for _ in range(5))


def test_padding_does_not_reach_the_answer() -> None:
    model = stirred(a_dit(text_dim=6))
    x, t, text = noise(2, 3, 4, 4), torch.rand(2), noise(2, 3, 6)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    padded = torch.cat([text, torch.full((2, 4, 6), float("nan"))], dim=1)
    wide = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    answer = model(x, t, None, text, mask)
    assert torch.allclose(model(x, t, None, padded, wide), answer, atol=1e-5)
    assert torch.allclose(model(x[1:], t[1:], None, text[1:, :1]), answer[1:], atol=1e-5)


def test_rotary_attention_depends_on_differences_of_position_only() -> None:
    cos, sin = rope_2d(6, 7, 16, torch.device("cpu"))
    q, k = noise(16), noise(16, seed=6)
    at = {(r, c): r * 7 + c for r in range(6) for c in range(7)}

    def score(query: tuple[int, int], key: tuple[int, int]) -> torch.Tensor:
        a, b = at[query], at[key]
        return _rotate(q[None], cos[a], sin[a]) @ _rotate(k[None], cos[b], sin[b]).T

    assert torch.allclose(score((0, 0), (2, 3)), score((3, 3), (5, 6)), atol=1e-4)
    assert not torch.allclose(score((0, 0), (2, 3)), score((0, 0), (3, 2)), atol=1e-3)


def test_sincos_positions_are_distinct_and_cropped_not_stretched() -> None:
    large = sincos_2d(8, 9, 32, torch.device("cpu")).reshape(8, 9, 32)
    small = sincos_2d(3, 4, 32, torch.device("cpu")).reshape(3, 4, 32)
    assert torch.equal(large[:3, :4], small)
    assert torch.cdist(large.flatten(0, 1), large.flatten(0, 1)).fill_diagonal_(9).min() > 0.1


def test_time_features_tell_neighbouring_steps_apart() -> None:
    features = time_features(torch.tensor([0.5, 0.501]))
    assert features.shape == (2, 256)
    assert (features[0] - features[1]).abs().max() > 0.5
    assert torch.allclose(features[0, 0], torch.tensor(500.0).cos(), atol=1e-3)


def test_activation_checkpointing_changes_no_gradient() -> None:
    x, t = noise(2, 3, 4, 4), torch.rand(2)
    gradients = []
    for checkpointed in (False, True):
        model = stirred(a_dit(activation_checkpointing=checkpointed, text_dim=6))
        model(x, t, None, noise(2, 5, 6)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_every_parameter_gets_a_gradient() -> None:
    model = stirred(a_dit(num_classes=4, text_dim=6))
    model(noise(2, 3, 4, 4), torch.rand(2), torch.tensor([1, 2]), noise(2, 5, 6)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bf16_autocast_keeps_the_answer() -> None:
    model = stirred(a_dit(num_classes=4, text_dim=6))
    arguments = (noise(2, 3, 4, 4), torch.rand(2), torch.tensor([1, 2]), noise(2, 5, 6), torch.ones(2, 5))
    exact = model(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*arguments).float()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_it_learns() -> None:
    model = a_dit(num_classes=2)
    x, t, labels = noise(8, 3, 4, 4), torch.linspace(0.1, 0.9, 8), torch.arange(8) % 2
    target = torch.where(labels.view(-1, 1, 1, 1) == 0, x, -x)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (model(x, t, labels) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
