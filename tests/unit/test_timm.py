"""timm's factory of optimizers, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.marks import needs
from torch import nn

from sharded_shampoo4 import Shampoo4, checkpoint
from sharded_shampoo4.presets import PRESETS

pytestmark = needs("timm", "torchvision")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    try:
        import timm  # noqa: F401
    except Exception as error:  # as of a torchvision that is made for another torch
        pytest.skip(f"timm does not import here: {error}")
    import sharded_shampoo4.integrations.timm  # noqa: F401


def vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)


def create(model: Any, **options: Any) -> Shampoo4:
    import timm

    optimizer = timm.optim.create_optimizer_v2(model, "shampoo4", lr=2e-3, **options)
    assert isinstance(optimizer, Shampoo4)
    return optimizer


def train(model: nn.Module, optimizer: Any, steps: int = 6) -> list[float]:
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), torch.arange(16) % 10)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_it_is_listed() -> None:
    import timm

    assert "shampoo4" in timm.optim.list_optimizers("sham*")
    factory = timm.optim.get_optimizer_class("shampoo4")
    assert isinstance(factory(vit().parameters(), lr=1e-3), Shampoo4)


def test_it_trains_as_by_itself() -> None:
    """Groups, betas, eps and foreach are what timm's function is given; presets reach it too."""
    model = vit()
    given: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-6, "foreach": False, "preset": "compact"}
    optimizer = create(model, weight_decay=0.05, **given)
    groups = {group["weight_decay"]: group for group in optimizer.param_groups}
    assert groups.keys() == {0.0, 0.05}
    for group in optimizer.param_groups:
        assert {name: group[name] for name in ("betas", "eps", "foreach", "lr")} == {
            "betas": (0.8, 0.9), "eps": 1e-6, "foreach": False, "lr": 2e-3,
        }  # fmt: skip
        assert group["bits"] == PRESETS["compact"]["bits"]
    losses = train(model, optimizer)
    other = vit()
    plain = [p for p in other.parameters() if p.ndim <= 1] + [other.pos_embed, other.cls_token]
    decayed = [p for p in other.parameters() if not any(p is q for q in plain)]
    alone = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    assert losses == train(other, Shampoo4(alone, lr=2e-3, **given))
    assert losses[-1] < 0.9 * losses[0]


def test_layer_decay() -> None:
    """timm's schedulers multiply learning rates by ``lr_scale``, which groups keep."""
    from timm.scheduler import CosineLRScheduler

    optimizer = create(vit(), weight_decay=0.05, layer_decay=0.5)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0, 0.5, 0.25, 0.125}
    CosineLRScheduler(optimizer, t_initial=10)
    assert {group["lr"] for group in optimizer.param_groups} == {2e-3 * scale for scale in (1.0, 0.5, 0.25, 0.125)}


def test_fallback_is_the_base() -> None:
    model = vit()
    optimizer = create(model, weight_decay=0.05, fallback_list=["head.*"], layer_decay=0.5)
    left = {id(p) for group in optimizer.param_groups if not group["precondition"] for p in group["params"]}
    assert left == {id(model.head.weight), id(model.head.bias)}
    assert not any("use_fallback" in group for group in optimizer.param_groups)
    with pytest.raises(ValueError, match="use_fallback"):
        create([{"params": model.parameters(), "use_fallback": True, "precondition": True}])


def test_momentum_goes_to_a_base_that_has_it() -> None:
    assert "momentum" not in create(vit()).param_groups[0]
    assert create(vit(), base="sgd").param_groups[0]["momentum"] == 0.9
    assert create(vit(), base="sgd", momentum=0.5).param_groups[0]["momentum"] == 0.5


def test_nothing_is_swallowed() -> None:
    with pytest.raises(TypeError, match="betas"):
        create(vit(), base="sgd", betas=(0.9, 0.99))
    with pytest.raises(TypeError, match="did you mean 'preset'"):
        create(vit(), presett="compact")


def test_names(tmp_path: Any) -> None:
    """Groups of timm have none. Checkpoints need the model, or groups with names."""
    import timm

    from sharded_shampoo4.integrations.timm import with_names

    def groups(model: Any) -> Any:
        decayed = timm.optim.param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        return with_names(model, decayed)

    model = vit()
    optimizer = create(model, weight_decay=0.05)
    assert "parameter 0 of group 0" in optimizer.describe()
    train(model, optimizer, 1)
    checkpoint.save(optimizer, tmp_path / "checkpoint", model=model)

    other = vit()
    named = create(groups(other))
    assert "blocks.0.attn.qkv.weight" in named.describe()
    train(other, named, 3)
    checkpoint.load(named, tmp_path / "checkpoint", model=other)
    assert train(model, optimizer, 2) == train(other, named, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_lookahead() -> None:
    import timm

    model = vit()
    optimizer = timm.optim.create_optimizer_v2(model, "lookahead_shampoo4", lr=2e-3)
    losses = train(model, optimizer, 8)
    assert isinstance(optimizer._base_optimizer, Shampoo4) and losses[-1] < 0.9 * losses[0]
    other = timm.optim.create_optimizer_v2(vit(), "lookahead_shampoo4", lr=2e-3)
    other.load_state_dict(optimizer.state_dict())
