"""An adapter becomes a part of its base's own weights: W + scale · B A, or what DoRA makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.errors import UserError
from dpo_cli.modeling.adapters.files import PREFIX, AdapterFolder
from dpo_cli.modeling.adapters.fit import adapter_weights, check_head, check_layers
from dpo_cli.modeling.adapters.targets import stores_transposed
from dpo_cli.modeling.extras import import_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(model: PreTrainedModel, found: AdapterFolder) -> None:
    """Merge an adapter into its base, in the dtype of the base.

    Args:
        model: The base, in float32.
        found: The adapter.

    Raises:
        UserError: It belongs to another base, or what comes out is not finite.
    """
    import_bitsandbytes()
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.utils import set_peft_model_state_dict

    check_layers(model, found)
    check_head(model, found, tied=True)
    layers = LoraConfig(
        r=found.rank,
        lora_alpha=found.alpha,
        rank_pattern=dict(found.ranks),
        alpha_pattern=dict(found.alphas),
        target_modules=list(found.layers),
        use_dora=found.dora,
        use_rslora=found.rslora,
        fan_in_fan_out=stores_transposed(model, found.layers),
    )
    tuner = LoraModel(model, layers, "default")
    weights = {name.removeprefix(PREFIX): one for name, one in adapter_weights(found).items()}
    report = set_peft_model_state_dict(model, weights)
    lost = [*report.unexpected_keys, *(name for name in report.missing_keys if ".lora_" in name)]
    assert not lost, f"PEFT has not taken {lost[0]}"
    try:
        tuner.merge_and_unload(safe_merge=True)
    except ValueError as error:
        hint = "check the adapter with the program that wrote it"
        raise UserError(f"the adapter cannot be merged: {error}", str(found.path), hint) from error
    model.requires_grad_(True)
