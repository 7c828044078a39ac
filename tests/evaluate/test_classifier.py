"""The judge: good at shapes, deterministic, honest about what it has not seen, safe to load."""

import numpy as np
import pytest
import torch
from evaluate_world import real_images

from pipeline.errors import InputError
from pipeline.evaluate.classifier import (
    ConvNet,
    FitSettings,
    _scale_features,
    fit_classifier,
    from_bytes,
    is_held_out,
    to_bytes,
)

QUICK = FitSettings(16, width=8, steps=12, batch_size=16)


def keys_of(n: int) -> list[str]:
    return [f"{i:05d}.png" for i in range(n)]


@pytest.mark.slow
def test_default_settings_judge_shapes_almost_perfectly() -> None:
    images, labels = real_images(3000)
    judge = fit_classifier(images, labels, keys_of(3000), FitSettings(32))
    assert judge.holdout.value > 0.98
    fresh, truth = real_images(360, seed=77)
    seen, features, _ = judge.predict(fresh)
    assert (seen == truth).mean() > 0.98
    assert features.shape == (360, 96)
    assert features.dtype == np.float32


def test_same_arguments_same_classifier_other_seed_another() -> None:
    images, labels = real_images(96)
    one, two = (fit_classifier(images, labels, keys_of(96), QUICK) for _ in range(2))
    other = fit_classifier(images, labels, keys_of(96), FitSettings(16, 8, 12, 16, seed=1))
    assert one.digest == two.digest != other.digest
    np.testing.assert_array_equal(one.predict(images)[1], two.predict(images)[1])


def test_held_out_images_are_never_fitted_on() -> None:
    images, labels = real_images(240)
    keys = keys_of(240)
    changed = images.copy()
    held_out = np.array([is_held_out(key, QUICK.holdout) for key in keys])
    assert 10 < held_out.sum() < 60
    changed[held_out] = 0
    one, two = (fit_classifier(x, labels, keys, QUICK) for x in (images, changed))
    assert one.digest == two.digest
    assert one.fitted_on == 240 - held_out.sum()


def test_judgement_does_not_depend_on_the_batch() -> None:
    images, labels = real_images(96)
    judge = fit_classifier(images, labels, keys_of(96), QUICK)
    alone = np.concatenate([judge.predict(images[i : i + 1])[1] for i in range(8)])
    np.testing.assert_allclose(judge.predict(images)[1][:8], alone, rtol=1e-4, atol=1e-5)


def test_labels_may_be_any_integers() -> None:
    images, labels = real_images(96)
    judge = fit_classifier(images, labels * 1000 + 7, keys_of(96), QUICK)
    assert judge.classes == tuple(c * 1000 + 7 for c in range(12))
    assert set(judge.predict(images)[0]) <= set(judge.classes)


def test_one_class_is_no_task() -> None:
    images, labels = real_images(48)
    with pytest.raises(InputError, match="cannot be fitted on 48 images of 1 classes"):
        fit_classifier(images, labels * 0, keys_of(48), QUICK)


def test_class_that_is_only_kept_aside_is_refused() -> None:
    images, labels = real_images(48)
    keys = keys_of(48)
    labels = np.where([is_held_out(key, QUICK.holdout) for key in keys], 99, labels)
    with pytest.raises(InputError, match="every image of class 99"):
        fit_classifier(images, labels, keys, QUICK)


def test_saved_and_loaded_it_judges_the_same() -> None:
    images, labels = real_images(96)
    judge = fit_classifier(images, labels, keys_of(96), QUICK)
    again = from_bytes(to_bytes(judge, "key"), "key")
    assert again is not None
    assert (again.digest, again.classes, again.holdout) == (judge.digest, judge.classes, judge.holdout)
    np.testing.assert_array_equal(again.predict(images)[1], judge.predict(images)[1])


def test_files_of_another_fit_torn_or_tampered_are_not_used() -> None:
    images, labels = real_images(96)
    data = to_bytes(fit_classifier(images, labels, keys_of(96), QUICK), "key")
    assert from_bytes(data, "other key") is None
    assert from_bytes(data[: len(data) // 2], "key") is None
    assert from_bytes(b"", "key") is None
    assert from_bytes(b"\x80\x04not safetensors at all", "key") is None
    flipped = bytearray(data)
    flipped[-1] ^= 1
    assert from_bytes(bytes(flipped), "key") is None


def test_features_have_unit_mean_square() -> None:
    images, labels = real_images(96)
    judge = fit_classifier(images, labels, keys_of(96), QUICK)
    kept = np.array([not is_held_out(key, QUICK.holdout) for key in keys_of(96)])
    _, features, _ = judge.predict(images[kept])
    assert np.square(features).mean() == pytest.approx(1.0, rel=1e-4)


def test_giving_features_a_unit_changes_no_logit() -> None:
    images, _ = real_images(24)
    torch.manual_seed(0)
    net = ConvNet(12, resolution=16, width=8).requires_grad_(False)
    before = net(torch.from_numpy(images))
    _scale_features(net, images)
    assert float(net.scale) != 1.0
    torch.testing.assert_close(net(torch.from_numpy(images)), before, rtol=1e-4, atol=1e-5)
