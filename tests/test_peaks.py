"""The table of devices, by the names that jax gives them."""

import pytest

from av_mae import ConfigError, flops, peaks


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("TPU v5 lite", "TPU-v5e"),
        ("TPU v5p", "TPU-v5p"),
        ("TPU v6 lite", "TPU-v6e"),
        ("cpu", ""),
    ],
)
def test_names_of_jax(kind, name):
    assert peaks.name_of(kind) == name


def test_every_name_is_in_the_table():
    assert set(peaks.KINDS.values()) == set(peaks.DEVICES)
    for device in peaks.DEVICES.values():
        assert device.bfloat16 >= device.float32 > 1e13 and device.memory > 1e10
    with pytest.raises(ConfigError, match="device is 'H20': did you mean 'H200'"):
        peaks.named("H20")


def test_type_of_the_products():
    device = peaks.named("H200")
    assert peaks.flops(device, "bfloat16") == 989e12
    assert peaks.flops(device, "float32") == 494.5e12


def test_a_product_is_timed():
    product = peaks.Product(64)
    rates = [product.measure() for _ in range(3)]
    assert product.rate == sorted(rates)[1] and 1e6 < product.rate < 1e15


def test_use_in_the_training_log(monkeypatch):
    """Clips a second times FLOPs a clip over the peak; nothing where none is known."""
    from types import SimpleNamespace

    import jax
    import synthetic

    config = synthetic.tiny("digits/pretrain", compute__dtype="bfloat16")
    assert flops.utilisation(config, 100.0, 1) == {}
    one = [SimpleNamespace(device_kind="NVIDIA H200")]
    monkeypatch.setattr(jax, "devices", lambda: one)
    found = flops.utilisation(config, 100.0, 8)["mfu"]
    assert found == pytest.approx(100 * flops.training(config) / (8 * 989e12))
    config = synthetic.tiny("digits/finetune", compute__dtype="bfloat16")
    found = flops.utilisation(config, 100.0, 1, {"verb": 3, "noun": 4})["mfu"]
    assert found == pytest.approx(100 * flops.training(config, 7) / 989e12)
