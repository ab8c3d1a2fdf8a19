"""DPOModule: losses against float64 by hand, the reference against a recomputation, a policy that learns."""

import math

import pytest
import torch

from datamodules.pairs import reference_log_probs
from lightning_modules.backbone.decoder import Decoder
from lightning_modules.backbone.lora import LoRA
from lightning_modules.dpo import DPOModule, compact, dpo
from lightning_modules.optim import OptimizerFactory, trainable
from lightning_modules.parm import PARMObjective
from tests.helpers.models import make_decoder, make_masked, make_parm

PROMPTS = ["a photo of a star", "a photo of two rings", "a photo of a red circle"]


def make_module(
    optimizer: OptimizerFactory = torch.optim.AdamW, sft_weight: float = 0.0, decoder: Decoder | None = None
) -> DPOModule:
    decoder = decoder or make_decoder()
    return DPOModule(
        decoder, make_parm(decoder), optimizer, 1, lambda *sides: dpo(*sides, beta=0.1), sft_weight, 5.0, None, 1e-4
    )


def make_batch(module: DPOModule) -> dict:
    torch.manual_seed(3)
    sides = {name: torch.randint(0, 32, (3, module.decoder.num_tokens)) for name in ("chosen", "rejected")}
    pairs = {"prompt": PROMPTS, "seed": [0, 1, 2]}
    reference = reference_log_probs(module.decoder, pairs | {name: side.tolist() for name, side in sides.items()})
    weight = torch.tensor([1.0, 0.5, 1.5])
    return pairs | sides | {"weight": weight} | {f"ref_{name}": own for name, own in reference.items()}


@pytest.mark.parametrize(
    ("loss", "by_hand", "slope"),
    [
        (lambda *a: dpo(*a, beta=0.3), lambda c, r, rc, rr: 0.3 * (c - rc - r + rr), 0.3),
        (compact, lambda c, r, rc, rr: c - r, 1.0),
    ],
    ids=["dpo", "compact"],
)
def test_losses_and_gradients_equal_the_formula(loss, by_hand, slope: float) -> None:
    sides = torch.tensor([[-10.0, -8.0], [-9.0, -12.5], [-10.5, -9.0], [-9.5, -11.0]], dtype=torch.float64)
    sides.requires_grad_()
    value = loss(*sides)
    value.sum().backward()
    assert sides.grad is not None
    for i in range(2):
        logit = by_hand(*sides[:, i].tolist())
        assert value[i].item() == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-12)
        pull = -slope / (1 + math.exp(logit))
        assert sides.grad[:2, i].tolist() == pytest.approx([pull, -pull], rel=1e-12)
        assert sides.grad[2:, i].abs().max() == pytest.approx(abs(pull) if loss is not compact else 0.0)


def test_the_policy_starts_at_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module()
    logged: dict = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value.detach())}))
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update({k: float(v) for k, v in values.items()}))
    batch = make_batch(module)
    loss = module.measure(batch, "train")
    assert loss.item() == pytest.approx(math.log(2), abs=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"):
        assert logged[f"train/{name}"] == pytest.approx(0.0, abs=2e-4), name
    assert logged["train/logps/chosen"] == pytest.approx(sum(batch["ref_chosen"]) / 3, rel=1e-5)


@pytest.mark.parametrize("make", [make_decoder, make_masked])
def test_training_prefers_the_chosen_and_stops_when_it_collapses(make, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(sft_weight=0.1, decoder=make())
    logged: dict = {}
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update({k: float(v) for k, v in values.items()}))
    batch = make_batch(module)
    optimizer = torch.optim.AdamW(module.decoder.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        module.measure(batch, "train").backward()
        optimizer.step()
    assert logged["train/rewards/accuracies"] == 1.0 and logged["train/rewards/margins"] > 1
    batch["ref_chosen"] = [value + 100 for value in batch["ref_chosen"]]
    with pytest.raises(ValueError, match=r"chosen images became .* more than module\.max_fall=5\.0"):
        module.measure(batch, "train")


def test_reference_log_probs_are_those_of_a_plain_pass() -> None:
    module = make_module()
    batch = make_batch(module)
    for side in ("chosen", "rejected"):
        plain = module.decoder.token_log_probs(PROMPTS, batch[side]).sum(1)
        torch.testing.assert_close(torch.tensor(batch[f"ref_{side}"]), plain, atol=1e-5, rtol=1e-5)


def labelled(batch: dict, module: DPOModule) -> dict:
    """What pairs from rollouts know of both sides: chosen images are right, rejected ones wrong."""
    words = module.decoder.max_words
    return batch | {
        "correct": torch.tensor([1.0] * 3 + [0.0] * 3),
        "clauses": torch.full((6, 6), math.nan),
        "grounding": torch.full((6, module.decoder.num_tokens, words), math.nan),
    }


def test_refitting_trains_parm_and_leaves_the_policy_to_the_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder()
    module = DPOModule(
        decoder, make_parm(decoder), torch.optim.AdamW, 1, lambda *a: dpo(*a, beta=0.1), 0.0, 5.0, PARMObjective(), 1e-3
    )
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    batch = labelled(make_batch(module), module)
    module.measure(batch, "train").backward()
    alone = {name: p.grad.clone() for name, p in module.decoder.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in module.parm.parameters())
    module.zero_grad()
    module.training_step(batch, 0).backward()
    for name, parameter in module.decoder.named_parameters():
        if name in alone:
            torch.testing.assert_close(parameter.grad, alone[name])
    assert sum(p.grad.abs().sum() for p in module.parm.parameters() if p.grad is not None) > 0
    optimizer = torch.optim.AdamW(module.parm.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module._refit_loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert list(module.exported) == ["decoder", "parm"]
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert any(key.startswith("parm.") for key in checkpoint["state_dict"])
    assert not any(key.startswith("decoder.image_tokenizer.") for key in checkpoint["state_dict"])


def test_refitting_needs_labels() -> None:
    decoder = make_decoder()
    module = DPOModule(decoder, make_parm(decoder), torch.optim.AdamW, 1, compact, 0.0, 5.0, PARMObjective(), 1e-3)
    with pytest.raises(ValueError, match=r"module\.refit needs pairs made from rollouts"):
        module._refit_loss(make_batch(module))


def test_adapters_alone_are_trained_and_saved_and_merge_into_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder()
    plain = {key: value.clone() for key, value in decoder.state_dict().items()}
    optimizer, loss = torch.optim.AdamW, lambda *a: dpo(*a, beta=0.1)
    module = DPOModule(decoder, make_parm(decoder), optimizer, 1, loss, 0.0, 50.0, None, 1e-4, LoRA(rank=4))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    batch = make_batch(module)
    before = module.measure(batch, "train").item()
    built = torch.optim.AdamW(trainable(module), lr=1e-2)
    for _ in range(5):
        built.zero_grad()
        module.measure(batch, "train").backward()
        built.step()
    after = module.measure(batch, "train").item()
    assert after < before
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == set(trained)
    adapted = module.decoder.token_log_probs(PROMPTS, batch["chosen"])
    merged = module.exported["decoder"]
    assert merged.state_dict().keys() == plain.keys()
    torch.testing.assert_close(merged.token_log_probs(PROMPTS, batch["chosen"]), adapted, atol=1e-4, rtol=1e-4)
    assert not torch.equal(
        merged.state_dict()["transformer.blocks.0.attention.qkv.weight"],
        plain["transformer.blocks.0.attention.qkv.weight"],
    )


def test_adapters_for_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        LoRA(targets=("nothing",)).inject(make_decoder())
